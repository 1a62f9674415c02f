"""The loader's sampler in C (sampler.c): genes of cells drawn, masked and looked up; batches packed and sorted; both at once.

Its results have the same bits as the NumPy code in scbench.data (sampling, values, batch), which does the work where there is
no C compiler, or where SCBENCH_SAMPLER=numpy says so; SCBENCH_SAMPLER=native makes a missing compiler an error (native.py).
"""

import ctypes
import struct
import threading
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import NamedTuple

import numpy as np

from scbench.kernels import native
from scbench.kernels.logarithm import log1p_table
from scbench.kernels.native import address, takes

SOURCE = Path(__file__).with_name("sampler.c")


@cache
def library() -> ctypes.CDLL | None:
    """The compiled sampler; None if NumPy is to do its work. Errors as of native.chosen."""
    found = native.chosen(SOURCE, "cells are sampled")
    if found is None:
        return None
    pointer, integer = ctypes.c_void_p, ctypes.c_int64
    found.cell_lengths.argtypes = [pointer, integer, pointer, pointer, integer, pointer]
    found.draw_cells.argtypes = [pointer] * 3 + [integer] * 2 + [pointer] * 11
    found.count_masked.argtypes = [pointer] * 3 + [integer]
    found.pack_cells.argtypes = ([pointer] * 6 + [integer, pointer] + [ctypes.c_int32] * 2 + [ctypes.c_float] + [pointer] * 10)
    found.make_batch.argtypes = (
        [pointer] * 3 + [integer] * 2 + [pointer] * 4 + [ctypes.c_int32, ctypes.c_float] + [pointer] * 12
    )
    for function in (found.draw_cells, found.make_batch):
        function.restype = None
    for function in (found.cell_lengths, found.count_masked, found.pack_cells):
        function.restype = integer
    return found


class Piece:
    """Cells that lie in three arrays, looked at once so that the C code may trust them.

    Parameters
    ----------
    genes, counts
        [N]: token ids and counts, cell by cell.
    offsets
        int64 [cells+1]: where each cell starts in them; ascending, from 0 or more to at most N.

    Raises
    ------
    ValueError
        If the offsets are not so.
    """

    def __init__(self, genes: np.ndarray, counts: np.ndarray, offsets: np.ndarray) -> None:
        self.genes, self.counts = np.ascontiguousarray(genes), np.ascontiguousarray(counts)
        self.offsets = np.ascontiguousarray(offsets, dtype=np.int64)
        self.n_cells, stored = len(offsets) - 1, min(len(genes), len(counts))
        if self.n_cells < 0 or offsets[0] < 0 or (np.diff(self.offsets) < 0).any() or offsets[-1] > stored:
            raise ValueError(f"offsets must ascend, from 0 or more to at most the {stored} genes")
        self.takes = takes(self.genes) and takes(self.counts)
        """Whether the C code takes it."""
        arrays = self.genes, self.counts, self.offsets
        self.row = struct.pack("=6q", *map(address, arrays), self.genes.itemsize, self.counts.itemsize, self.n_cells)
        """`struct piece`."""


class CellRows:
    """Cells where they lie: cell i is number indices[i] of pieces[piece_of[i]], int64 [cells] both.

    Raises
    ------
    ValueError
        If there is no such cell.
    """

    def __init__(self, pieces: Sequence[Piece], piece_of: np.ndarray, indices: np.ndarray) -> None:
        self.pieces = pieces
        self._piece_of, self._indices = (np.ascontiguousarray(array, dtype=np.int64) for array in (piece_of, indices))
        if len(piece_of) != len(indices):
            raise ValueError("piece_of and indices must have one element a cell")
        self._table = b"".join(piece.row for piece in pieces)
        self.takes = all(piece.takes for piece in pieces)
        """Whether the C code takes them."""
        self.lengths = np.empty(len(indices), dtype=np.int64)
        """Each cell's genes, int64 [cells]."""
        found = self._find_lengths()
        if found < len(indices):
            raise ValueError(f"cell {indices[found]} of piece {piece_of[found]} lies outside the {len(pieces)} pieces")

    def __len__(self) -> int:
        return len(self._indices)

    def __getitem__(self, rows: np.ndarray) -> "CellRows":
        """Some of the cells: int64, their numbers among these."""
        some = object.__new__(CellRows)
        some.__dict__.update(self.__dict__)
        some._piece_of, some._indices, some.lengths = (x.take(rows) for x in (self._piece_of, self._indices, self.lengths))
        return some

    def copied(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Genes, counts and int64 offsets of the cells one after the other."""
        genes, counts = [np.zeros(0, dtype=np.uint16)], [np.zeros(0, dtype=np.uint8)]
        for number, index in zip(self._piece_of.tolist(), self._indices.tolist(), strict=True):
            piece = self.pieces[number]
            row = slice(piece.offsets[index], piece.offsets[index + 1])
            genes.append(piece.genes[row])
            counts.append(piece.counts[row])
        return np.concatenate(genes), np.concatenate(counts), np.concatenate([[0], np.cumsum(self.lengths)])

    def _find_lengths(self) -> int:
        """Fill `lengths`; the number of cells before one that is in none of the pieces."""
        if library() is not None:
            table, *where = self.where
            return library().cell_lengths(table, len(self.pieces), *where, address(self.lengths))
        for cell, (number, index) in enumerate(zip(self._piece_of.tolist(), self._indices.tolist(), strict=True)):
            if not (0 <= number < len(self.pieces) and 0 <= index < self.pieces[number].n_cells):
                return cell
            offsets = self.pieces[number].offsets
            self.lengths[cell] = offsets[index + 1] - offsets[index]
        return len(self)

    @property
    def where(self) -> tuple:
        """What the C code is told of them."""
        return self._table, address(self._piece_of), address(self._indices), len(self)


class Law(NamedTuple):
    """What a draw depends on beside the cells and their keys; the law is `scbench.data.sampling`'s."""

    subset_key: int  # of the stream SUBSET
    weighted_key: int  # of the stream SUBSET_LAW
    weighted_share: float  # share of the long cells that are drawn by weight
    mask_key: int  # of the stream MASK
    mask_ratio: float  # probability that a gene is masked
    max_genes: int  # at least 1

    @property
    def row(self) -> bytes:
        """`struct law`."""
        return struct.pack(
            "=5Qq", self.subset_key, self.weighted_key, round(self.weighted_share * 2**32), self.mask_key,
            round(self.mask_ratio * 2**32), self.max_genes,
        )  # fmt: skip


class Drawn(NamedTuple):
    """What `draw` shows of B cells, cell by cell."""

    genes: np.ndarray  # uint32 [n]
    counts: np.ndarray  # uint32 [n]
    values: np.ndarray  # float32 [n], ln(1 + count)
    masked: np.ndarray  # bool [n]
    positions: np.ndarray  # int32 [n], of the genes in their cell
    offsets: np.ndarray  # int64 [B+1]
    totals: np.ndarray  # int64 [B], all counts of the cell


def draw(cells: CellRows, keys: np.ndarray, law: Law) -> Drawn:
    """At most `max_genes` genes of each cell, and which of them are masked. `keys`: int64 or uint64 [B]."""
    keys = _checked(cells, keys, law)
    offsets = np.concatenate([[0], np.cumsum(np.minimum(cells.lengths, law.max_genes))])
    n, longest = int(offsets[-1]), int(cells.lengths.max(initial=0))
    genes, counts = np.empty(n, dtype=np.uint32), np.empty(n, dtype=np.uint32)
    values, masked, positions = np.empty(n, dtype=np.float32), np.empty(n, dtype=bool), np.empty(n, dtype=np.int32)
    totals, logarithms = np.empty(len(cells), dtype=np.int64), log1p_table()
    library().draw_cells(
        *cells.where, longest, address(keys), law.row, address(logarithms), address(offsets), _scratch(28 * longest),
        address(genes), address(counts), address(values), address(masked), address(positions), address(totals),
    )
    return Drawn(genes, counts, values, masked, positions, offsets, totals)


def _checked(cells: CellRows, keys: np.ndarray, law: Law) -> np.ndarray:
    keys = np.ascontiguousarray(keys)
    if keys.dtype not in (np.int64, np.uint64) or len(keys) != len(cells) or law.max_genes < 1:
        raise ValueError("keys must be 64-bit integers, one a cell, and max_genes be at least 1")
    if not cells.takes:
        raise ValueError("genes and counts must be uint8, uint16 or uint32")
    return keys


_kept = threading.local()


def _scratch(size: int) -> int:
    """Where this thread's scratch memory is, at least `size` bytes: kept, as fresh memory comes page by page."""
    if len(getattr(_kept, "memory", b"")) < size:
        _kept.memory = np.empty(size + size // 4, dtype=np.uint8)
    return address(_kept.memory) if size else 0


class Packed(NamedTuple):
    """Arrays of a CellBatch, of T tokens and M masked genes."""

    genes: np.ndarray  # int32 [T]
    values: np.ndarray  # float32 [T]
    masked: np.ndarray  # int32 [M]
    targets: np.ndarray  # float32 [M]
    target_counts: np.ndarray  # int64 [M]
    query_genes: np.ndarray  # int32 [U]
    query_index: np.ndarray  # int32 [M]
    query_order: np.ndarray  # int32 [M]
    gene_order: np.ndarray  # int32 [T]


def pack(
    genes: np.ndarray,
    values: np.ndarray,
    counts: np.ndarray,
    masked: np.ndarray,
    starts: np.ndarray,
    lengths: np.ndarray,
    token_offsets: np.ndarray,
    *,
    cls_token: int,
    pad_token: int,
    masked_value: float,
) -> Packed:
    """Tokens and their orders; as `scbench.data.batch` says.

    Parameters
    ----------
    genes, values, counts, masked
        uint32, float32, uint32 and bool [N]: of the cells' genes.
    starts, lengths
        int64 [B]: where each cell lies in them.
    token_offsets
        int64 [B+1]: where each cell's tokens start; room for more than 1 + length is padded.
    cls_token, pad_token, masked_value
        What stands before a cell, after it, and for the value of a masked gene.
    """
    arrays = [np.ascontiguousarray(array, dtype=dtype) for array, dtype in
              ((genes, np.uint32), (counts, np.uint32), (values, np.float32), (masked, bool))]
    cells = [np.ascontiguousarray(array, dtype=np.int64) for array in (starts, lengths, token_offsets)]
    starts, lengths, token_offsets = cells
    n_cells, n = len(lengths), len(genes)
    if {len(array) for array in arrays} != {n} or len(starts) != n_cells or len(token_offsets) != n_cells + 1:
        raise ValueError("genes, values, counts and masked must be equally long, and so must starts and lengths")
    if n_cells and (starts.min() < 0 or lengths.min() < 0 or (starts + lengths).max() > n):
        raise ValueError(f"starts and lengths point outside the {n} genes")
    if token_offsets[0] != 0 or (np.diff(token_offsets) <= lengths).any() or token_offsets[-1] >= 2**31:
        raise ValueError("token_offsets must begin at 0, leave room for <cls> and each cell's genes, and end below 2³¹")
    n_tokens = int(token_offsets[-1])
    where = [address(array) for array in (arrays[3], starts, lengths)]
    n_masked = library().count_masked(*where, n_cells)
    packed = _room(n_tokens, n_masked)
    n_queries = library().pack_cells(
        *(address(array) for array in arrays), address(starts), address(lengths), n_cells, address(token_offsets),
        cls_token, pad_token, masked_value, _scratch(20 * n_tokens), *(address(array) for array in packed),
    )
    return packed._replace(query_genes=packed.query_genes[:n_queries])


def make(
    cells: CellRows, keys: np.ndarray, law: Law, *, cls_token: int, masked_value: float
) -> tuple[Packed, np.ndarray, np.ndarray]:
    """`draw` and `pack` at once, without pads: the same bits; where each cell's tokens start, and all its counts.

    The last two are int64 [B+1] and [B].
    """
    keys = _checked(cells, keys, law)
    token_offsets = np.zeros(len(cells) + 1, dtype=np.int64)
    np.cumsum(np.minimum(cells.lengths, law.max_genes) + 1, out=token_offsets[1:])
    n_tokens, longest = int(token_offsets[-1]), int(cells.lengths.max(initial=0))
    if n_tokens >= 2**31:
        raise ValueError(f"{n_tokens} tokens are too many: less than 2³¹")
    packed = _room(n_tokens, n_tokens)
    sizes, totals, logarithms = np.empty(2, dtype=np.int64), np.empty(len(cells), dtype=np.int64), log1p_table()
    library().make_batch(
        *cells.where, longest, address(keys), law.row, address(logarithms), address(token_offsets), cls_token, masked_value,
        _scratch(max(28 * longest, 20 * n_tokens)), address(sizes), address(totals), *(address(array) for array in packed),
    )
    n_masked, n_queries = sizes.tolist()
    of_masked = "masked", "targets", "target_counts", "query_index", "query_order"
    shown = {name: getattr(packed, name)[:n_masked] for name in of_masked}
    return packed._replace(query_genes=packed.query_genes[:n_queries], **shown), token_offsets, totals


def _room(n_tokens: int, n_masked: int) -> Packed:
    sizes = [n_tokens, n_tokens, n_masked, n_masked, n_masked, n_masked, n_masked, n_masked, n_tokens]
    dtypes = [np.int32, np.float32, np.int32, np.float32, np.int64, np.int32, np.int32, np.int32, np.int32]
    return Packed(*(np.empty(size, dtype=dtype) for size, dtype in zip(sizes, dtypes, strict=True)))
