"""The ceiling: the bytes of the same store copied out of np.memmap in the same order, 8 MB at most at a time, nothing checked;
and scbench's loader on top of that."""

from collections.abc import Iterator
from pathlib import Path

import numpy as np
from loaders import scbench_store
from loaders.law import Law

from scbench.data.batch import CellBatch
from scbench.data.extents import Cells
from scbench.data.store import Store

TRIED = ({},)
FILLED = True  # the last batch of an epoch is filled with cells of the next
FORMAT = scbench_store.FORMAT
READ_BYTES = 8_000_000


class MappedArray:
    """An array of the store: raw chunks, one a file."""

    def __init__(self, folder: Path, dtype: str, length: int) -> None:
        files = sorted((folder / "c").iterdir(), key=lambda path: int(path.name))
        self._maps = [np.memmap(file, dtype=dtype, mode="r") for file in files]
        self._chunk = len(self._maps[0])
        self._length = length

    def copy(self, start: int, stop: int) -> np.ndarray:
        """Elements [start, stop), in memory of their own."""
        out = np.empty(stop - start, dtype=self._maps[0].dtype)
        at, step = start, READ_BYTES // out.itemsize
        while at < stop:
            chunk, within = divmod(at, self._chunk)
            end = min(stop, at + step, (chunk + 1) * self._chunk)
            out[at - start : end - start] = self._maps[chunk][within : within + end - at]
            at = end
        return out


class MappedSplit:
    """What `scbench.data.extents.SplitReader` asks of a split."""

    def __init__(self, folder: Path) -> None:
        split = Store.open(folder / "store").split("train")
        self.n_cells, self.extent_sizes = split.n_cells, split.extent_sizes
        starts = np.concatenate([[0], np.cumsum(split.extent_sizes)])
        first, self._places = 0, []
        for shard in split.shards:
            arrays = {name: MappedArray(folder / "store" / shard.name / name, *shard.arrays[name])
                      for name in ("genes", "counts", "offsets")}
            last = first + shard.cells
            self._places += [(arrays, start - first, stop - first)
                             for start, stop in zip(starts[:-1].tolist(), starts[1:].tolist(), strict=True)
                             if first <= start < last]
            first = last

    def read_extent(self, extent: int) -> Cells:
        """A copy of an extent."""
        arrays, start, stop = self._places[extent]
        offsets = arrays["offsets"].copy(start, stop + 1)
        tokens = offsets[0], offsets[-1]
        return Cells(arrays["genes"].copy(*tokens), arrays["counts"].copy(*tokens), offsets - offsets[0])


def training(corpus: Path, folder: Path, law: Law, settings: dict) -> Iterator[CellBatch]:
    """scbench's loader over the memory map."""
    return scbench_store.batches(MappedSplit(folder), corpus, law)


def extents(corpus: Path, folder: Path, law: Law, settings: dict) -> Iterator[Cells]:
    """Whole extents in the order of scbench's epochs."""
    return scbench_store.in_order(MappedSplit(folder), law)
