"""The loader's windows against a slow oracle, for any ranks, micro-batches and resumption; odd cells and bad input."""

import pytest
import torch
from fake_split import CLS_TOKEN, OPTIONS, VOCABULARY, FakeSplit, cells_of, oracle_cell, regrouped, windows
from hypothesis import given, settings
from hypothesis import strategies as st

from scbench.config import InputLaw
from scbench.data.loader import Loader
from scbench.data.order import SampleOrder
from scbench.errors import UserError


def test_windows_equal_the_slow_oracle():
    split = FakeSplit(560, 64)
    order = SampleOrder(split.extent_sizes, 7, 3)
    law = {name: OPTIONS[name] for name in ("seed", "mask_ratio", "weighted_share")}
    for step, window in enumerate(windows(split, 30, micro_batch_cells=None)):  # into the second epoch
        samples, located = order.rank_slice(step, 24, 0, 1)
        numbers = split.starts[located.extents] + located.indices
        (batch,) = window
        assert cells_of(batch) == [
            oracle_cell(split, int(n), int(p), **law) for n, p in zip(numbers, samples, strict=True)
        ]


@pytest.mark.parametrize("world", [1, 2, 3, 4, 6, 8])
@pytest.mark.parametrize(("n_cells", "extent_cells"), [(1, 1), (63, 64), (64, 64), (65, 64), (560, 64), (2_160, 300)])
def test_batches_are_the_same_for_any_number_of_ranks(n_cells, extent_cells, world):
    split = FakeSplit(n_cells, extent_cells, (0, 25))
    steps = 6
    for batch_cells in (24, 13):
        (whole,) = zip(*windows(split, steps, batch_cells=batch_cells, micro_batch_cells=None), strict=True)
        shares = [
            windows(split, steps, batch_cells=batch_cells, micro_batch_cells=None, rank=rank, world=world)
            for rank in range(world)
        ]
        for step in range(steps):
            joined = [record for share in shares for batch in share[step] for record in cells_of(batch)]
            assert joined == cells_of(whole[step])


@settings(max_examples=25, deadline=None)
@given(st.integers(1, 6), st.integers(6, 40), st.one_of(st.none(), st.integers(1, 40)), st.integers(1, 9), st.integers(0, 99))
def test_batches_are_the_same_for_any_micro_batches(world, batch_cells, micro_batch_cells, lanes, seed):
    split = FakeSplit(300, 40)
    options = {"batch_cells": batch_cells, "lanes": lanes, "seed": seed}
    whole = windows(split, 3, **options | {"micro_batch_cells": None})
    shares = [
        windows(split, 3, **options, micro_batch_cells=micro_batch_cells, rank=rank, world=world) for rank in range(world)
    ]
    assert len({len(window) for share in shares for window in share}) == 1  # K
    for step in range(3):
        parts = [share[step] for share in shares]
        assert sorted(record for part in parts for record in regrouped(part)) == regrouped(whole[step])
        in_order = whole[step][0].samples.tolist()
        for part in parts:
            masked = sum(len(batch.masked) for batch in part)
            for batch in part:
                assert batch.n_cells > 0
                places = [in_order.index(p) for p in batch.samples.tolist()]
                assert places == sorted(places)
                assert batch.denominator.dtype == torch.float32 and batch.denominator.item() == masked


def test_micro_batches_hold_even_tokens():
    split = FakeSplit(560, 64, (0, 300))
    for window in windows(split, 5, batch_cells=64, micro_batch_cells=16, inputs=InputLaw(250)):
        tokens = [len(batch.genes) for batch in window]
        assert len(window) == 4 and max(tokens) - min(tokens) < 0.1 * sum(tokens) / 4
        assert max(batch.n_cells for batch in window) <= 16


@pytest.mark.parametrize(("n_cells", "extent_cells"), [(1, 1), (63, 64), (64, 64), (65, 64), (560, 64), (2_160, 300)])
def test_every_cell_once_an_epoch(n_cells, extent_cells):
    split = FakeSplit(n_cells, extent_cells, (0, 25))
    epochs, batch_cells = 3, 16
    steps = -(-epochs * n_cells // batch_cells)
    records = [record for window in windows(split, steps, batch_cells=batch_cells) for record in regrouped(window)]
    cell_of = {sample: cell for sample, cell, *_ in records}
    assert len(cell_of) == steps * batch_cells
    for epoch in range(epochs):
        assert sorted(cell_of[p] for p in range(epoch * n_cells, (epoch + 1) * n_cells)) == list(range(n_cells))


def test_every_cell_once_in_a_large_store():
    split = FakeSplit(100_000, 1_800, (0, 6))
    loaded = windows(split, 100, batch_cells=1_000, lanes=None, inputs=InputLaw(4), micro_batch_cells=None)
    cells = torch.cat([batch.cells for window in loaded for batch in window])
    assert torch.equal(cells.sort().values, torch.arange(100_000))
    assert sorted(split.reads) == list(range(56))  # 64 lanes: one group, read once


@pytest.mark.parametrize("start_step", [1, 2, 17, 23, 24, 60])
def test_resumes_at_any_step(start_step):
    split = FakeSplit(560, 64)
    uninterrupted = windows(split, start_step + 3)
    with Loader(split, VOCABULARY, **OPTIONS, start_step=start_step) as loader:
        assert loader.state() == {"step": start_step}
        for expected in uninterrupted[start_step:]:
            assert [cells_of(batch) for batch in next(loader)] == [cells_of(batch) for batch in expected]
        assert loader.state() == {"step": start_step + 3}  # what was handed out, not what was made ahead


def test_options_change_the_windows():
    split = FakeSplit(560, 64)
    base = [regrouped(window) for window in windows(split, 2)]
    assert [regrouped(window) for window in windows(split, 2)] == base
    changes = [{"seed": 8}, {"lanes": 2}, {"inputs": InputLaw(19)}, {"mask_ratio": 0.5}, {"weighted_share": 0.0}]
    for change in changes:
        assert [regrouped(window) for window in windows(split, 2, **change)] != base


def test_cells_of_one_gene_and_nothing_masked():
    split = FakeSplit(64, 64, (1, 1))
    loaded = [batch for window in windows(split, 8, batch_cells=2, micro_batch_cells=1) for batch in window]
    assert all(len(batch.genes) == 2 * batch.n_cells for batch in loaded)
    masked = [len(batch.masked) for batch in loaded]
    assert 0 in masked and 1 in masked
    bare = next(batch for batch in loaded if len(batch.masked) == 0)
    assert len(bare.query_genes) == len(bare.targets) == 0


def test_everything_masked_and_one_gene_shown():
    split = FakeSplit(64, 64, (5, 40))
    ((batch,),) = windows(split, 1, mask_ratio=1.0 - 1e-12, inputs=InputLaw(1), micro_batch_cells=None)
    assert len(batch.genes) == 48 and len(batch.masked) == 24 == batch.denominator.item()
    assert batch.max_tokens == 2


def test_empty_cells_pass_through():
    ((batch,),) = windows(FakeSplit(64, 64, (0, 0)), 1, micro_batch_cells=None)
    assert batch.genes.tolist() == [CLS_TOKEN] * 24 and batch.denominator.item() == 0


def test_bad_input():
    split = FakeSplit(64, 64)
    with pytest.raises(UserError, match="--batch-cells is 3, fewer than the 4 ranks"):
        Loader(split, VOCABULARY, **OPTIONS | {"batch_cells": 3}, world=4)
    with pytest.raises(UserError, match="no cells"):
        Loader(FakeSplit(0, 64), VOCABULARY, **OPTIONS)
