"""The extents of a split that are in memory."""

from collections.abc import Iterable
from typing import NamedTuple, Protocol

import numpy as np

from scbench.kernels.sampler import CellRows, Piece


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
    """Holds the extents that it was told to read until it is told to drop them; `rows` go on holding theirs."""

    def __init__(self, split: SplitReader) -> None:
        self._split = split
        self._held: dict[int, Piece] = {}

    @property
    def held(self) -> set[int]:
        """The extents in memory."""
        return set(self._held)

    def read(self, extents: Iterable[int]) -> None:
        """Read those of `extents` that are not in memory."""
        for extent in extents:
            if extent not in self._held:
                arrays = self._split.read_extent(extent)
                self._held[extent] = Piece(arrays.genes, arrays.counts, arrays.offsets)

    def keep_only(self, extents: set[int]) -> None:
        """Drop all other extents."""
        for extent in self._held.keys() - extents:
            del self._held[extent]

    def rows(self, extents: np.ndarray, indices: np.ndarray) -> CellRows:
        """Cells, each given by its extent (held) and its number in it; int64 [n] both."""
        first = np.ones(len(extents), dtype=bool)  # of a run: cells of one extent mostly come together
        np.not_equal(extents[1:], extents[:-1], out=first[1:])
        return CellRows([self._held[extent] for extent in extents[first].tolist()], np.cumsum(first) - 1, indices)
