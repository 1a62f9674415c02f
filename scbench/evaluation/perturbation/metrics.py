"""How far a predicted change is from the real one. Pure functions of arrays; a leading axis holds resamples of the truth."""

import numpy as np
from scipy.spatial.distance import cdist

CONSTANT = 1e-10  # a vector that varies less than this, relative to its size or absolutely, has no correlation


def mean_squared_error(predicted: np.ndarray, truth: np.ndarray) -> np.ndarray:
    """float64 [R]. `predicted`: [genes]; `truth`: [R, genes]."""
    return np.square(truth - predicted).mean(axis=1)


def pearson(predicted: np.ndarray, truth: np.ndarray) -> np.ndarray:
    """Correlation over genes, float64 [R]; 0 where either is constant: nothing was said about the direction of the change.

    `predicted`: [genes] or [R, genes]; `truth`: [R, genes].
    """
    a, b = (x - x.mean(axis=-1, keepdims=True) for x in (np.atleast_2d(predicted), truth))
    sizes = [np.linalg.norm(x, axis=1) for x in (a, b)]
    constant = (sizes[0] <= CONSTANT * np.maximum(1, np.abs(predicted).max(axis=-1))) | (
        sizes[1] <= CONSTANT * np.maximum(1, np.abs(truth).max(axis=-1))
    )
    return np.where(constant, 0.0, (a * b).sum(axis=1) / np.where(constant, 1, sizes[0] * sizes[1]))


def top_genes(change: np.ndarray, number: int = 20) -> np.ndarray:
    """The genes with the largest absolute change, int64, at most `number`."""
    return np.argsort(-np.abs(change), kind="stable")[:number]


def discrimination(predicted: np.ndarray, truths: np.ndarray, own: int, targets: list[list[int]]) -> np.ndarray | None:
    """Share of the other perturbations whose real change is farther from the prediction than the right one (ties: one half).

    float64 [methods, R]: 1 is perfect, ½ chance; None without another perturbation. Distances are Euclidean, over the genes
    that are targets of neither of the two compared: else a perturbation would be known by its own target.

    Parameters
    ----------
    predicted
        [methods, genes], of perturbation `own`.
    truths
        [perturbations, R, genes].
    targets
        Which genes are each perturbation's targets.
    """
    others = [number for number in range(len(truths)) if number != own]
    if not others:
        return None
    # |p − other|² − |p − own|², without the squares of p, which cancel: first over all genes, then less the targets
    squares = np.square(truths).sum(axis=2)
    products = (truths.reshape(-1, truths.shape[2]) @ predicted.T).T.reshape(len(predicted), *squares.shape)
    further = squares - squares[own] - 2 * (products - products[:, [own]])
    for other in others:
        dropped = sorted({*targets[own], *targets[other]})
        far, near = truths[other][:, dropped], truths[own][:, dropped]
        further[:, other] -= (far**2 - near**2).sum(axis=1) - 2 * predicted[:, dropped] @ (far - near).T
    tie = np.abs(further) <= CONSTANT * (1 + squares + squares[own])
    return np.where(tie, 0.5, further > 0)[:, others].mean(axis=1)


def energy_distance(real: np.ndarray, predicted: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """2 E|X − Y| − E|X − X'| − E|Y − Y'| of real cells X and predicted cells Y, float64 [R]; 0 in the mean for equal laws.

    Pairs of one cell with itself don't count, so it may be slightly negative. Székely & Rizzo, "Energy statistics" (2013).

    Parameters
    ----------
    real, predicted
        Cells, [n, genes] and [m, genes]; n, m ≥ 2.
    weights
        How often each real cell is drawn, [R, n].
    """
    drawn = weights.sum(axis=1)
    across = weights @ cdist(real, predicted).mean(axis=1) / drawn
    pairs = drawn**2 - np.square(weights).sum(axis=1)
    within = ((weights @ cdist(real, real)) * weights).sum(axis=1) / np.maximum(pairs, 1)
    m = len(predicted)
    return 2 * across - within - cdist(predicted, predicted).sum() / (m * (m - 1))
