"""What masked genes can be predicted with, without a model: three baselines fitted on the training split.

gene mean                 mean log1p count of the gene over the cells that express it
gene mean + cell offset   plus the mean residual of the cell's visible genes
truncated Poisson         a count is Poisson with rate depth × share, given that it is at least 1: the depth of a cell fitted
                          to its visible genes, the share of a gene being its part of all training counts
"""

from collections.abc import Callable
from typing import NamedTuple

import numpy as np

from scbench.data.extents import SplitReader
from scbench.data.sampler import Sampled
from scbench.evaluation.masked.genes import MaskedGenes, genes_of, stored_cells

GENE_MEAN, CELL_OFFSET, POISSON = "gene mean", "gene mean + cell offset", "truncated Poisson"
_CHUNK_CELLS = 4096
_SUMMED_RATE, _LAST_COUNT = 100.0, 250  # a Poisson count of rate 100 passes 250 with probability 10⁻³⁵
_LEAST_RATE = 1e-10  # stands for 0: the expectation is ln 2 to that precision


class TrainingGenes(NamedTuple):
    """What the baselines know of the training cells."""

    means: np.ndarray  # float64 [vocabulary], mean log1p count where expressed; a gene never seen: that of all genes
    shares: np.ndarray  # float64 [vocabulary], part of all counts; a gene never seen: as if it had been counted once
    depth: float  # mean counts of a cell

    @classmethod
    def fit(
        cls, split: SplitReader, vocabulary_size: int, advance: Callable[[int], None] = lambda cells: None
    ) -> "TrainingGenes":
        """One pass over the split's cells, an extent at a time; `advance` is told how many are done since the last call."""
        seen, logs, counts = np.zeros(vocabulary_size), np.zeros(vocabulary_size), np.zeros(vocabulary_size)
        for numbers, cells in stored_cells(split, _CHUNK_CELLS):
            for sums, values in [(seen, None), (logs, np.log1p(cells.counts, dtype=np.float64)), (counts, cells.counts)]:
                sums += np.bincount(cells.genes, weights=values, minlength=vocabulary_size)
            advance(len(numbers))
        overall = logs.sum() / max(seen.sum(), 1)
        means = np.where(seen > 0, logs / np.maximum(seen, 1), overall)
        total = max(counts.sum(), 1)
        return cls(means, np.maximum(counts, 1) / total, total / max(split.n_cells, 1))

    def predict(self, sampled: Sampled) -> dict[str, np.ndarray]:
        """Log1p counts of the masked genes, float64 [M], by each baseline."""
        hidden, visible = genes_of(sampled, sampled.masked), genes_of(sampled, ~sampled.masked)
        n_cells = len(sampled.library_sizes)
        residuals = np.log1p(visible.counts, dtype=np.float64) - self.means[visible.genes]
        offsets = _mean_by_cell(residuals, visible.cells, n_cells)
        depths = fit_depths(visible, self.shares, n_cells, self.depth)
        return {
            GENE_MEAN: self.means[hidden.genes],
            CELL_OFFSET: self.means[hidden.genes] + offsets[hidden.cells],
            POISSON: expected_log1p(depths[hidden.cells] * self.shares[hidden.genes]),
        }


def _mean_by_cell(values: np.ndarray, cells: np.ndarray, n_cells: int) -> np.ndarray:
    """The mean of each cell's values, float64 [n_cells]; 0 where it has none."""
    return np.bincount(cells, values, n_cells) / np.maximum(np.bincount(cells, minlength=n_cells), 1)


def fit_depths(visible: MaskedGenes, shares: np.ndarray, n_cells: int, default: float) -> np.ndarray:
    """The depth of each cell that makes its visible counts most likely, float64 [n_cells]; `default` without any.

    The likelihood of zero-truncated Poisson counts is largest where their expected sum equals their sum:
    Σ m(depth · share) = Σ count with m(λ) = λ / (1 − e^−λ). The left side is convex and rises with depth from the number of
    genes, and m(λ) ≥ λ: Newton's method from depth = Σ count / Σ share falls to the solution without passing it. (It is 0 if
    all counts are 1.)
    """
    shares = shares[visible.genes]

    def sums(values: np.ndarray) -> np.ndarray:
        return np.bincount(visible.cells, values, n_cells)

    counted, share_sums = sums(visible.counts), sums(shares)
    filled = share_sums > 0
    depths = largest = np.divide(counted, share_sums, out=np.full(n_cells, default), where=filled)
    for _ in range(100):  # it takes about ten
        rates = np.maximum(depths[visible.cells] * shares, _LEAST_RATE)
        above_zero = -np.expm1(-rates)
        means = rates / above_zero
        slopes = means * (1 / rates - (1 - above_zero) / above_zero) * shares
        step = np.divide(sums(means) - counted, sums(slopes), out=np.zeros(n_cells), where=filled)
        depths = np.maximum(depths - step, 0)
        if np.all(np.abs(step) <= 1e-9 * largest):
            break
    return depths


def expected_log1p(rates: np.ndarray) -> np.ndarray:
    """E[ln(1 + X) | X ≥ 1] for X ~ Poisson(rate), float64 of the shape of `rates`; error below 1e-6.

    Up to rate 100 the sum over X = 1 … 250; above, a zero has probability e⁻¹⁰⁰, and the expectation of the Taylor
    series of ln(1 + X) about the rate is taken up to the sixth central moment.
    """
    low = np.clip(rates, _LEAST_RATE, _SUMMED_RATE)
    probability = low / np.expm1(low)  # of X = 1
    summed = np.zeros(np.shape(rates))
    for count in range(1, _LAST_COUNT + 1):
        summed += probability * np.log1p(count)
        probability *= low / (count + 1)
    high = np.maximum(rates, _SUMMED_RATE)
    moments = [high, high, high + 3 * high**2, high + 10 * high**2, high + 25 * high**2 + 15 * high**3]  # 2nd … 6th central
    series = np.log1p(high)
    for power, moment in enumerate(moments, start=2):
        series -= (-1) ** power * moment / (power * (1 + high) ** power)
    return np.where(rates <= _SUMMED_RATE, summed, series)
