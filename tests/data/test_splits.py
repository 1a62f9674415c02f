"""Splits by cell and by group."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from scbench.data.splits import split_cells, split_groups
from scbench.errors import UserError


@given(st.integers(0, 300), st.integers(0, 2**32), st.sampled_from([(0.9, 0.05, 0.05), (0.8, 0.2, 0.0), (1.0, 0.0, 0.0)]))
def test_cells_get_exact_shares_whatever_their_order(n, seed, shares):
    rng = np.random.default_rng(seed)
    hashes = rng.integers(0, 2**64, n, dtype=np.uint64)
    split = split_cells(hashes, shares, seed)
    sizes = np.bincount(split, minlength=3)
    assert sizes.sum() == n
    for size, share in zip(sizes, shares, strict=True):
        assert abs(size - share * n) <= 2  # rounding, and one cell for a split that would be empty
        assert share > 0 or size == 0
    if n >= 3:
        assert all(size > 0 for size, share in zip(sizes, shares, strict=True) if share > 0)
    shuffle = rng.permutation(n)
    assert np.array_equal(split_cells(hashes[shuffle], shares, seed), split[shuffle])


def test_twenty_cells_split_18_1_1_and_the_seed_decides_which():
    hashes = np.arange(20, dtype=np.uint64)
    splits = [split_cells(hashes, (0.9, 0.05, 0.05), seed) for seed in range(20)]
    assert all(np.bincount(split).tolist() == [18, 1, 1] for split in splits)
    assert len({split.tobytes() for split in splits}) > 10


def test_equal_contents_stay_together():
    hashes = np.repeat(np.arange(50, dtype=np.uint64), 3)
    split = split_cells(hashes, (0.5, 0.3, 0.2), 1).reshape(50, 3)
    assert (split == split[:, :1]).all()
    assert np.bincount(split[:, 0]).tolist() == [25, 15, 10]


def test_groups_follow_the_shares_and_not_their_order():
    sizes = {(f"donor{i}",): 100 for i in range(40)}
    split = split_groups(sizes, (0.8, 0.1, 0.1), 3)
    assert np.bincount(list(split.values())).tolist() == [32, 4, 4]
    assert split == split_groups(dict(reversed(sizes.items())), (0.8, 0.1, 0.1), 3)
    assert split != split_groups(sizes, (0.8, 0.1, 0.1), 4)


@pytest.mark.parametrize("seed", range(10))
def test_three_groups_of_any_size_fill_three_splits(seed):
    split = split_groups({("a",): 1, ("b",): 10_000, ("c",): 3}, (0.98, 0.01, 0.01), seed)
    assert sorted(split.values()) == [0, 1, 2]


def test_too_few_groups():
    with pytest.raises(UserError, match=r"--split-by gives 2 groups for 3 splits"):
        split_groups({("a",): 5, ("b",): 5}, (0.9, 0.05, 0.05), 0)
    assert set(split_groups({("a",): 5, ("b",): 5}, (0.9, 0.1, 0.0), 0).values()) == {0, 1}
