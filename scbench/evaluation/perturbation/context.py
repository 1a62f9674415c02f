"""Predict a change in a context where it was never measured: from the contexts where it was, the alike ones more."""

from collections.abc import Sequence

import numpy as np
from scipy.spatial.distance import cdist

from scbench.evaluation.perturbation.changes import Changes

WIDTHS = (0.1, 0.3, 1.0, 3.0, np.inf)  # of the kernel, in median squared distances; the last one is the plain mean


def predict(
    centroids: np.ndarray, fitted: Changes, perturbation: np.ndarray, context: np.ndarray, widths: Sequence[float]
) -> np.ndarray:
    """Changes of pairs at each width, float64 [widths, pairs, genes].

    The mean of the same perturbation's changes in the training contexts, weighted by exp(−d² / (width · median d²)), d the
    distance between the contexts' centroids; the context's train mean where it was never measured.

    Parameters
    ----------
    centroids
        [contexts, D], mean embedding of each context's controls.
    fitted, perturbation, context
        Training pairs, and the pairs to predict.
    """
    squared = cdist(centroids, centroids, "sqeuclidean")
    between = squared[np.triu_indices(len(squared), 1)]
    median = np.median(between[between > 0]) if (between > 0).any() else 1.0
    predicted = np.repeat(fitted.mean[context][None], len(widths), axis=0)
    for place, (what, where) in enumerate(zip(perturbation, context, strict=True)):
        rows = np.flatnonzero(fitted.perturbation == what)
        if len(rows):
            far = squared[where, fitted.context[rows]] / median
            for number, width in enumerate(widths):
                weights = np.exp(-(far - far.min()) / width)
                predicted[number, place] = weights @ fitted.change[rows] / weights.sum()
    return predicted
