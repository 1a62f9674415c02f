"""Which extents the loader reads and holds, and the same windows from a split on the disk."""

import dataclasses

import numpy as np
import pyarrow as pa
import pytest
from fake_split import OPTIONS, VOCABULARY, FakeSplit, cells_of, oracle_cell, regrouped, validation, windows

from scbench.data.drawing import AheadReader
from scbench.data.loader import Loader
from scbench.data.manifest import file_facts
from scbench.data.order import SampleOrder
from scbench.data.shard_format import ShardInfo
from scbench.data.shard_writer import ShardWriter
from scbench.data.store import Split
from scbench.errors import UserError


@pytest.mark.parametrize("world", [1, 2])
def test_extents_are_read_once_an_epoch_and_dropped(world):
    split = FakeSplit(2_000, 50)  # 40 extents in 10 groups of 4
    with Loader(split, VOCABULARY, **OPTIONS | {"lanes": 4, "batch_cells": 20}, rank=0, world=world) as loader:
        for _ in range(200):  # two epochs
            next(loader)
    assert split.most_held <= 3 * 4 / world  # two groups, and what a window that is still made lies in
    reads = np.bincount(split.reads, minlength=40)
    assert reads.sum() <= (2 * 40 + 3 * 4) / world  # two epochs and the groups ahead


def test_one_group_stays_in_memory():
    split = FakeSplit(256, 64)
    windows(split, 60, lanes=64)
    assert sorted(split.reads) == [0, 1, 2, 3]


def test_the_next_group_is_read_while_one_is_used():
    split = FakeSplit(2_000, 50)
    order = SampleOrder(split.extent_sizes, 1, 4)
    reader = AheadReader(split, order, 20, 0, 1)
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
        located = order.locate(step * batch_cells, (step + 1) * batch_cells)
        numbers = split.starts[located.extents] + located.indices
        assert [record[1] for record in regrouped(window)] == numbers.tolist()


def written(split: FakeSplit, directory, cells_of_shards: list[int], blocks_per_extent: int) -> Split:
    """The same cells as shards on the disk."""
    shards, first = [], 0
    for i, cells in enumerate(cells_of_shards):
        row = slice(split.offsets[first], split.offsets[first + cells])
        info = ShardInfo.plan(
            split="train", cells=cells, nnz=row.stop - row.start, counts=["uint8", "uint16"][i % 2], vocabulary_size=302
        )
        info = dataclasses.replace(info, name=f"shard-{i:05d}", blocks_per_extent=blocks_per_extent)
        writer = ShardWriter(directory / info.name, info)
        writer.append(split.genes[row], split.counts[row], split.lengths[first : first + cells])
        writer.finish(pa.table({"n_genes": split.lengths[first : first + cells]}))
        shards.append(info)
        first += cells
    return Split(directory, "train", shards, file_facts(directory))


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
        located = order.locate(step * 24, (step + 1) * 24)
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
