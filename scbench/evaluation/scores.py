"""Folds of cells; accuracy, balanced accuracy and macro-F1, and bootstrap intervals that are paired over methods."""

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
import scipy.sparse

from scbench.kernels import random
from scbench.kernels.random import Stream

RESAMPLES = 1000
LOWER_IS_BETTER = frozenset(("mse", "mse_top", "energy", "poisson_deviance"))  # of the metrics of all tables
_FOLDS, _BOOTSTRAP = 0, 1  # what a key of Stream.EVALUATION decides
_CHUNK = 4_000_000  # weights in memory at once


class Interval(NamedTuple):
    """A value with the 2.5 and 97.5 percentiles of its bootstrap."""

    value: float
    low: float
    high: float


class Scores(NamedTuple):
    """One method's scores: the value on all cells at index 0, then one value a resample. float64 [1 + RESAMPLES]."""

    accuracy: np.ndarray
    balanced_accuracy: np.ndarray
    macro_f1: np.ndarray


def stratified_folds(classes: np.ndarray, hashes: np.ndarray, folds: int, seed: int, repetition: int) -> np.ndarray:
    """The fold of each cell, int64 [cells]: every class is spread evenly, fold sizes differ by at most one.

    Cells are put in a random order that depends on their content (`hashes`, uint64), not on their place in a file.
    """
    key = random.key(seed, Stream.EVALUATION, _FOLDS, repetition)
    order = np.lexsort((random.bits(key, hashes), classes))
    fold = np.empty(len(classes), dtype=np.int64)
    fold[order] = np.arange(len(classes)) % folds
    return fold


def resamples(cells: int, seed: int) -> Iterator[np.ndarray]:
    """How often each cell, or other unit, is drawn, float64 [rows, cells], in chunks: a row of ones, then RESAMPLES others."""
    yield np.ones((1, cells))
    key = random.key(seed, Stream.EVALUATION, _BOOTSTRAP)
    step = max(1, _CHUNK // cells)
    for start in range(0, RESAMPLES, step):
        rows = np.arange(start, min(start + step, RESAMPLES))
        words = random.bits(random.bits(key, rows)[:, None], np.arange(cells))
        drawn = (words % np.uint64(cells)).astype(np.int64) + cells * (rows - start)[:, None]
        yield np.bincount(drawn.ravel(), minlength=len(rows) * cells).reshape(len(rows), cells).astype(np.float64)


def score(
    truth: np.ndarray, predictions: dict, seed: int, groups: np.ndarray | None = None
) -> dict[object, Scores]:
    """Accuracy, balanced accuracy and macro-F1 of every method, each the mean over repetitions, on all cells and on resamples.

    A resample draws as many cells, or whole groups, as there are, with replacement; all methods and all repetitions see the
    same resamples, so differences between methods are paired. Balanced accuracy and macro-F1 are over the classes that a
    resample has cells of.

    Parameters
    ----------
    truth
        int64 [cells].
    predictions
        A method's out-of-fold predictions, int64 [repetitions, cells], by any key.
    groups
        What is drawn, int64 [cells], 0 … groups − 1; cells by default.
    """
    classes = max(values.max() for values in (truth, *predictions.values())) + 1  # a class may have no test cell
    unit = np.arange(len(truth)) if groups is None else groups
    units = int(unit.max()) + 1

    def counted(called: np.ndarray, counts: np.ndarray | None = None) -> scipy.sparse.csr_matrix:
        """How many cells of each unit have each class, [classes, units]; those of `counts`, bool [cells], alone."""
        ones = np.ones(len(called)) if counts is None else counts.astype(np.float64)
        return scipy.sparse.csr_matrix((ones, (called, unit)), (classes, units))

    true_class = counted(truth)
    parts = {
        method: [(counted(truth, predicted == truth), counted(predicted)) for predicted in repetitions]
        for method, repetitions in predictions.items()
    }
    samples = {method: [] for method in predictions}
    for weights in resamples(units, seed):
        drawn = np.ascontiguousarray(weights.T)
        true_cells = true_class @ drawn  # [classes, rows]
        present = true_cells > 0
        for method, repetitions in parts.items():
            found = []
            for right, called in repetitions:
                hits = right @ drawn
                recalls = hits / np.maximum(true_cells, 1)
                f1 = 2 * hits / np.maximum(true_cells + called @ drawn, 1)
                found.append([hits.sum(0) / true_cells.sum(0),
                              *((values * present).sum(0) / present.sum(0) for values in (recalls, f1))])
            samples[method].append(np.mean(found, axis=0))
    return {method: Scores(*np.concatenate(found, axis=1)) for method, found in samples.items()}


def interval(values: np.ndarray) -> Interval:
    """The value and its 95 % percentile interval. `values`: as in Scores, or the difference of two of them."""
    low, high = np.percentile(values[1:], [2.5, 97.5])
    return Interval(float(values[0]), float(low), float(high))


def interval_fields(name: str, samples: np.ndarray) -> dict[str, float]:
    """A value and its 95 % interval as fields of a row."""
    value, low, high = interval(samples)
    return {name: value, f"{name}_low": low, f"{name}_high": high}


def verdict(metric: str, low: float, high: float) -> str:
    """What the 95 % interval of a difference, ours minus another's, says in words: "beats", "loses to" or neither. A bound
    that is 0 but for rounding (1e-9) is 0."""
    ahead, behind = low > 1e-9, high < -1e-9
    if metric in LOWER_IS_BETTER:
        ahead, behind = behind, ahead
    return "beats" if ahead else "loses to" if behind else "is not clearly apart from"


def confusion(truth: np.ndarray, predictions: np.ndarray, classes: int) -> np.ndarray:
    """Cells of each true class (rows) called each class (columns), summed over repetitions, int64 [classes, classes].

    `predictions`: int64 [repetitions, cells].
    """
    pairs = truth * classes + predictions
    return np.bincount(pairs.ravel(), minlength=classes * classes).reshape(classes, classes)
