"""The extents of a split that are in memory."""

from collections.abc import Iterable
from typing import NamedTuple, Protocol

import numpy as np

from scbench.data.cells import CellTokens
from scbench.kernels.sampler import Piece


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


class CellRows(NamedTuple):
    """Cells where they lie: cell i is number indices[i] of pieces[piece_of[i]]."""

    pieces: list[Piece]
    piece_of: np.ndarray  # int64 [cells]
    indices: np.ndarray  # int64 [cells]

    @classmethod
    def of(cls, cells: Cells | CellTokens) -> "CellRows":
        """All of some cells that lie one after the other."""
        piece = Piece(cells.genes, cells.counts, cells.offsets)
        return cls([piece], np.zeros(piece.n_cells, dtype=np.int64), np.arange(piece.n_cells))

    def copied(self) -> Cells:
        """The cells one after the other."""
        genes, counts, lengths = [np.zeros(0, dtype=np.uint16)], [np.zeros(0, dtype=np.uint8)], []
        for number, index in zip(self.piece_of.tolist(), self.indices.tolist(), strict=True):
            piece = self.pieces[number]
            start, stop = piece.offsets[index], piece.offsets[index + 1]
            genes.append(piece.genes[start:stop])
            counts.append(piece.counts[start:stop])
            lengths.append(stop - start)
        offsets = np.concatenate([[0], np.cumsum(lengths, dtype=np.int64)])
        return Cells(np.concatenate(genes), np.concatenate(counts), offsets)


class ExtentCache:
    """Holds the extents that it was told to read until it is told to drop them."""

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
        distinct, piece_of = np.unique(extents, return_inverse=True)
        return CellRows([self._held[extent] for extent in distinct.tolist()], piece_of, indices)
