"""The loader's windows against a slow oracle, for any ranks, micro-batches and resumption; reading, memory, closing."""

import dataclasses
import gc
import itertools
import threading
import time
import weakref
from types import SimpleNamespace

import numpy as np
import pyarrow as pa
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from scbench.config import InputLaw
from scbench.data.batch import CellBatch
from scbench.data.loader import WINDOWS_AHEAD, Loader, _AheadReader, validation_batches
from scbench.data.order import SampleOrder
from scbench.data.sampling import draw_genes, draw_mask
from scbench.data.shard_format import ShardInfo
from scbench.data.shard_writer import ShardWriter
from scbench.data.store import Split
from scbench.data.values import log1p_counts
from scbench.errors import UserError
from scbench.kernels import random
from scbench.kernels.random import Stream

CLS_TOKEN = 301
VOCABULARY = SimpleNamespace(cls=CLS_TOKEN, pad=300)
OPTIONS = {"seed": 7, "batch_cells": 24, "micro_batch_cells": 5, "inputs": InputLaw(20), "mask_ratio": 0.4,
           "weighted_share": 0.5, "lanes": 3}  # fmt: skip
VALIDATION = {"seed": 7, "inputs": InputLaw(20), "mask_ratio": 0.4, "max_cells": 100, "batch_cells": 16}


class Extent:
    def __init__(self, genes, counts, offsets):
        self.genes, self.counts, self.offsets = genes, counts, offsets


class FakeSplit:
    """Cells in memory behind the interface of a store's split; remembers what was read and what is still held."""

    def __init__(self, n_cells: int, extent_cells: int, genes: tuple[int, int] = (0, 40), delay: float = 0.0):
        full, rest = divmod(n_cells, extent_cells)
        self.extent_sizes = np.array([extent_cells] * full + [rest] * (rest > 0), dtype=np.int64)
        self.n_cells = n_cells
        rng = np.random.default_rng(n_cells)
        self.lengths = rng.integers(genes[0], genes[1] + 1, n_cells)
        self.offsets = np.concatenate([[0], np.cumsum(self.lengths)])
        some = [np.sort(rng.choice(300, n, replace=False)) for n in range(genes[1] + 1)]
        self.genes = np.concatenate([np.zeros(0, np.int64), *(some[n] for n in self.lengths)]).astype(np.uint16)
        self.counts = rng.geometric(0.4, len(self.genes)).astype(np.uint8)
        self.starts = np.concatenate([[0], np.cumsum(self.extent_sizes)])
        self.delay = delay
        self.reads: list[int] = []
        self.most_held = 0
        self._held: weakref.WeakSet = weakref.WeakSet()

    def cell(self, number: int) -> tuple[np.ndarray, np.ndarray]:
        row = slice(self.offsets[number], self.offsets[number + 1])
        return self.genes[row], self.counts[row]

    def read_extent(self, extent: int) -> Extent:
        time.sleep(self.delay)
        self.reads.append(extent)
        offsets = self.offsets[self.starts[extent] : self.starts[extent + 1] + 1]
        row = slice(offsets[0], offsets[-1])
        # wider counts in every other extent, as the shards of a store may have
        counts = self.counts[row].astype(np.uint16 if extent % 2 else np.uint8)
        arrays = Extent(self.genes[row].copy(), counts, offsets - offsets[0])
        self._held.add(arrays)
        self.most_held = max(self.most_held, len(self._held))
        return arrays


def windows(split, steps: int, **options) -> list[list[CellBatch]]:
    with Loader(split, VOCABULARY, **OPTIONS | options) as loader:
        return list(itertools.islice(loader, steps))


def cells_of(batch: CellBatch) -> list[tuple]:
    """A batch as one comparable record a cell."""
    hidden = np.zeros(len(batch.genes), dtype=bool)
    hidden[batch.masked.numpy()] = True
    true_values = batch.values.numpy().copy()
    true_values[batch.masked.numpy()] = batch.targets.numpy()
    return [
        (int(sample), int(cell), batch.genes[a:b].tolist(), true_values[a:b].tolist(), hidden[a:b].tolist())
        for sample, cell, (a, b) in zip(
            batch.samples, batch.cells, itertools.pairwise(batch.cell_offsets.tolist()), strict=True
        )
    ]


def regrouped(window: list[CellBatch]) -> list[tuple]:
    """The window's cells, whatever micro-batch they were in."""
    return sorted(record for batch in window for record in cells_of(batch))


def oracle_cell(split, number, key, *, seed, mask_ratio, weighted_share, max_genes=20) -> tuple:
    """One cell by itself."""
    genes, counts = split.cell(number)
    offsets, samples = np.array([0, len(genes)]), np.array([key])
    kept, offsets = draw_genes(genes, counts, offsets, samples, seed=seed, max_genes=max_genes, weighted_share=weighted_share)
    masked = draw_mask(genes[kept], offsets, samples, seed=seed, ratio=mask_ratio)
    return (
        key, number, [CLS_TOKEN, *genes[kept].tolist()], [0.0, *log1p_counts(counts[kept]).tolist()],
        [False, *masked.tolist()],
    )  # fmt: skip


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
    changes = [{"seed": 8}, {"lanes": 4}, {"inputs": InputLaw(19)}, {"mask_ratio": 0.5}, {"weighted_share": 0.0}]
    for change in changes:
        assert [regrouped(window) for window in windows(split, 2, **change)] != base


# --- edges ---------------------------------------------------------------------------------------------------------


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


# --- reading -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("world", [1, 2])
def test_extents_are_read_once_an_epoch_and_dropped(world):
    split = FakeSplit(2_000, 50)  # 40 extents in 10 groups of 4
    with Loader(split, VOCABULARY, **OPTIONS | {"lanes": 4, "batch_cells": 20}, rank=0, world=world) as loader:
        for _ in range(200):  # two epochs
            next(loader)
    assert split.most_held <= 2 * 4 / world
    reads = np.bincount(split.reads, minlength=40)
    assert reads.sum() <= (2 * 40 + 3 * 4) / world  # two epochs and the groups ahead


def test_one_group_stays_in_memory():
    split = FakeSplit(256, 64)
    windows(split, 60, lanes=64)
    assert sorted(split.reads) == [0, 1, 2, 3]


def test_the_next_group_is_read_while_one_is_used():
    split = FakeSplit(2_000, 50)
    order = SampleOrder(split.extent_sizes, 1, 4)
    reader = _AheadReader(split, order, 20, 0, 1)
    reads = []
    for step in range(40):
        before = len(split.reads)
        reader.window(step)
        reads.append(len(split.reads) - before)
        assert len(reader.cache.held) <= 8
    assert reads[0] == 5  # the first group, and one extent of the next
    assert max(reads[1:]) == 1 and sum(reads[:10]) == 8  # then little by little


@pytest.mark.parametrize(
    ("sizes", "lanes", "batch_cells"), [([1] * 30, 2, 16), ([3, 1, 7, 2, 5], 2, 9), ([40, 1, 1, 1], 3, 7)]
)
def test_batches_across_many_groups(sizes, lanes, batch_cells):
    split = FakeSplit(sum(sizes), 1)
    split.extent_sizes = np.array(sizes)
    split.starts = np.concatenate([[0], np.cumsum(sizes)])
    order = SampleOrder(split.extent_sizes, 7, lanes)
    for step, window in enumerate(windows(split, 12, lanes=lanes, batch_cells=batch_cells)):
        located = order.locate(np.arange(step * batch_cells, (step + 1) * batch_cells))
        numbers = split.starts[located.extents] + located.indices
        assert [record[1] for record in regrouped(window)] == numbers.tolist()


# --- the thread ----------------------------------------------------------------------------------------------------


def prefetch_threads() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name == "scbench-prefetch"]


def test_errors_of_reading_reach_the_consumer_as_they_are():
    split = FakeSplit(560, 64)
    error = UserError("shard 0, block 3 of the store is damaged: prepare it again.")
    read = split.read_extent

    def read_extent(extent):
        if len(split.reads) == 5:
            raise error
        return read(extent)

    split.read_extent = read_extent
    with Loader(split, VOCABULARY, **OPTIONS) as loader:
        good = 0
        with pytest.raises(UserError) as caught:
            for _ in loader:
                good += 1
        assert caught.value is error and good >= 1 and loader.state() == {"step": good}
        with pytest.raises(UserError):
            next(loader)
    assert not prefetch_threads()


def test_close_is_prompt_and_final():
    split = FakeSplit(560, 64)
    loader = Loader(split, VOCABULARY, **OPTIONS)
    next(loader)
    while not loader._windows._queue.full():  # then the thread waits for room
        time.sleep(0.01)
    assert len(prefetch_threads()) == 1
    start = time.perf_counter()
    loader.close()
    assert time.perf_counter() - start < 1
    assert not prefetch_threads()
    loader.close()
    with pytest.raises(RuntimeError, match="closed"):
        next(loader)


def test_a_forgotten_loader_stops_its_thread():
    loader = Loader(FakeSplit(560, 64), VOCABULARY, **OPTIONS)
    next(loader)
    del loader
    gc.collect()
    assert not prefetch_threads()


def test_works_ahead_and_counts_the_waiting():
    split = FakeSplit(2_000, 50, delay=0.02)
    with Loader(split, VOCABULARY, **OPTIONS) as loader:
        next(loader)
        assert loader.wait_seconds >= 0.06  # three extents
        while not loader._windows._queue.full():
            time.sleep(0.01)
        waited = loader.wait_seconds
        for _ in range(WINDOWS_AHEAD):
            next(loader)
        assert loader.wait_seconds - waited < 0.05


# --- validation ----------------------------------------------------------------------------------------------------


def validation(split, **options) -> list[CellBatch]:
    return list(validation_batches(split, VOCABULARY, **VALIDATION | options))


def test_validation_equals_the_slow_oracle():
    split = FakeSplit(300, 64)
    seed = random.key(7, Stream.VALIDATION)
    expected = [
        oracle_cell(split, n, n, seed=seed, max_genes=20, mask_ratio=0.4, weighted_share=0.0) for n in range(100)
    ]
    batches = validation(split)
    assert [record for batch in batches for record in cells_of(batch)] == expected
    assert max(batch.n_cells for batch in batches) <= 16
    assert all(batch.denominator.item() == len(batch.masked) for batch in batches)
    assert split.reads == [0, 1]


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 200), st.integers(1, 150), st.integers(1, 50), st.integers(1, 8))
def test_validation_is_the_same_for_any_ranks_and_batches(n_cells, max_cells, batch_cells, world):
    split = FakeSplit(n_cells, 17, (0, 25))
    expected = [record for batch in validation(split, max_cells=max_cells) for record in cells_of(batch)]
    assert [record[1] for record in expected] == list(range(min(n_cells, max_cells)))
    shares = [
        validation(split, max_cells=max_cells, batch_cells=batch_cells, rank=rank, world=world) for rank in range(world)
    ]
    assert len({len(share) for share in shares}) == 1  # ZeRO-3 gathers weights in every forward pass
    records = [record for share in shares for batch in share for record in cells_of(batch)]
    assert [record for record in records if record[1] >= 0] == expected
    placeholders = [batch for share in shares for batch in share if batch.cells.tolist() == [-1]]
    assert len(placeholders) == max(0, world - len(expected))
    assert all(len(batch.masked) == 0 and batch.genes.tolist() == [CLS_TOKEN] for batch in placeholders)
    if batch_cells > 1:
        assert all(batch.n_cells <= batch_cells for share in shares for batch in share)


def test_validation_differs_from_training_and_by_seed():
    split = FakeSplit(64, 64, (40, 40))
    base = validation(split)
    assert [cells_of(batch) for batch in validation(split)] == [cells_of(batch) for batch in base]
    assert cells_of(validation(split, seed=8)[0]) != cells_of(base[0])
    law = {name: OPTIONS[name] for name in ("seed", "mask_ratio")}
    assert cells_of(base[0])[0] != oracle_cell(split, 0, 0, weighted_share=0.0, **law)


def test_an_empty_validation_split_yields_nothing():
    assert validation(FakeSplit(0, 64), world=2) == []


# --- a split on the disk -------------------------------------------------------------------------------------------


def written(split: FakeSplit, directory, cells_of_shards: list[int], blocks_per_extent: int) -> Split:
    """The same cells as shards on the disk."""
    shards, first = [], 0
    for i, cells in enumerate(cells_of_shards):
        row = slice(split.offsets[first], split.offsets[first + cells])
        info = ShardInfo.plan(
            split="train", cells=cells, nnz=row.stop - row.start, largest_count=[255, 65_535][i % 2], vocabulary_size=302
        )
        info = dataclasses.replace(info, name=f"shard-{i:05d}", blocks_per_extent=blocks_per_extent)
        writer = ShardWriter(directory / info.name, info)
        writer.append(split.genes[row], split.counts[row], split.lengths[first : first + cells])
        writer.finish(pa.table({"n_genes": split.lengths[first : first + cells]}))
        shards.append(info)
        first += cells
    return Split(directory, "train", shards)


def test_windows_of_a_split_on_the_disk(tmp_path):
    cells = FakeSplit(700, 128, (1, 60))
    split = written(cells, tmp_path, [300, 400], blocks_per_extent=2)
    assert split.extent_sizes.tolist() == [128, 128, 44, 128, 128, 128, 16]
    order = SampleOrder(split.extent_sizes, 7, 3)
    starts = np.concatenate([[0], np.cumsum(split.extent_sizes)])
    law = {name: OPTIONS[name] for name in ("seed", "mask_ratio", "weighted_share")}
    shares = [windows(split, 35, rank=rank, world=2) for rank in range(2)]  # into the second epoch
    for step in range(35):
        samples = np.arange(step * 24, (step + 1) * 24)
        located = order.locate(samples)
        expected = [
            oracle_cell(cells, int(starts[extent] + index), int(sample), **law)
            for extent, index, sample in zip(located.extents, located.indices, samples, strict=True)
        ]
        assert sorted(record for share in shares for record in regrouped(share[step])) == expected
    assert [cells_of(batch) for batch in validation(split)] == [cells_of(batch) for batch in validation(cells)]


def test_damage_on_the_disk_reaches_the_consumer(tmp_path):
    split = written(FakeSplit(300, 64, (1, 60)), tmp_path, [300], blocks_per_extent=1)
    (chunk,) = [path for path in (tmp_path / "shard-00000" / "counts").rglob("*") if path.is_file() and path.suffix != ".json"]
    content = bytearray(chunk.read_bytes())
    content[len(content) // 2] ^= 1
    chunk.write_bytes(content)
    with pytest.raises(UserError, match=r"block 2 of .*shard-00000 is damaged"):
        windows(split, 100)
