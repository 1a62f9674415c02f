"""prepare's work on every count in C (cells.c): columns mapped to tokens, contents hashed, fingerprints, cells reordered.

Its results have the same bits as the NumPy code of scbench.data.cells and .fingerprints, which does the work where there is no
compiler (native.chosen), and for what the C code doesn't take: each function here gives None then.
"""

import ctypes
from functools import cache
from pathlib import Path

import numpy as np

from scbench.kernels import native
from scbench.kernels.native import address, takes

SOURCE = Path(__file__).with_name("cells.c")
MOST_TOKENS = 1 << 24  # of a vocabulary: a call has 8 bytes of memory for each


@cache
def library() -> ctypes.CDLL | None:
    """The compiled code; None if NumPy is to do its work. Errors as of native.chosen."""
    found = native.chosen(SOURCE, "cells are prepared")
    if found is not None:
        pointer, integer, word = ctypes.c_void_p, ctypes.c_int64, ctypes.c_uint64
        cells = [pointer, integer, pointer, integer, pointer, integer]
        found.map_cells.argtypes = [pointer] * 3 + [integer, pointer, integer] + [pointer] * 6
        found.hash_cells.argtypes = [*cells, word, word, pointer]
        found.fingerprint_cells.argtypes = [*cells, pointer, integer, integer, word, word, word, pointer, pointer]
        found.map_cells.restype = found.fingerprint_cells.restype = integer
        found.take_ranges.argtypes = [pointer, integer, pointer, pointer, integer, pointer]
        found.hash_cells.restype = found.take_ranges.restype = None
    return found


def map_cells(
    columns: np.ndarray, counts: np.ndarray, offsets: np.ndarray, tokens: np.ndarray
) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray] | None:
    """genes, counts, offsets and totals of `scbench.data.cells.to_tokens`; None also for a sum past 2³²−1.

    Parameters
    ----------
    columns, counts, offsets
        int64 [nnz], uint32 [nnz] (others are not taken), int64 [cells+1].
    tokens
        int64 [columns]: the token of each column, −1 without one.
    """
    n_tokens = int(tokens.max(initial=-1)) + 1
    if counts.dtype != np.uint32 or n_tokens > MOST_TOKENS or not _ascend(offsets, columns, counts) or library() is None:
        return None
    columns, offsets = (np.ascontiguousarray(array, dtype=np.int64) for array in (columns, offsets))
    counts, tokens = np.ascontiguousarray(counts), np.ascontiguousarray(tokens, dtype=np.int32)
    n_cells = len(offsets) - 1
    sums, there = np.zeros(n_tokens, dtype=np.uint64), np.zeros(-(-n_tokens // 64), dtype=np.uint64)
    # one element more than there are values: what isn't kept is written at the end
    genes, found = np.empty(len(counts) + 1, dtype=np.uint32), np.empty(len(counts) + 1, dtype=np.uint32)
    ends, totals = np.empty(n_cells + 1, dtype=np.int64), np.empty(n_cells, dtype=np.int64)
    arrays = columns, counts, offsets, tokens, sums, there, genes, found, ends, totals
    where = [address(array) for array in arrays]
    if library().map_cells(*where[:3], n_cells, where[3], len(tokens), *where[4:]):
        return None
    for array in (genes, found):
        array.resize(ends[-1], refcheck=False)  # a view would keep what was dropped in memory
    return genes, found, ends, totals


def hash_cells(genes: np.ndarray, counts: np.ndarray, offsets: np.ndarray, inner: int, outer: int) -> np.ndarray | None:
    """`scbench.data.cells.content_hash` with its two keys, uint64 [cells]; genes and counts of uint8, uint16 or uint32."""
    cells = _cells(genes, counts, offsets)
    if cells is None:
        return None
    hashes = np.empty(len(offsets) - 1, dtype=np.uint64)
    library().hash_cells(*_arguments(*cells), inner, outer, address(hashes))
    return hashes


def fingerprint_cells(
    genes: np.ndarray,
    counts: np.ndarray,
    offsets: np.ndarray,
    listed: np.ndarray,
    *,
    least_core: int,
    keys: tuple[int, int, int],
) -> tuple[np.ndarray, np.ndarray] | None:
    """Core hashes, uint64 [cells], and signatures, uint8 [cells, 64], of `scbench.data.fingerprints`.

    Parameters
    ----------
    genes, counts, offsets
        As for `hash_cells`.
    listed
        uint32 [vocabulary]: a token's bin, value << 8 and, for a core gene, 1 << 16; 255 << 8 for one that is not listed.
    least_core
        Core genes that a cell must have for a hash.
    keys
        Of the words, of their sum, and of the core hash.
    """
    cells = _cells(genes, counts, offsets)
    if cells is None:
        return None
    n_cells = len(offsets) - 1
    cores, signatures = np.empty(n_cells, dtype=np.uint64), np.empty((n_cells, 64), dtype=np.uint8)
    outside = library().fingerprint_cells(
        *_arguments(*cells), address(listed), len(listed), least_core, *keys, address(cores), address(signatures)
    )
    return None if outside else (cores, signatures)


def take_ranges(values: np.ndarray, starts: np.ndarray, lengths: np.ndarray) -> np.ndarray | None:
    """`scbench.data.cells.take_ranges` of contiguous numbers; None also for a range that passes an end of `values`."""
    starts, lengths = (np.ascontiguousarray(array, dtype=np.int64) for array in (starts, lengths))
    inside = (starts >= 0).all() and (lengths >= 0).all() and (starts <= len(values) - lengths).all()
    if not (inside and values.flags.c_contiguous and values.dtype.kind in "uif") or library() is None:
        return None
    taken = np.empty(lengths.sum(), dtype=values.dtype)
    library().take_ranges(address(values), values.itemsize, address(starts), address(lengths), len(starts), address(taken))
    return taken


def _cells(
    genes: np.ndarray, counts: np.ndarray, offsets: np.ndarray
) -> tuple[np.ndarray, np.ndarray, np.ndarray] | None:
    """The arrays side by side in memory; None if the C code doesn't take them or isn't there."""
    if not (takes(genes) and takes(counts) and _ascend(offsets, genes, counts)) or library() is None:
        return None
    return np.ascontiguousarray(genes), np.ascontiguousarray(counts), np.ascontiguousarray(offsets, dtype=np.int64)


def _arguments(genes: np.ndarray, counts: np.ndarray, offsets: np.ndarray) -> tuple[int, ...]:
    return address(genes), genes.itemsize, address(counts), counts.itemsize, address(offsets), len(offsets) - 1


def _ascend(offsets: np.ndarray, *values: np.ndarray) -> bool:
    """Whether cells start at `offsets`, ascending from 0 or more to at most the number of `values`."""
    return bool(offsets[0] >= 0 and (np.diff(offsets) >= 0).all() and offsets[-1] <= min(map(len, values)))
