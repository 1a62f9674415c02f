"""The loader's sampler in C (sampler.c): genes of cells drawn, masked and looked up, and batches packed and sorted.

Its results have the same bits as the NumPy code in scbench.data (sampling, values, batch), which does the work where there is
no C compiler, or where SCBENCH_SAMPLER=numpy says so; SCBENCH_SAMPLER=native makes a missing compiler an error (native.py).
"""

import ctypes
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
    found.cell_lengths.argtypes = [pointer] * 3 + [integer, pointer]
    found.draw_cells.argtypes = [pointer] * 3 + [integer] * 2 + [pointer] * 3 + [ctypes.c_uint64] + [pointer] * 9
    found.count_masked.argtypes = [pointer] * 3 + [integer]
    found.pack_cells.argtypes = ([pointer] * 6 + [integer, pointer] + [ctypes.c_int32] * 2 + [ctypes.c_float] + [pointer] * 10)
    for function in (found.cell_lengths, found.draw_cells):
        function.restype = None
    for function in (found.count_masked, found.pack_cells):
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
        """Whether `draw` takes it."""
        arrays = self.genes, self.counts, self.offsets
        self.row = (*map(address, arrays), self.genes.itemsize, self.counts.itemsize)
        """What `struct piece` holds."""


class Drawn(NamedTuple):
    """What `draw` shows of B cells, cell by cell."""

    genes: np.ndarray  # uint32 [n]
    counts: np.ndarray  # uint32 [n]
    values: np.ndarray  # float32 [n], ln(1 + count)
    masked: np.ndarray  # bool [n]
    positions: np.ndarray  # int32 [n], of the genes in their cell
    offsets: np.ndarray  # int64 [B+1]
    totals: np.ndarray  # int64 [B], all counts of the cell


def draw(
    pieces: Sequence[Piece],
    piece_of: np.ndarray,
    indices: np.ndarray,
    *,
    subset_keys: np.ndarray,
    by_weight: np.ndarray,
    mask_keys: np.ndarray,
    max_genes: int,
    mask_ratio: float,
) -> Drawn:
    """At most `max_genes` genes of each cell, and which of them are masked; the law is `scbench.data.sampling`'s.

    Parameters
    ----------
    pieces
        Where the cells lie.
    piece_of, indices
        int64 [B]: cell i is number indices[i] of pieces[piece_of[i]].
    subset_keys, mask_keys
        uint64 [B]: the cells' keys of the streams SUBSET and MASK.
    by_weight
        bool [B]: whether a long cell is drawn by weight.
    max_genes
        At least 1.
    mask_ratio
        Probability that a gene is masked.
    """
    n_cells = len(indices)
    piece_of, indices = (np.ascontiguousarray(array, dtype=np.int64) for array in (piece_of, indices))
    keys = [np.ascontiguousarray(array, dtype=np.uint64) for array in (subset_keys, mask_keys)]
    by_weight = np.ascontiguousarray(by_weight, dtype=bool)
    if {len(array) for array in (piece_of, by_weight, *keys)} != {n_cells} or max_genes < 1:
        raise ValueError("piece_of, indices, keys and by_weight must have one element a cell, and max_genes be at least 1")
    if n_cells and (piece_of.min() < 0 or piece_of.max() >= len(pieces) or indices.min() < 0):
        raise ValueError(f"piece_of or indices point outside the {len(pieces)} pieces")
    if not all(piece.takes for piece in pieces):
        raise ValueError("genes and counts must be uint8, uint16 or uint32")
    if (indices >= np.array([piece.n_cells for piece in pieces], dtype=np.int64)[piece_of]).any():
        raise ValueError("indices point outside a piece")
    table = np.array([piece.row for piece in pieces], dtype=np.uint64)
    where = address(table), address(piece_of), address(indices), n_cells
    lengths = np.empty(n_cells, dtype=np.int64)
    library().cell_lengths(*where, address(lengths))
    longest = int(lengths.max(initial=0))
    offsets = np.concatenate([[0], np.cumsum(np.minimum(lengths, max_genes))])
    n = int(offsets[-1])
    genes, counts = np.empty(n, dtype=np.uint32), np.empty(n, dtype=np.uint32)
    values, masked, positions = np.empty(n, dtype=np.float32), np.empty(n, dtype=bool), np.empty(n, dtype=np.int32)
    totals = np.empty(n_cells, dtype=np.int64)
    scratch = np.empty(28 * longest, dtype=np.uint8)
    library().draw_cells(
        *where, longest, address(keys[0]), address(by_weight), address(keys[1]), round(mask_ratio * 2**32),
        address(log1p_table()), address(offsets), address(scratch),
        address(genes), address(counts), address(values), address(masked), address(positions), address(totals),
    )  # fmt: skip
    return Drawn(genes, counts, values, masked, positions, offsets, totals)


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
    sizes = [n_tokens, n_tokens, n_masked, n_masked, n_masked, n_masked, n_masked, n_masked, n_tokens]
    dtypes = [np.int32, np.float32, np.int32, np.float32, np.int64, np.int32, np.int32, np.int32, np.int32]
    packed = Packed(*(np.empty(size, dtype=dtype) for size, dtype in zip(sizes, dtypes, strict=True)))
    scratch = np.empty(24 * n_tokens, dtype=np.uint8)
    n_queries = library().pack_cells(
        *(address(array) for array in arrays), address(starts), address(lengths), n_cells, address(token_offsets),
        cls_token, pad_token, masked_value, address(scratch), *(address(array) for array in packed),
    )
    return packed._replace(query_genes=packed.query_genes[:n_queries])
