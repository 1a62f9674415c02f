"""From raw cells to batches: what a model's inputs may change, and what no model can."""

import itertools

import numpy as np
import pytest

from scbench.config import STRUCTURES, InputLaw, ModelConfig
from scbench.data.cells import CellTokens
from scbench.data.sampler import CellSampler, decode
from scbench.data.sampling import draw_genes
from scbench.data.values import log1p_counts, normalized_counts, quantile_bins
from scbench.data.vocabulary import Vocabulary
from scbench.kernels.random import Stream, bits, key

VOCABULARY = Vocabulary.build(f"g{i:03}" for i in range(200))
KEYS = np.array([5, 2**40, 7, 8])


@pytest.fixture
def cells() -> CellTokens:
    rng = np.random.default_rng(1)
    genes = [np.sort(rng.choice(200, n, replace=False)) for n in (90, 12, 0, 40)]
    offsets = np.concatenate([[0], np.cumsum([len(g) for g in genes])])
    counts = rng.geometric(0.3, offsets[-1]).astype(np.uint32)
    return CellTokens(np.concatenate(genes).astype(np.uint32), counts, offsets, np.zeros(4, np.int64))


def draw(cells, law: InputLaw, **options):
    return CellSampler(VOCABULARY, law, **{"seed": 3, "mask_ratio": 0.4, **options}).draw(cells, KEYS)


def shown(sampled) -> list[set]:
    """Per cell: gene, count and mask of all that is drawn, in no order."""
    triples = list(zip(sampled.genes.tolist(), sampled.counts.tolist(), sampled.masked.tolist(), strict=True))
    return [set(triples[a:b]) for a, b in itertools.pairwise(sampled.offsets)]


def test_all_models_see_the_same_genes_and_hide_the_same_ones(cells):
    expected = shown(draw(cells, InputLaw(30)))
    for structure, recipe, preprocess in itertools.product(STRUCTURES, ("default", "aaai2025"), ("log1p", "bin")):
        config = ModelConfig(vocabulary_size=VOCABULARY.size, structure=structure, recipe=recipe, preprocess=preprocess,
                             max_genes=30)
        assert shown(draw(cells, config.inputs)) == expected
    assert shown(draw(cells, InputLaw(30, normalize="total"))) == expected
    assert [len(cell) for cell in expected] == [30, 12, 0, 30]


def test_values_come_from_the_whole_cell(cells):
    kept, _ = draw_genes(cells.genes, cells.counts, cells.offsets, KEYS, seed=3, max_genes=30, weighted_share=0.0)
    totals = np.array([cells.counts[a:b].sum() for a, b in itertools.pairwise(cells.offsets)])
    log1p, total, bins = (draw(cells, InputLaw(30, *law)) for law in [(), ("log1p", "total"), ("bin",)])
    assert np.array_equal(log1p.values, log1p_counts(cells.counts[kept]))
    assert log1p.library_sizes.tolist() == totals.tolist()
    assert np.array_equal(total.values, normalized_counts(cells.counts[kept], np.repeat(totals, [30, 12, 0, 30])))
    assert np.array_equal(bins.values, quantile_bins(cells.counts, cells.offsets)[kept])


def test_a_random_order_is_a_function_of_the_cells_key(cells):
    sampled = draw(cells, InputLaw(30, order="random"))
    for number, (a, b) in enumerate(itertools.pairwise(sampled.offsets)):
        words = bits(bits(key(3, Stream.ORDER), KEYS[number]), sampled.genes[a:b])
        assert (np.diff(words.astype(object)) > 0).all()
    assert (np.diff(sampled.genes[:30].astype(int)) < 0).any(), "it is not the stored order"
    again = CellSampler(VOCABULARY, InputLaw(30, order="random"), seed=4).draw(cells, KEYS)
    assert not np.array_equal(again.genes[30:42], sampled.genes[30:42]), "another seed, another order"


def test_the_drawn_order_is_the_order_of_drawing(cells):
    sampled = CellSampler(VOCABULARY, InputLaw(80, order="drawn"), seed=0, weighted_share=1.0).draw(cells, KEYS)
    several = np.count_nonzero(cells.counts[:90] > 1)
    assert several < 80
    assert (sampled.counts[:several] > 1).all(), "the least count has weight 1e-5: it comes last"
    assert (sampled.counts[several:80] == 1).all()
    assert (np.diff(sampled.genes[:80].astype(int)) < 0).any()
    sampled = draw(cells, InputLaw(30, order="drawn"))
    assert np.array_equal(sampled.genes[30:42], cells.genes[90:102]), "short cells keep their order"


def test_batches_carry_what_heads_and_evaluation_need(cells):
    sampler = CellSampler(VOCABULARY, InputLaw(30, "bin"), seed=3, mask_ratio=0.4)
    sampled = sampler.draw(cells, KEYS)
    batch = sampler.pack(sampled, np.array([3, 0]), KEYS[[3, 0]], np.array([33, 30]))
    assert batch.lengths.tolist() == [31, 31]
    assert batch.library_sizes.tolist() == [float(cells.counts[102:].sum()), float(cells.counts[:90].sum())]
    hidden = np.concatenate([np.flatnonzero(sampled.masked[42:]) + 42, np.flatnonzero(sampled.masked[:30])])
    assert batch.target_counts.tolist() == sampled.counts[hidden].tolist()
    assert batch.targets.tolist() == sampled.values[hidden].tolist()


def test_the_references_batches_are_padded(cells):
    config = ModelConfig(vocabulary_size=VOCABULARY.size, recipe="aaai2025", max_genes=30)
    sampler = CellSampler(VOCABULARY, config.inputs, seed=3, mask_ratio=0.4)
    batch = sampler.pack(sampler.draw(cells, KEYS), np.arange(4), KEYS, np.arange(4))
    assert batch.cell_offsets.tolist() == [0, 31, 62, 93, 124]
    assert batch.lengths.tolist() == [31, 13, 1, 31]
    assert batch.max_tokens == 31
    genes = batch.genes.view(4, 31)
    assert (genes[:, 0] == VOCABULARY.cls).all()
    assert (genes[1, 13:] == VOCABULARY.pad).all()
    assert (genes[2, 1:] == VOCABULARY.pad).all()
    assert not batch.values.view(4, 31)[1, 13:].any()
    assert (genes.flatten()[batch.masked] < 200).all(), "only genes are masked"


@pytest.mark.parametrize("law", [("log1p", "none"), ("log1p", "total"), ("bin", "none")])
@pytest.mark.parametrize("order", ["ascending", "random"])
def test_a_perfect_prediction_decodes_to_the_true_counts(cells, law, order):
    inputs = InputLaw(90, *law, order=order)
    sampled = draw(cells, inputs)
    decoded = decode(sampled.values[sampled.masked], sampled, inputs)
    truth = np.log1p(sampled.counts[sampled.masked])
    if law[0] == "log1p":
        assert decoded == pytest.approx(truth, rel=1e-5)
    else:  # a bin may hold more than one count, or no visible gene: close, not equal
        assert np.abs(decoded - truth).mean() < 0.1
