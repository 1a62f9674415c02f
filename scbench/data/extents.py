"""The extents of a split that are in memory."""

from collections.abc import Iterable
from typing import NamedTuple, Protocol

import numpy as np


class ExtentArrays(Protocol):
    """What a split's `read_extent` gives."""

    genes: np.ndarray  # uint16 or uint32 [nnz]
    counts: np.ndarray  # one of shard_format.COUNTS_DTYPES [nnz]
    offsets: np.ndarray  # int64 [cells+1], from 0


class SplitReader(Protocol):
    """What the loader needs of a split of a store."""

    n_cells: int
    extent_sizes: np.ndarray  # int64 [E], cells in each extent

    def read_extent(self, extent: int) -> ExtentArrays: ...


class Cells(NamedTuple):
    """Raw counts of some cells, cell by cell."""

    genes: np.ndarray  # uint [N], token ids, ascending in each cell
    counts: np.ndarray  # uint or float [N]
    offsets: np.ndarray  # int64 [cells+1]


class ExtentCache:
    """Holds the extents that it was told to read until it is told to drop them."""

    def __init__(self, split: SplitReader) -> None:
        self._split = split
        self._held: dict[int, ExtentArrays] = {}

    @property
    def held(self) -> set[int]:
        """The extents in memory."""
        return set(self._held)

    def read(self, extents: Iterable[int]) -> None:
        """Read those of `extents` that are not in memory."""
        for extent in extents:
            if extent not in self._held:
                self._held[extent] = self._split.read_extent(extent)

    def keep_only(self, extents: set[int]) -> None:
        """Drop all other extents."""
        for extent in self._held.keys() - extents:
            del self._held[extent]

    def gather(self, extents: np.ndarray, indices: np.ndarray) -> Cells:
        """Copies of cells, each given by its extent (held) and its number in it; int64 [n] both."""
        genes, counts, lengths = [], [], []
        for extent, index in zip(extents.tolist(), indices.tolist(), strict=True):
            arrays = self._held[extent]
            start, stop = arrays.offsets[index], arrays.offsets[index + 1]
            genes.append(arrays.genes[start:stop])
            counts.append(arrays.counts[start:stop])
            lengths.append(stop - start)
        offsets = np.concatenate([[0], np.cumsum(lengths, dtype=np.int64)])
        return Cells(np.concatenate(genes), np.concatenate(counts), offsets)
