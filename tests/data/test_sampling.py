"""The law of gene sampling against exact probabilities, the mask's law, and that neither depends on the batch."""

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from scbench.data.sampling import draw_genes, draw_mask
from scbench.kernels import random
from scbench.kernels.random import Stream


def pack(cells):
    """genes, counts, offsets of cells given as (genes, counts)."""
    genes = np.concatenate([np.zeros(0, np.uint16), *(np.asarray(g, np.uint16) for g, _ in cells)])
    counts = np.concatenate([np.zeros(0, np.uint32), *(np.asarray(c, np.uint32) for _, c in cells)])
    return genes, counts, np.concatenate([[0], np.cumsum([len(g) for g, _ in cells], dtype=np.int64)])


def random_cells(lengths, seed=0, vocabulary=60_000):
    rng = np.random.default_rng(seed)
    return [(np.sort(rng.choice(vocabulary, n, replace=False)), rng.geometric(0.4, n)) for n in lengths]


def kept_genes(cells, samples, **options) -> list[list[int]]:
    genes, counts, offsets = pack(cells)
    positions, starts = draw_genes(genes, counts, offsets, samples, **options)
    return [genes[positions[a:b]].tolist() for a, b in itertools.pairwise(starts)]


def oracle(genes, counts, sample, *, seed, max_genes, weighted_share) -> list[int]:
    """One cell, one gene at a time."""
    if len(genes) <= max_genes:
        return [int(g) for g in genes]
    clocks = {}
    by_weight = weighted_share and random.key(seed, Stream.SUBSET_LAW, sample) >> 32 < 2**31
    for gene, count in zip(genes, counts, strict=True):
        word = random.key(seed, Stream.SUBSET, sample, int(gene))
        if by_weight:
            weight = np.log1p(float(count)) - np.log1p(float(min(counts))) + 1e-5
            clocks[int(gene)] = -np.log(((word >> 12) + 0.5) / 2**52) / weight
        else:
            clocks[int(gene)] = word
    return sorted(sorted(clocks, key=clocks.get)[:max_genes])


@settings(max_examples=80, deadline=None)
@given(
    st.lists(st.integers(0, 40), min_size=1, max_size=12),
    st.integers(1, 30),
    st.sampled_from([0.0, 0.5]),
    st.integers(-(2**70), 2**70),
    st.integers(0, 2**62),
)
def test_equals_the_slow_oracle(lengths, max_genes, weighted_share, seed, first):
    cells = random_cells(lengths, seed=first % 1000)
    samples = np.arange(first, first + len(cells))
    options = {"seed": seed, "max_genes": max_genes, "weighted_share": weighted_share}
    expected = [oracle(g, c, int(p), **options) for (g, c), p in zip(cells, samples, strict=True)]
    assert kept_genes(cells, samples, **options) == expected


@pytest.mark.parametrize("weighted_share", [0.0, 0.5])
def test_a_cell_is_drawn_alike_in_any_company(weighted_share):
    """More genes than one block of work holds, long and short cells mixed; alone, in halves, reversed."""
    cells = random_cells([1500, 3, 2000, 0, 512, 513] * 8)
    samples = np.arange(100, 148)
    options = {"seed": 4, "max_genes": 512, "weighted_share": weighted_share}
    together = kept_genes(cells, samples, **options)
    assert [len(kept) for kept in together] == [512, 3, 512, 0, 512, 512] * 8
    assert together == [kept_genes([cell], samples[i : i + 1], **options)[0] for i, cell in enumerate(cells)]
    assert together == kept_genes(cells[:11], samples[:11], **options) + kept_genes(cells[11:], samples[11:], **options)
    assert together[::-1] == kept_genes(cells[::-1], samples[::-1], **options)


def test_short_cells_keep_all_and_positions_ascend():
    genes, counts, offsets = pack(random_cells([5, 6, 7, 0, 1]))
    positions, starts = draw_genes(genes, counts, offsets, np.arange(5), seed=0, max_genes=6, weighted_share=0.5)
    assert positions.dtype == starts.dtype == np.int64
    assert starts.tolist() == [0, 5, 11, 17, 17, 18]
    assert (np.diff(positions) > 0).all()
    assert positions[:11].tolist() == list(range(11))


def test_no_cells_and_empty_cells():
    none = draw_genes(*pack([]), np.zeros(0, np.int64), seed=0, max_genes=3, weighted_share=0.5)
    assert none[0].shape == (0,) and none[1].tolist() == [0]
    empty = draw_genes(*pack([([], []), ([], [])]), np.arange(2), seed=0, max_genes=3, weighted_share=0.5)
    assert empty[0].shape == (0,) and empty[1].tolist() == [0, 0, 0]
    assert draw_mask(np.zeros(0, np.uint16), np.zeros(3, np.int64), np.arange(2), seed=0, ratio=0.5).shape == (0,)


def test_equal_clocks_keep_the_first():
    """Equal words can't come from distinct genes in practice; equal genes force them."""
    genes, counts, offsets = pack([([7] * 5, [1] * 5)])
    for sample in range(4):
        positions, _ = draw_genes(genes, counts, offsets, np.array([sample]), seed=0, max_genes=2, weighted_share=0.5)
        assert positions.tolist() == [0, 1]


def test_content_hashes_are_keys_too():
    cells = random_cells([40, 40])
    hashes = np.array([2**63 + 11, 5], dtype=np.uint64)
    options = {"seed": 0, "max_genes": 7, "weighted_share": 0.0}
    assert kept_genes(cells, hashes, **options) == [
        oracle(g, c, int(h), **options) for (g, c), h in zip(cells, hashes, strict=True)
    ]


# --- the law -------------------------------------------------------------------------------------------------------


def subset_probabilities(weights: np.ndarray, number: int) -> dict[tuple[int, ...], float]:
    """Exact probability of each subset under successive draws without replacement, over all orders of drawing."""
    out = {}
    for order in itertools.permutations(range(len(weights)), number):
        left, probability = weights.sum(), 1.0
        for i in order:
            probability *= weights[i] / left
            left -= weights[i]
        key = tuple(sorted(order))
        out[key] = out.get(key, 0.0) + probability
    return out


LAW_CELLS = {
    "spread": [1, 2, 3, 5, 20],
    "one least": [1, 2, 2, 3, 3, 8],
    "many singletons": [1, 1, 1, 2, 4],
    "all equal": [3, 3, 3, 3],
    "huge": [1, 10, 4_000_000_000, 1000],
}


@pytest.mark.parametrize("weighted_share", [0.5, 0.0])
@pytest.mark.parametrize("max_genes", [1, 2, 3])
@pytest.mark.parametrize("name", LAW_CELLS)
def test_the_law_is_exact(name, max_genes, weighted_share):
    """Subset frequencies over 20,000 samples, the half-and-half mixture included, against enumerated probabilities."""
    counts = np.array(LAW_CELLS[name])
    n, trials = len(counts), 20_000
    values = np.log1p(counts.astype(float))
    by_weight = subset_probabilities(values - values.min() + 1e-5, max_genes)
    uniform = subset_probabilities(np.ones(n), max_genes)
    expected = {s: trials * ((by_weight[s] + uniform[s]) / 2 if weighted_share else uniform[s]) for s in uniform}

    genes = np.array([3, 40, 500, 6_000, 20_000, 60_000])[:n]
    positions, _ = draw_genes(
        np.tile(genes, trials), np.tile(counts, trials), np.arange(trials + 1) * n, np.arange(trials),
        seed=max_genes, max_genes=max_genes, weighted_share=weighted_share,
    )  # fmt: skip
    subsets, observed = np.unique((positions % n).reshape(trials, max_genes), axis=0, return_counts=True)
    observed = {tuple(int(i) for i in s): int(o) for s, o in zip(subsets, observed, strict=True)}
    statistic = sum((observed.get(s, 0) - e) ** 2 / e for s, e in expected.items())
    freedom = len(expected) - 1
    assert statistic < freedom + 5 * np.sqrt(2 * freedom) + 5


def test_half_of_the_long_cells_are_drawn_by_weight():
    """A gene of the least count is drawn only by the uniform law; the share of cells that show one is 1/2."""
    n = 20_000
    counts = np.tile([1, 50, 60], n)
    positions, _ = draw_genes(
        np.tile([5, 6, 7], n), counts, np.arange(n + 1) * 3, np.arange(n), seed=0, max_genes=2, weighted_share=0.5
    )
    shown = (positions % 3 == 0).sum() / n
    assert abs(shown - 0.5 * 2 / 3) < 5 * np.sqrt(0.25 / n)


def test_a_cell_is_drawn_anew_each_time():
    cells = random_cells([100]) * 50
    drawn = kept_genes(cells, np.arange(50), seed=0, max_genes=30, weighted_share=0.5)
    assert len({tuple(kept) for kept in drawn}) == 50


# --- the mask ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("ratio", [0.05, 0.4, 0.9])
def test_mask_rate_is_that_of_independent_draws(ratio):
    n, genes_each = 5_000, 20
    mask = draw_mask(
        np.tile(np.arange(genes_each) * 97, n), np.arange(n + 1) * genes_each, np.arange(n), seed=1, ratio=ratio
    ).reshape(n, genes_each)
    deviation = np.sqrt(ratio * (1 - ratio))
    assert abs(mask.mean() - ratio) < 5 * deviation / np.sqrt(mask.size)
    assert (abs(mask.mean(0) - ratio) < 5 * deviation / np.sqrt(n)).all()
    variance = mask.sum(1).var() / (genes_each * ratio * (1 - ratio))  # binomial: 1
    assert abs(variance - 1) < 5 * np.sqrt(2 / n) + 0.01
    correlation = np.corrcoef(mask.T) - np.eye(genes_each)
    assert abs(correlation).max() < 5 / np.sqrt(n)
    neighbours = np.corrcoef(mask[:-1].ravel(), mask[1:].ravel())[0, 1]
    assert abs(neighbours) < 5 / np.sqrt(mask.size)


def test_mask_is_independent_of_the_subset():
    """Whether a gene is masked has nothing to do with which other genes were drawn, or by which law."""
    n = 40_000
    genes, counts = np.array([10, 20, 30, 40]), np.array([1, 3, 5, 9])
    positions, starts = draw_genes(
        np.tile(genes, n), np.tile(counts, n), np.arange(n + 1) * 4, np.arange(n), seed=3, max_genes=2, weighted_share=0.5
    )
    kept = np.tile(genes, n)[positions]
    mask = draw_mask(kept, starts, np.arange(n), seed=3, ratio=0.4).reshape(n, 2)
    pairs = kept.reshape(n, 2)
    for a, b in itertools.combinations(genes, 2):
        chosen = mask[(pairs == [a, b]).all(1)]
        assert (abs(chosen.mean(0) - 0.4) < 5 * np.sqrt(0.24 / max(len(chosen), 1))).all()


def test_mask_of_a_gene_depends_on_seed_sample_and_gene_alone():
    genes, _, offsets = pack(random_cells([30, 0, 50, 1]))
    samples = np.array([9, 2**62, 3, 4])
    mask = draw_mask(genes, offsets, samples, seed=-5, ratio=0.4)
    assert mask.dtype == bool
    expected = [
        random.key(-5, Stream.MASK, int(sample), int(gene)) >> 32 < round(0.4 * 2**32)
        for sample, (a, b) in zip(samples, itertools.pairwise(offsets), strict=True)
        for gene in genes[a:b]
    ]
    assert mask.tolist() == expected


def test_everything_or_nothing_masked():
    genes, _, offsets = pack(random_cells([3, 1]))
    assert draw_mask(genes, offsets, np.arange(2), seed=0, ratio=1.0).all()
    assert not draw_mask(genes, offsets, np.arange(2), seed=0, ratio=0.0).any()
    single = [bool(draw_mask(np.array([5]), np.array([0, 1]), np.array([p]), seed=0, ratio=0.5)[0]) for p in range(40)]
    assert any(single) and not all(single)
