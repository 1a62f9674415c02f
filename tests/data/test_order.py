"""SampleOrder: every cell once an epoch, as a slow oracle says, and the same batches for any number of ranks."""

import math
import tracemalloc
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from scbench.data.order import SampleOrder, default_lanes
from scbench.errors import UserError
from scbench.kernels import random
from scbench.kernels.random import Stream

STORES = [1, 63, 64, 65, 560, 2_160, 100_000]


def extents_of(n_cells: int, extent_cells: int) -> np.ndarray:
    """Extents as a store cuts them: equal but for a shorter last one."""
    full, rest = divmod(n_cells, extent_cells)
    return np.array([extent_cells] * full + [rest] * (rest > 0))


def oracle(sizes, seed: int, lanes: int, epoch: int) -> list[tuple[int, int, int]]:
    """One epoch by the definition, one sample at a time: (extent, index, lane)."""
    key = random.key(seed, Stream.EXTENT, epoch)
    groups = math.ceil(len(sizes) / min(lanes, len(sizes)))
    dealt = [[] for _ in range(groups)]
    for first in range(0, len(sizes), groups):  # of neighbours, each group gets one
        for group, place in enumerate(random.bits(key, np.arange(first, first + groups)).argsort()):
            if first + group < len(sizes):
                dealt[place].append(first + group)
    out = []
    for group in dealt:
        turns = []
        lane_words = random.bits(random.fold(key, 0), np.array(group))
        for lane, extent in enumerate(np.array(group)[np.argsort(lane_words)].tolist()):
            size = int(sizes[extent])
            cells = random.permutation(random.key(seed, Stream.CELL, epoch, extent), size)
            turns += [(Fraction(2 * turn + 1, 2 * size), lane, (extent, int(i), lane)) for turn, i in enumerate(cells)]
        out += [located for _, _, located in sorted(turns)]
    return out


def as_list(located) -> list[tuple[int, int, int]]:
    return list(zip(located.extents.tolist(), located.indices.tolist(), located.lanes.tolist(), strict=True))


@settings(max_examples=80, deadline=None)
@given(
    st.lists(st.integers(0, 9), min_size=1, max_size=9).filter(any),
    st.integers(1, 12),
    st.integers(-(2**70), 2**70),
    st.integers(0, 3),
)
def test_equals_the_definition(sizes, lanes, seed, epoch):
    n = sum(sizes)
    order = SampleOrder(np.array(sizes), seed, lanes)
    assert as_list(order.locate(epoch * n, (epoch + 1) * n)) == oracle(sizes, seed, lanes, epoch)


@pytest.mark.parametrize("lanes", [1, 3, 64])
@pytest.mark.parametrize("n_cells", STORES)
def test_every_cell_once_an_epoch(n_cells, lanes):
    extent_cells = {100_000: 1_800}.get(n_cells, 64)
    order = SampleOrder(extents_of(n_cells, extent_cells), 5, lanes)
    epochs = []
    for epoch in range(3):
        located = order.locate(epoch * n_cells, (epoch + 1) * n_cells)
        numbers = order.starts[located.extents] + located.indices
        assert np.array_equal(np.sort(numbers), np.arange(n_cells))
        epochs.append(numbers)
    if n_cells > 1:
        assert not np.array_equal(epochs[0], epochs[1]) and not np.array_equal(epochs[1], epochs[2])


@settings(max_examples=40, deadline=None)
@given(st.integers(1, 700), st.integers(1, 80), st.integers(1, 70), st.integers(0, 2**32), st.data())
def test_any_samples(n_cells, extent_cells, lanes, seed, data):
    order = SampleOrder(extents_of(n_cells, extent_cells), seed, lanes)
    everything = as_list(order.locate(0, 4 * n_cells))
    start = data.draw(st.integers(0, 4 * n_cells - 1))
    stop = data.draw(st.integers(start + 1, 4 * n_cells))
    assert as_list(order.locate(start, stop)) == everything[start:stop]


@pytest.mark.parametrize("world", [1, 2, 3, 4, 6, 8])
@pytest.mark.parametrize("n_cells", STORES)
def test_ranks_joined_are_the_one_rank_batch(n_cells, world):
    order = SampleOrder(extents_of(n_cells, 1_800 if n_cells == 100_000 else 64), 1, 7)
    for batch_cells in (8, 50, 128):
        for step in (0, 1, 2, n_cells // batch_cells, 10**6):  # the last ones lie across an epoch's end and far away
            samples, located = order.rank_slice(step, batch_cells, 0, 1)
            shares = [order.rank_slice(step, batch_cells, rank, world) for rank in range(world)]
            assert np.array_equal(np.concatenate([share[0] for share in shares]), samples)
            assert [cell for share in shares for cell in as_list(share[1])] == as_list(located)
            sizes = [len(share[0]) for share in shares]
            assert max(sizes) - min(sizes) <= 1
            assert np.array_equal(np.sort(samples), np.arange(step * batch_cells, (step + 1) * batch_cells))
            assert (np.diff(located.lanes) >= 0).all()
            assert (np.diff(samples)[np.diff(located.lanes) == 0] > 0).all()  # stable


@pytest.mark.parametrize("world", [2, 4, 8])
def test_a_rank_reads_its_share_of_the_extents(world):
    order = SampleOrder(np.full(64, 500), 0, 64)
    steps = 500 * 64 // 128
    for rank in range(world):
        read = set().union(*(order.rank_slice(s, 128, rank, world)[1].extents.tolist() for s in range(steps)))
        assert len(read) == 64 // world


def test_a_batch_mixes_all_lanes():
    order = SampleOrder(np.full(64, 500), 0, 64)
    _, located = order.rank_slice(3, 128, 0, 1)
    assert np.bincount(located.lanes).tolist() == [2] * 64
    assert len(np.unique(located.extents)) == 64


@pytest.mark.parametrize(("extents", "lanes"), [(640, 64), (1000, 64), (65, 64), (7, 3)])
def test_each_group_has_one_of_any_neighbours(extents, lanes):
    """So a group is like the whole store, whatever lies together there."""
    order = SampleOrder(np.full(extents, 2), 4, lanes)
    groups = math.ceil(extents / lanes)
    seen, sample = [], 0
    for _ in range(groups):
        group = order.group(sample)
        assert len(group.extents) in (extents // groups, -(-extents // groups))
        rows = group.extents // groups
        assert len(np.unique(rows)) == len(rows)
        seen += group.extents.tolist()
        sample = group.stop
    assert sorted(seen) == list(range(extents))


def test_every_batch_has_its_share_of_short_and_long_lanes():
    """Round-robin would leave the last of them to the longest lane."""
    sizes = np.array([100, 1600, 400])
    order = SampleOrder(sizes, 0, 3)
    extents = order.locate(0, 2100).extents.reshape(-1, 21)
    for extent, size in enumerate(sizes):
        assert set((extents == extent).sum(1).tolist()) <= {size // 100 - 1, size // 100, size // 100 + 1}


def test_groups_cover_the_samples():
    sizes = np.array([5, 3, 4, 2, 6, 1, 4])
    order = SampleOrder(sizes, 2, 3)
    sample = 0
    for _ in range(9):  # three epochs of three groups
        group = order.group(sample)
        assert group.start == sample
        assert group.stop - group.start == sizes[group.extents].sum()
        assert order.group(group.stop - 1).start == group.start
        located = order.locate(group.start, group.stop)
        assert np.array_equal(located.extents, group.extents[located.lanes])
        sample = group.stop
    assert sample == 3 * sizes.sum()


def test_seed_and_lanes_matter_and_more_lanes_than_extents_do_not():
    sizes = np.full(9, 30)
    base = as_list(SampleOrder(sizes, 0, 4).locate(0, 270))
    assert as_list(SampleOrder(sizes, 0, 4).locate(0, 270)) == base
    assert as_list(SampleOrder(sizes, 1, 4).locate(0, 270)) != base
    assert as_list(SampleOrder(sizes, 0, 2).locate(0, 270)) != base
    all_lanes = as_list(SampleOrder(sizes, 0, 9).locate(0, 270))
    assert as_list(SampleOrder(sizes, 0, 1000).locate(0, 270)) == all_lanes


def test_each_cell_is_as_likely_at_each_place():
    """Over seeds, 6 cells in 3 extents, one lane a group or three: each cell comes first in a sixth of the epochs."""
    for lanes in (1, 3):
        first = []
        for seed in range(3000):
            order = SampleOrder(np.array([2, 2, 2]), seed, lanes)
            located = order.locate(0, 1)
            first.append(int(order.starts[located.extents[0]] + located.indices[0]))
        counts = np.bincount(first, minlength=6)
        assert ((counts - 500) ** 2 / 500).sum() < 25.7  # χ², 5 degrees of freedom, p = 1e-4


def test_samples_far_away_and_memory():
    """10⁸ cells: no table of cells, at any epoch."""
    sizes = np.full(50_000, 2_000)
    tracemalloc.start()
    order = SampleOrder(sizes, 0, 64)
    located = order.locate(10**13, 10**13 + 128)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert len(np.unique(located.extents)) in (63, 64) and located.indices.max() < 2_000
    assert peak < 30e6


def test_empty_split_and_no_lanes():
    for sizes in (np.zeros(0, dtype=np.int64), np.array([0, 0])):
        with pytest.raises(UserError, match="no cells"):
            SampleOrder(sizes, 0, 1)
    with pytest.raises(UserError, match="--lanes"):
        SampleOrder(np.array([3]), 0, 0)


def test_default_lanes():
    assert [default_lanes(*pair) for pair in [(1000, 128), (3, 128), (1000, 8)]] == [64, 3, 8]
