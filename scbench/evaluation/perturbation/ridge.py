"""Ridge regression from features of a perturbation to its change; its strength is chosen on validation perturbations."""

from collections.abc import Callable, Sequence

import numpy as np

from scbench.evaluation.perturbation.changes import Changes

STRENGTHS = tuple(10.0**power for power in range(-3, 5))  # one grid for all features
INNER_FOLDS = 5


def predict(
    features: np.ndarray, fitted: Changes, perturbation: np.ndarray, context: np.ndarray, strengths: Sequence[float]
) -> np.ndarray:
    """Changes of pairs at each strength, float64 [strengths, pairs, genes].

    Changes and features are centred by the training means of each context, so that with a large strength the prediction is the
    train mean; features are scaled to a mean square of 1, so that one grid serves all.

    Parameters
    ----------
    features
        [perturbations, D], of all perturbations.
    fitted
        Training pairs.
    perturbation, context
        Of the pairs to predict.
    """
    train = features[fitted.perturbation]
    means = np.repeat(train.mean(axis=0)[None], len(fitted.mean), axis=0)
    for number in np.unique(fitted.context):
        means[number] = train[fitted.context == number].mean(axis=0)
    train = train - means[fitted.context]
    scale = np.square(train).sum(axis=1).mean()
    base = fitted.mean[context]
    if scale <= 1e-12 * max(1.0, np.square(features).mean()):  # one feature for all: nothing but the mean can be said
        return np.repeat(base[None], len(strengths), axis=0)
    new = features[perturbation] - means[context]
    values, vectors = np.linalg.eigh(train @ train.T / scale)
    projected = vectors.T @ (fitted.change - fitted.mean[fitted.context])
    similar = new @ train.T @ vectors / scale
    return np.stack([base + (similar / (np.maximum(values, 0) + strength)) @ projected for strength in strengths])


def choose(grid: Sequence, inner: list[tuple[Changes, Changes]], predict_all: Callable[[Changes, Changes], np.ndarray]) -> int:
    """The place in `grid` with the smallest squared error on validation pairs, own targets left out (the first of equals).

    `inner`: training and validation pairs; `predict_all`: their predictions at all places, [grid, pairs, genes].
    """
    errors = np.zeros(len(grid))
    for fitted, validation in inner:
        squares = np.square(predict_all(fitted, validation) - validation.change) * validation.scored
        errors += (squares.sum(axis=2) / np.maximum(validation.scored.sum(axis=1), 1)).sum(axis=1)
    return int(errors.argmin())


def validation_folds(fitted: Changes, group: np.ndarray) -> list[tuple[Changes, Changes]]:
    """Training pairs divided by whole groups (perturbations or contexts), each group validating once.

    `group`: int64 [training pairs].
    """
    names = np.unique(group)
    if len(names) < 2:
        return []
    fold = np.searchsorted(names, group) % min(INNER_FOLDS, len(names))
    return [(fitted.take(np.flatnonzero(fold != number)), fitted.take(np.flatnonzero(fold == number)))
            for number in range(fold.max() + 1)]
