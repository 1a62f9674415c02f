"""What every predictor of changes has to beat. All of it comes from training pairs alone.

Each function takes the training pairs and the perturbations and contexts to predict (int64 [pairs]), and returns float64
[pairs, genes], NaN in the rows of pairs for which it is not defined.
"""

import numpy as np

from scbench.evaluation.perturbation.changes import Changes


def no_change(fitted: Changes, perturbation: np.ndarray, context: np.ndarray) -> np.ndarray:
    """The context's own controls."""
    return np.zeros((len(perturbation), fitted.change.shape[1]))


def train_mean(fitted: Changes, perturbation: np.ndarray, context: np.ndarray) -> np.ndarray:
    """The mean change of all perturbations in the context; in all contexts if it has none."""
    return fitted.mean[context]


def own_mean(fitted: Changes, perturbation: np.ndarray, context: np.ndarray) -> np.ndarray:
    """The same perturbation's change in the same context, from its training cells."""
    return np.stack([
        _mean(fitted, (fitted.perturbation == what) & (fitted.context == where))
        for what, where in zip(perturbation, context, strict=True)
    ])


def additive(
    fitted: Changes, perturbation: np.ndarray, context: np.ndarray, perturbations: list[tuple[str, ...]]
) -> np.ndarray:
    """The sum of the single changes of a combination in the same context, if all of them were measured there."""
    number = {targets: place for place, targets in enumerate(perturbations)}
    predicted = np.full((len(perturbation), fitted.change.shape[1]), np.nan)
    for place, (what, where) in enumerate(zip(perturbation, context, strict=True)):
        targets = perturbations[what]
        if len(targets) > 1:
            singles = [
                _mean(fitted, (fitted.perturbation == number.get((target,), -1)) & (fitted.context == where))
                for target in targets
            ]
            predicted[place] = np.sum(singles, axis=0)
    return predicted


def matching_mean(
    fitted: Changes, perturbation: np.ndarray, context: np.ndarray, perturbations: list[tuple[str, ...]]
) -> np.ndarray:
    """The same perturbation's mean change elsewhere; for one never seen the mean over its targets of the single changes.

    A single change comes from the same context, else from all contexts; the train mean stands in for one never measured.
    """
    number = {targets: place for place, targets in enumerate(perturbations)}
    predicted = np.empty((len(perturbation), fitted.change.shape[1]))
    for place, (what, where) in enumerate(zip(perturbation, context, strict=True)):
        seen = fitted.perturbation == what
        if seen.any():
            predicted[place] = _mean(fitted, seen)
            continue
        parts = []
        for target in perturbations[what]:
            single = fitted.perturbation == number.get((target,), -1)
            here = single & (fitted.context == where)
            parts.append(_mean(fitted, here if here.any() else single) if single.any() else fitted.mean[where])
        predicted[place] = np.mean(parts, axis=0)
    return predicted


def _mean(fitted: Changes, rows: np.ndarray) -> np.ndarray:
    """The mean change of some training pairs; NaN if there is none."""
    return fitted.change[rows].mean(axis=0) if rows.any() else np.full(fitted.change.shape[1], np.nan)
