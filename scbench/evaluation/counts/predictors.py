"""What predicts the counts of half B from half A: mean counts are exposure × share, for a gene's share of a cell.

The exposure of a cell comes from its half A alone, and is the same for all methods. Shares are those of the training cells'
half B (gene mean), of the nearest training cells (k-NN), log-linear in some features, or half A's own, smoothed. Errors are
Poisson deviances. Every strength is chosen among a few by the deviance on the validation cells.
"""

from collections.abc import Callable, Iterator
from typing import NamedTuple

import numpy as np
import scipy.sparse
from scipy.optimize import minimize
from sklearn.neighbors import NearestNeighbors

from scbench.evaluation import baselines

EXPRESSED_IN = 5  # training cells: rarer genes are not predicted
PENALTIES = (1e5, 1e4, 3e3, 1e3, 3e2, 1e2, 3e1, 1e1)  # of log-linear coefficients, in counts of a gene; falling
NEIGHBOURS = (10, 30, 100, 300)
MEAN_SHARES = (0.01, 0.03, 0.1, 0.3)  # weight of the gene mean beside the neighbours
PSEUDO_COUNTS = (30, 100, 300, 1e3, 3e3, 1e4, 3e4, 1e5)  # of the gene mean beside half A
_CHUNK = 2048  # cells whose mean counts are in memory at once
_LARGEST = 30.0  # log rate over the gene mean: a step there is taken back anyway
_ITERATIONS, _TOLERANCE = 20, 1e-6  # of L-BFGS: more of them change the explained deviance in the fourth digit


class Part(NamedTuple):
    """Training, validation or test cells."""

    exposure: np.ndarray  # float64 [cells]
    counts: scipy.sparse.csr_matrix  # [cells, chosen genes] of half B, float64


class Fold(NamedTuple):
    """One division of the cells, and the genes that are predicted there."""

    train: Part
    validation: Part
    test: Part
    shares: np.ndarray  # float64 [chosen genes], of half B of the training cells


class Choice(NamedTuple):
    """A predictor's errors on the test cells, and the strength that was chosen on the validation cells."""

    deviance: np.ndarray  # float64 [test cells], mean over genes
    strength: tuple[float, ...]


def choose_genes(counts: scipy.sparse.csr_matrix) -> np.ndarray:
    """Of the genes that at least 5 cells express, the 2,000 of largest variance of log1p(10⁴ · count / total), ascending.

    `counts`: [training cells, genes], both halves together.
    """
    expressed = np.flatnonzero(np.bincount(counts.indices, minlength=counts.shape[1]) >= EXPRESSED_IN)
    return expressed[baselines.variable_genes(baselines.log_normalise(counts)[:, expressed])]


def exposures(totals: np.ndarray, train: np.ndarray) -> np.ndarray:
    """What half B's total is expected to be, float64 [cells], given half A's (`totals`, [cells]).

    The totals' mean over training cells plus the part b of the distance to it that is not Poisson noise, b = 1 − mean /
    variance: the best linear estimate of the rate (Bühlmann, "Experience rating and credibility", 1967). It is above 0 for
    any total.
    """
    totals = totals.astype(np.float64)
    mean = totals[train].mean()
    variance = totals[train].var()
    signal = 1 - mean / variance if variance > mean else 0.0
    return mean + signal * (totals - mean)


def shares_of(train: Part) -> np.ndarray:
    """Each gene's share of the exposure, float64 [genes]; of a gene without counts as if it had been counted once."""
    return np.maximum(np.asarray(train.counts.sum(axis=0)).ravel(), 1) / train.exposure.sum()


def deviance(counts: scipy.sparse.csr_matrix, means: np.ndarray) -> np.ndarray:
    """Poisson deviance of each cell, mean over genes, float64 [cells]: 2 · mean of y ln(y / μ) − y + μ, where 0 ln 0 = 0.

    The saturated model, μ = y, has deviance 0 (McCullagh, Nelder, Generalized Linear Models, 2.3).

    Parameters
    ----------
    counts
        y, [cells, genes].
    means
        μ > 0, float [cells, genes].
    """
    counts = counts.tocoo()
    y = counts.data.astype(np.float64)
    at_counts = y * (np.log(y) - np.log(means[counts.row, counts.col])) - y
    summed = np.bincount(counts.row, at_counts, len(means)) + means.sum(axis=1, dtype=np.float64)
    return 2 * summed / means.shape[1]


def gene_mean(fold: Fold) -> Choice:
    """Every cell has the training cells' shares."""
    return Choice(_deviances(fold.test, lambda rows: np.outer(fold.test.exposure[rows], fold.shares)), ())


def smoothed_half(fold: Fold, halves: tuple[scipy.sparse.csr_matrix, scipy.sparse.csr_matrix], totals: tuple) -> Choice:
    """Half A's own shares, with pseudo-counts of the gene mean.

    `halves`, `totals`: counts [cells, chosen genes] of half A of validation and test cells, and their totals over all genes.
    """
    def scored(part: Part, half: scipy.sparse.csr_matrix, total: np.ndarray, pseudo: float) -> np.ndarray:
        def means(rows: slice) -> np.ndarray:
            shares = (half[rows].toarray() + pseudo * fold.shares) / (total[rows, None] + pseudo)
            return shares * part.exposure[rows, None]

        return _deviances(part, means)

    tried = {(pseudo,): scored(fold.validation, halves[0], totals[0], pseudo).mean() for pseudo in PSEUDO_COUNTS}
    best = min(tried, key=tried.get)
    return Choice(scored(fold.test, halves[1], totals[1], *best), best)


def nearest_cells(fold: Fold, train: np.ndarray, validation: np.ndarray, test: np.ndarray) -> Choice:
    """The shares of the nearest training cells (Euclidean) with some of the gene mean.

    `train`, `validation`, `test`: features, float [cells, D].
    """
    most = min(max(NEIGHBOURS), len(train))
    search = NearestNeighbors(n_neighbors=most, algorithm="brute").fit(train)

    def shares(places: np.ndarray, rows: slice, k: int) -> np.ndarray:
        near = places[rows, :k]
        pairs = np.repeat(np.arange(len(near)), k), near.ravel()
        chosen = scipy.sparse.csr_matrix((np.ones(near.size), pairs), (len(near), len(train)))
        return (chosen @ fold.train.counts).toarray() / (chosen @ fold.train.exposure)[:, None]

    def scored(part: Part, places: np.ndarray, k: int, weights: tuple[float, ...]) -> list[np.ndarray]:
        found = [[] for _ in weights]
        for rows in _rows(len(places)):
            near = shares(places, rows, k)
            for deviances, weight in zip(found, weights, strict=True):
                means = part.exposure[rows, None] * ((1 - weight) * near + weight * fold.shares)
                deviances.append(deviance(part.counts[rows], means))
        return [np.concatenate(deviances) for deviances in found]

    places = search.kneighbors(validation, return_distance=False)
    tried = {
        (k, weight): deviances.mean()
        for k in sorted({min(k, most) for k in NEIGHBOURS})
        for weight, deviances in zip(MEAN_SHARES, scored(fold.validation, places, k, MEAN_SHARES), strict=True)
    }
    k, weight = best = min(tried, key=tried.get)
    return Choice(scored(fold.test, search.kneighbors(test, return_distance=False), k, (weight,))[0], best)


def log_linear(fold: Fold, train: np.ndarray, validation: np.ndarray, test: np.ndarray) -> Choice:
    """Shares log-linear in the features: Poisson regression with an L2 penalty, the same for every gene and direction.

    Features are centred and divided by one number, so that a rotation of them changes nothing. Penalties are tried from the
    largest on, each starting at the solution of the one before; a rise of the validation deviance ends the search.

    Parameters
    ----------
    train, validation, test
        Features, float [cells, D].
    """
    centre = fold.train.exposure @ train / fold.train.exposure.sum()
    train = train - centre
    scale = np.sqrt(np.square(train).mean()) or 1.0
    train, validation, test = train / scale, (validation - centre) / scale, (test - centre) / scale
    best, least = None, np.inf
    for penalty, fit in zip(PENALTIES, _fits(fold, train), strict=True):
        reached = fit.deviances(fold.validation, validation).mean()
        if reached >= least:
            break
        best, least = (penalty, fit), reached
    penalty, fit = best
    return Choice(fit.deviances(fold.test, test), (penalty,))


class _Fit(NamedTuple):
    """A log-linear law of the mean counts."""

    coefficients: np.ndarray  # float64 [D, genes]
    base: np.ndarray  # float64 [genes], shares where all features are 0
    low: np.ndarray  # float64 [genes], the smallest sum of coefficients × features of a training cell
    high: np.ndarray  # and the largest: beyond them nothing is known

    def deviances(self, part: Part, features: np.ndarray) -> np.ndarray:
        def means(rows: slice) -> np.ndarray:
            rates = np.exp(np.clip(features[rows] @ self.coefficients, self.low, self.high))
            return rates * self.base * part.exposure[rows, None]

        return _deviances(part, means)


def _fits(fold: Fold, features: np.ndarray) -> Iterator[_Fit]:
    """The fit of each penalty.

    Minimises Σ (μ − y ln μ) + penalty / 2 · Σ coefficient² by L-BFGS in coordinates in which its curvature at the gene mean
    is 1: the eigenvectors of the features' covariance, scaled for each gene.
    """
    variances, vectors = np.linalg.eigh(features.T @ (features * fold.train.exposure[:, None]))
    turned = (features @ vectors).astype(np.float32)
    counted = (fold.train.counts.T @ turned).T.astype(np.float64)  # all that is needed of the counts, with their sums
    totals = fold.shares * fold.train.exposure.sum()
    found, intercepts = np.zeros(counted.shape), np.zeros(len(totals))
    shape = (len(found) + 1, len(totals))
    for penalty in PENALTIES:
        unit = np.vstack([1 / np.sqrt(np.maximum(variances, 0)[:, None] * fold.shares + penalty), 1 / np.sqrt(totals)[None]])

        def loss(point: np.ndarray, unit: np.ndarray = unit, penalty: float = penalty) -> tuple[float, np.ndarray]:
            fit = point.reshape(shape) * unit
            value = penalty / 2 * np.square(fit[:-1]).sum() - (counted * fit[:-1]).sum() - totals @ fit[-1]
            slope = np.vstack([penalty * fit[:-1] - counted, -totals[None]])
            fit = fit.astype(np.float32)
            for rows in _rows(len(turned)):
                means = np.exp(np.minimum(turned[rows] @ fit[:-1] + fit[-1], _LARGEST))
                means *= np.outer(fold.train.exposure[rows], fold.shares).astype(np.float32)
                value += means.sum(dtype=np.float64)
                slope[:-1] += turned[rows].T @ means
                slope[-1] += means.sum(axis=0)
            return value, (slope * unit).ravel()

        start = (np.vstack([found, intercepts]) / unit).ravel()
        reached = minimize(loss, start, jac=True, method="L-BFGS-B",
                           options={"maxiter": _ITERATIONS, "ftol": _TOLERANCE, "maxcor": 6})
        fit = reached.x.reshape(shape) * unit
        found, intercepts = fit[:-1], fit[-1]
        ranges = [((logs := turned[rows] @ found).min(axis=0), logs.max(axis=0)) for rows in _rows(len(turned))]
        low, high = np.min([low for low, _ in ranges], axis=0), np.max([high for _, high in ranges], axis=0)
        yield _Fit(vectors @ found, fold.shares * np.exp(intercepts), low, high)


def _deviances(part: Part, means: Callable[[slice], np.ndarray]) -> np.ndarray:
    """The deviance of each cell, by chunks of them: `means` gives the mean counts of some."""
    return np.concatenate([deviance(part.counts[rows], means(rows)) for rows in _rows(len(part.exposure))])


def _rows(cells: int) -> Iterator[slice]:
    return (slice(start, min(start + _CHUNK, cells)) for start in range(0, cells, _CHUNK))
