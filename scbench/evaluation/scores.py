"""Folds, accuracy and macro-F1, and bootstrap intervals that are paired over methods."""

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np

from scbench.kernels import random
from scbench.kernels.random import Stream

RESAMPLES = 1000
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
    """How often each cell is drawn, float64 [rows, cells], in chunks: first a row of ones, then RESAMPLES bootstrap rows."""
    yield np.ones((1, cells))
    key = random.key(seed, Stream.EVALUATION, _BOOTSTRAP)
    step = max(1, _CHUNK // cells)
    for start in range(0, RESAMPLES, step):
        rows = np.arange(start, min(start + step, RESAMPLES))
        words = random.bits(random.bits(key, rows)[:, None], np.arange(cells))
        drawn = (words % np.uint64(cells)).astype(np.int64) + cells * (rows - start)[:, None]
        yield np.bincount(drawn.ravel(), minlength=len(rows) * cells).reshape(len(rows), cells).astype(np.float64)


def score(truth: np.ndarray, predictions: dict, seed: int) -> dict[object, Scores]:
    """Accuracy and macro-F1 of every method, each the mean over repetitions, on all cells and on bootstrap resamples.

    A resample draws as many cells as there are, with replacement; all methods and all repetitions see the same
    resamples, so differences between methods are paired. A class that a resample misses altogether is left out of its
    macro-F1.

    Parameters
    ----------
    truth
        int64 [cells].
    predictions
        A method's out-of-fold predictions, int64 [repetitions, cells], by any key.
    """
    one_hot = np.eye(max(values.max() for values in (truth, *predictions.values())) + 1)  # a class may have no test cell
    true_class = one_hot[truth]
    accuracy = {method: [] for method in predictions}
    macro_f1 = {method: [] for method in predictions}
    for weights in resamples(len(truth), seed):
        true_cells = weights @ true_class
        present = true_cells > 0
        for method, repetitions in predictions.items():
            accuracies, f1s = [], []
            for predicted in repetitions:
                hit = predicted == truth
                hits = weights @ (true_class * hit[:, None])
                f1 = 2 * hits / np.maximum(true_cells + weights @ one_hot[predicted], 1)
                accuracies.append(hits.sum(1) / len(truth))
                f1s.append((f1 * present).sum(1) / present.sum(1))
            accuracy[method].append(np.mean(accuracies, axis=0))
            macro_f1[method].append(np.mean(f1s, axis=0))
    return {method: Scores(np.concatenate(accuracy[method]), np.concatenate(macro_f1[method])) for method in predictions}


def interval(values: np.ndarray) -> Interval:
    """The value and its 95 % percentile interval. `values`: as in Scores, or the difference of two of them."""
    low, high = np.percentile(values[1:], [2.5, 97.5])
    return Interval(float(values[0]), float(low), float(high))
