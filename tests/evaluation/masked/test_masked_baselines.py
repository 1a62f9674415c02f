"""The baselines of masked genes against loops, brute-force likelihoods and sums over SciPy's Poisson law."""

import numpy as np
import pytest
import scipy.optimize
import scipy.stats

from scbench.data.extents import Cells
from scbench.data.sampler import Sampled
from scbench.evaluation.masked.baselines import CELL_OFFSET, GENE_MEAN, POISSON, TrainingGenes, expected_log1p, fit_depths
from scbench.evaluation.masked.genes import MaskedGenes

GENES = 40


class Extents:
    """A split of dense count matrices, one an extent, that says what was read."""

    def __init__(self, *matrices: np.ndarray) -> None:
        self.matrices, self.read = matrices, []
        self.extent_sizes = np.array([len(matrix) for matrix in matrices])
        self.n_cells = int(self.extent_sizes.sum())

    def read_extent(self, extent: int) -> Cells:
        self.read.append(extent)
        matrix = self.matrices[extent]
        rows, genes = np.nonzero(matrix)
        offsets = np.concatenate([[0], np.cumsum((matrix > 0).sum(axis=1))])
        return Cells(genes.astype(np.uint16), matrix[rows, genes].astype(np.uint16), offsets)


def sampled_of(matrix: np.ndarray, hidden: np.ndarray, seed: int = 0) -> Sampled:
    """The expressed genes of dense cells, in random order in each; `hidden` bool of the same shape."""
    generator = np.random.default_rng(seed)
    genes = [generator.permutation(np.flatnonzero(row)) for row in matrix]
    offsets = np.concatenate([[0], np.cumsum([len(g) for g in genes])])
    cells = np.repeat(np.arange(len(matrix)), np.diff(offsets))
    flat = np.concatenate(genes)
    counts = matrix[cells, flat]
    return Sampled(flat, counts, np.log1p(counts), hidden[cells, flat], offsets, matrix.sum(axis=1))


def planted(n_cells: int, seed: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Poisson counts [cells, GENES] of depths and gene shares: (counts, depths, shares)."""
    generator = np.random.default_rng(seed)
    shares = generator.dirichlet(np.full(GENES, 0.5))
    depths = generator.uniform(20, 2000, n_cells)
    return generator.poisson(depths[:, None] * shares), depths, shares


def truncated_log_likelihood(depth: float, counts: np.ndarray, shares: np.ndarray) -> float:
    law = scipy.stats.poisson(depth * shares)
    return float((law.logpmf(counts) - np.log(law.sf(0))).sum())


def test_what_is_learned_of_the_training_cells_in_one_pass():
    counts, _, _ = planted(60, 1)
    counts[:, 7] = 0
    split = Extents(counts[:25], counts[25:26], counts[26:])
    done = []
    fitted = TrainingGenes.fit(split, GENES + 3, done.append)
    assert split.read == [0, 1, 2]
    assert sum(done) == 60
    for gene in range(GENES):
        expressed = counts[counts[:, gene] > 0, gene]
        mean = np.log1p(expressed).mean() if len(expressed) else np.log1p(counts[counts > 0]).mean()
        assert fitted.means[gene] == pytest.approx(mean)
        assert fitted.shares[gene] == pytest.approx(max(counts[:, gene].sum(), 1) / counts.sum())
    assert fitted.depth == pytest.approx(counts.sum(axis=1).mean())


def test_means_and_offsets_equal_loops_over_cells():
    counts, _, _ = planted(30, 2)
    fitted = TrainingGenes.fit(Extents(planted(50, 3)[0]), GENES)
    hidden = np.random.default_rng(4).random(counts.shape) < 0.4
    hidden[3] = True  # nothing of this cell is visible
    hidden[4] = False
    sampled = sampled_of(counts, hidden)
    predicted = fitted.predict(sampled)
    place = 0
    for cell in range(30):
        row = slice(sampled.offsets[cell], sampled.offsets[cell + 1])
        genes, values = sampled.genes[row], np.log1p(sampled.counts[row])
        visible = ~sampled.masked[row]
        offset = np.mean(values[visible] - fitted.means[genes[visible]]) if visible.any() else 0.0
        for gene in genes[~visible]:
            assert predicted[GENE_MEAN][place] == pytest.approx(fitted.means[gene])
            assert predicted[CELL_OFFSET][place] == pytest.approx(fitted.means[gene] + offset)
            place += 1
    assert place == len(predicted[GENE_MEAN]) == len(predicted[CELL_OFFSET]) == len(predicted[POISSON])


def test_depths_maximise_the_likelihood():
    counts, _, shares = planted(25, 5)
    shares = np.maximum(shares, 1e-6)
    visible = (counts > 0) & (np.random.default_rng(6).random(counts.shape) < 0.6)
    cells, genes = np.nonzero(visible)
    depths = fit_depths(MaskedGenes(genes, counts[cells, genes], cells), shares, 25, 1.0)
    for cell in range(25):
        mine = genes[cells == cell]
        best = scipy.optimize.minimize_scalar(
            lambda log_depth, n=counts[cell, mine], r=shares[mine]: -truncated_log_likelihood(np.exp(log_depth), n, r),
            bounds=(-5, 15), method="bounded", options={"xatol": 1e-10},
        )
        assert depths[cell] == pytest.approx(np.exp(best.x), rel=1e-5)
        grid = [truncated_log_likelihood(depths[cell] * f, counts[cell, mine], shares[mine]) for f in (0.9, 1, 1.1)]
        assert grid[1] == max(grid)


def test_depths_at_the_edges():
    shares = np.array([0.5, 0.4, 1e-9, 0.1])
    cells = np.array([0, 0, 1, 1, 3, 4])
    genes = np.array([0, 1, 0, 2, 2, 0])
    counts = np.array([1, 1, 40_000, 3, 7, 2])
    depths = fit_depths(MaskedGenes(genes, counts, cells), shares, 5, 123.0)
    assert depths[0] == pytest.approx(0, abs=1e-6)  # only ones: the likelihood rises towards depth 0
    assert depths[2] == 123.0  # nothing visible
    for cell in (1, 3, 4):  # the expected sum is the sum
        rates = depths[cell] * shares[genes[cells == cell]]
        assert (rates / -np.expm1(-rates)).sum() == pytest.approx(counts[cells == cell].sum(), rel=1e-8)


@pytest.mark.parametrize("rate", [1e-6, 0.01, 0.7, 3, 40, 99.9, 100.1, 400, 2e4])
def test_the_expected_logarithm_is_the_sum_over_the_law(rate):
    width = int(20 * np.sqrt(rate) + 60)
    counts = np.arange(max(1, int(rate) - width), int(rate) + width)
    law = scipy.stats.poisson(rate)
    expected = (law.pmf(counts) * np.log1p(counts)).sum() / law.sf(0)
    assert expected_log1p(np.array([rate]))[0] == pytest.approx(expected, abs=1e-6)


def test_a_rate_of_nothing_means_a_count_of_one():
    assert expected_log1p(np.array([0.0, 1e-14])) == pytest.approx(np.log(2), abs=1e-9)
    assert expected_log1p(np.zeros(0)).shape == (0,)


def test_poisson_cells_are_predicted_as_well_as_their_own_law_allows():
    train, _, _ = planted(800, 7)
    generator = np.random.default_rng(7)
    shares = generator.dirichlet(np.full(GENES, 0.5))  # those of planted(…, 7)
    depths = generator.uniform(20, 2000, 400)
    counts = np.random.default_rng(8).poisson(depths[:, None] * shares)
    sampled = sampled_of(counts, np.random.default_rng(9).random(counts.shape) < 0.4)
    predicted = TrainingGenes.fit(Extents(train), GENES).predict(sampled)
    cells = np.repeat(np.arange(400), np.diff(sampled.offsets))[sampled.masked]
    truth = np.log1p(sampled.counts[sampled.masked])
    errors = {name: np.mean((values - truth) ** 2) for name, values in predicted.items()}
    known = np.mean((expected_log1p(depths[cells] * shares[sampled.genes[sampled.masked]]) - truth) ** 2)
    assert known * 0.99 < errors[POISSON] < known * 1.15
    assert errors[POISSON] < errors[CELL_OFFSET] < errors[GENE_MEAN]
