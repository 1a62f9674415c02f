"""The value that stands for "masked", −1, is no value of an unmasked gene; which genes are masked is never read off values."""

import numpy as np
import pytest

from scbench.config import InputLaw
from scbench.data.batch import MASKED_VALUE, CellBatch
from scbench.data.cells import CellTokens
from scbench.data.sampler import CellSampler
from scbench.data.values import reference_bins
from scbench.data.vocabulary import Vocabulary

VOCABULARY = Vocabulary.build(f"g{i:03}" for i in range(200))


@pytest.mark.parametrize("law", [InputLaw(60), InputLaw(60, normalize="total"), InputLaw(60, "bin"),
                                 InputLaw(60, "bin_aaai2025", pad_to=60)])
def test_only_masked_genes_have_the_value_of_masked_ones(law):
    rng = np.random.default_rng(0)
    lengths = np.array([200, 60, 7, 1, 0] * 8)
    genes = np.concatenate([np.sort(rng.choice(200, n, replace=False)) for n in lengths])
    counts = rng.geometric(0.6, len(genes)).astype(np.uint32)
    cells = CellTokens(genes.astype(np.uint32), counts, np.concatenate([[0], np.cumsum(lengths)]), np.zeros(40, np.int64))
    sampler = CellSampler(VOCABULARY, law, seed=0, mask_ratio=0.4, weighted_share=0.5)
    batch = sampler.pack(sampler.draw(cells, np.arange(40)), np.arange(40), np.arange(40), np.arange(40))
    assert np.flatnonzero(batch.values.numpy() == MASKED_VALUE).tolist() == batch.masked.tolist()
    assert (batch.targets >= 0).all()


def test_the_smallest_random_word_of_a_tie_gives_no_bin_under_zero():
    """The reference's bin of a tied value is −1 there, which its models take for a masked gene."""
    values = np.log1p([1.0] * 30 + [4.0])
    for word in (0, 1, 2**64 - 1):
        bins = reference_bins(values, np.array([0, 31]), np.full(31, word, dtype=np.uint64), pad_to=31)
        assert bins.min() >= 0 and bins.max() <= 49


def test_masks_are_positions_and_not_values():
    batch = CellBatch.from_lists([[3, 4, 5]], [[-1.0, 2.0, -1.0]], [[False, True, False]])
    assert batch.masked.tolist() == [2]
    assert batch.values.tolist() == [0.0, -1.0, -1.0, -1.0]
    assert batch.targets.tolist() == [2.0]
