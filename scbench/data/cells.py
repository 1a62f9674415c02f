"""Cells as sparse rows: counts by column of a source, tokens of a vocabulary, and the hash of a cell's content."""

import itertools
from collections.abc import Iterator
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from scbench.errors import UserError
from scbench.kernels import cells as native
from scbench.kernels import random

if TYPE_CHECKING:
    from scbench.data.gene_identity import GeneMap

MAX_COUNT = 2**32 - 1
PIECE_VALUES, PIECE_CELLS = 1 << 17, 1 << 15  # worked on at once
CONTENT_KEYS = random.key(0, random.Stream.CONTENT), random.key(1, random.Stream.CONTENT)  # of words, and of their sums
_FRACTIONAL = MAX_COUNT + 1  # the word of a token, under content_hash's key, that fractional counts have for a key


class Counts(NamedTuple):
    """Counts of some cells by column of their source. Inside a cell, columns come in the order of the file."""

    columns: np.ndarray  # int64 [nnz], positions in the source's var
    counts: np.ndarray  # uint32 [nnz], or float32 or float64 where fractional ones are kept; a file may store zeros
    offsets: np.ndarray  # int64 [cells+1], where each cell starts; offsets[0] is 0
    fractional: int = 0  # values that were not whole
    distance: float = 0.0  # the largest of theirs to a whole number


class CellTokens(NamedTuple):
    """Counts of some cells by token: ascending and distinct inside a cell, no zeros."""

    genes: np.ndarray  # uint32 [nnz], token ids
    counts: np.ndarray  # uint32 [nnz], or float32 or float64 if some are not whole
    offsets: np.ndarray  # int64 [cells+1], where each cell starts; offsets[0] is 0
    totals: np.ndarray  # int64 or float64 [cells], all counts of the cell, those of unmatched genes included


def take(cells: CellTokens, rows: np.ndarray) -> CellTokens:
    """Some of the cells, in the order of `rows` (int64, may repeat)."""
    lengths = np.diff(cells.offsets)[rows]
    genes, counts = (take_ranges(values, cells.offsets[rows], lengths) for values in (cells.genes, cells.counts))
    return CellTokens(genes, counts, np.concatenate([[0], np.cumsum(lengths)]), cells.totals[rows])


def take_ranges(values: np.ndarray, starts: np.ndarray, lengths: np.ndarray) -> np.ndarray:
    """The `lengths` values from each of `starts` on, side by side. Faster than an index for each, unless cells are tiny."""
    taken = native.take_ranges(values, starts, lengths)
    if taken is not None:
        return taken
    ranges = zip(starts.tolist(), (starts + lengths).tolist(), strict=True)
    return np.concatenate([values[:0], *(values[start:stop] for start, stop in ranges)])


def sum_by_cell(values: np.ndarray, offsets: np.ndarray) -> np.ndarray:
    """The sum of each cell's values, [cells], in the dtype of `values` (wrapping); 0 for an empty cell."""
    sums = np.zeros(len(offsets) - 1, dtype=values.dtype)
    filled = offsets[1:] > offsets[:-1]
    if filled.any():  # reduceat gives an empty segment the value that follows it, so only filled cells go in
        sums[filled] = np.add.reduceat(values, offsets[:-1][filled])
    return sums


def wide(counts: np.ndarray) -> np.ndarray:
    """Counts in a dtype in which they can be summed: int64, or float64 if they are floating."""
    return counts.astype(np.float64 if counts.dtype.kind == "f" else np.int64, copy=False)


def to_tokens(counts: Counts, gene_map: "GeneMap") -> CellTokens:
    """Map columns to tokens: unmatched columns leave, columns of one token are summed (in the counts' dtype), tokens are
    sorted, zeros are gone.

    Raises
    ------
    UserError
        If a sum passes 2³²−1.
    """
    mapped = native.map_cells(*counts[:3], gene_map.tokens)
    if mapped is not None:
        return CellTokens(*mapped)
    token_bits = int(gene_map.tokens.max(initial=0)).bit_length()
    genes, values, lengths = [], [], []
    for first, last in _pieces(counts.offsets):
        offsets = counts.offsets[first : last + 1]
        piece = slice(offsets[0], offsets[-1])
        tokens = gene_map.tokens[counts.columns[piece]]
        keep = np.flatnonzero((tokens >= 0) & (counts.counts[piece] > 0))
        # one integer a (cell, token, position): the sort of integers is vectorised, and with the position it is stable, for
        # the sum of floating numbers depends on their order
        position_bits = len(keep).bit_length()
        cells = np.repeat(np.arange(last - first) << token_bits, np.diff(offsets))
        keys = ((cells | tokens)[keep] << position_bits) | np.arange(len(keep))
        keys.sort()
        order = keep[keys & (1 << position_bits) - 1]
        keys >>= position_bits
        found = counts.counts[piece][order]
        distinct = np.ones(len(keys), dtype=bool)
        distinct[1:] = keys[1:] != keys[:-1]
        if not distinct.all():
            sums = np.add.reduceat(wide(found), np.flatnonzero(distinct))
            if sums.max() > MAX_COUNT:
                raise UserError(f"the counts of columns that name one gene sum to {sums.max()} in one cell, over 2³²−1.")
            keys, found = keys[distinct], sums.astype(found.dtype)
        genes.append((keys & (1 << token_bits) - 1).astype(np.uint32))
        values.append(found)
        lengths.append(np.diff(np.searchsorted(keys, np.arange(last - first + 1) << token_bits)))
    return CellTokens(
        genes=np.concatenate(genes),
        counts=np.concatenate(values),
        offsets=np.concatenate([[0], np.cumsum(np.concatenate(lengths))]),
        totals=sum_by_cell(wide(counts.counts), counts.offsets),
    )


def _pieces(offsets: np.ndarray) -> Iterator[tuple[int, int]]:
    """Ranges of cells, first and last + 1, so small that the arrays of a piece stay in a core's cache; at least one."""
    n_cells = len(offsets) - 1
    by_values = np.searchsorted(offsets[:-1], np.arange(PIECE_VALUES, offsets[-1], PIECE_VALUES))
    edges = np.unique(np.concatenate([np.arange(PIECE_CELLS, n_cells, PIECE_CELLS), by_values, [n_cells]]))
    return itertools.pairwise([0, *edges.tolist()])


def content_hash(genes: np.ndarray, counts: np.ndarray, offsets: np.ndarray) -> np.ndarray:
    """A hash of what each cell holds, uint64 [cells]; it doesn't depend on the order of the genes inside a cell.

    The sum (mod 2⁶⁴) over the cell's tokens of a random word of (token, count), mixed once more. An empty cell is the hash
    of the empty sum. Zeros must be gone. Two different cells collide with probability 2⁻⁶⁴. A whole count has one word,
    whatever its dtype; that of a fractional one is of the bits of the number as float64.

    Parameters
    ----------
    genes, counts
        Integers [nnz], and integers or floating numbers [nnz], as in CellTokens.
    offsets
        int64 [cells+1].
    """
    genes, counts, offsets = (np.asarray(values) for values in (genes, counts, offsets))
    hashes = native.hash_cells(genes, counts, offsets, *CONTENT_KEYS)
    return _content_hash(genes, counts, offsets) if hashes is None else hashes


def _content_hash(genes: np.ndarray, counts: np.ndarray, offsets: np.ndarray) -> np.ndarray:
    sums = []
    for first, last in _pieces(offsets):
        piece = slice(offsets[first], offsets[last])
        sums.append(sum_by_cell(_words(genes[piece], counts[piece]), offsets[first : last + 1] - offsets[first]))
    return random.bits(CONTENT_KEYS[1], np.concatenate(sums))


def _words(genes: np.ndarray, counts: np.ndarray) -> np.ndarray:
    """The random word of each (token, count), uint64 [nnz]."""
    token_keys = random.bits(CONTENT_KEYS[0], genes)
    if counts.dtype.kind != "f":
        return random.bits(token_keys, counts)
    words = random.bits(token_keys, counts.astype(np.int64))
    part = counts != np.rint(counts)
    bits = counts[part].astype(np.float64).view(np.uint64)
    words[part] = random.bits(random.bits(token_keys[part], _FRACTIONAL), bits)
    return words
