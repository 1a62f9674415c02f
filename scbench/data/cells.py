"""Cells as sparse rows: counts by column of a source, tokens of a vocabulary, and the hash of a cell's content."""

from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from scbench.errors import UserError
from scbench.kernels import random

if TYPE_CHECKING:
    from scbench.data.gene_identity import GeneMap

MAX_COUNT = 2**32 - 1


class Counts(NamedTuple):
    """Counts of some cells by column of their source. Inside a cell, columns come in the order of the file."""

    columns: np.ndarray  # int64 [nnz], positions in the source's var
    counts: np.ndarray  # uint32 [nnz]; a file may store zeros
    offsets: np.ndarray  # int64 [cells+1], where each cell starts; offsets[0] is 0


class CellTokens(NamedTuple):
    """Counts of some cells by token: ascending and distinct inside a cell, no zeros."""

    genes: np.ndarray  # uint32 [nnz], token ids
    counts: np.ndarray  # uint32 [nnz], at least 1
    offsets: np.ndarray  # int64 [cells+1], where each cell starts; offsets[0] is 0
    totals: np.ndarray  # int64 [cells], all counts of the cell, those of unmatched genes included


def take(cells: CellTokens, rows: np.ndarray) -> CellTokens:
    """Some of the cells, in the order of `rows` (int64, may repeat)."""
    lengths = np.diff(cells.offsets)[rows]
    offsets = np.concatenate([[0], np.cumsum(lengths)])
    positions = np.arange(offsets[-1]) + np.repeat(cells.offsets[rows] - offsets[:-1], lengths)
    return CellTokens(cells.genes[positions], cells.counts[positions], offsets, cells.totals[rows])


def sum_by_cell(values: np.ndarray, offsets: np.ndarray) -> np.ndarray:
    """The sum of each cell's values, [cells], in the dtype of `values` (wrapping); 0 for an empty cell."""
    sums = np.zeros(len(offsets) - 1, dtype=values.dtype)
    filled = offsets[1:] > offsets[:-1]
    if filled.any():  # reduceat gives an empty segment the value that follows it, so only filled cells go in
        sums[filled] = np.add.reduceat(values, offsets[:-1][filled])
    return sums


def to_tokens(counts: Counts, gene_map: "GeneMap") -> CellTokens:
    """Map columns to tokens: unmatched columns leave, columns of one token are summed, tokens are sorted, zeros are gone.

    Raises
    ------
    UserError
        If a sum passes 2³²−1.
    """
    n_cells = len(counts.offsets) - 1
    totals = sum_by_cell(counts.counts.astype(np.int64), counts.offsets)
    cells = np.repeat(np.arange(n_cells), np.diff(counts.offsets))
    tokens = gene_map.tokens[counts.columns]
    keep = (tokens >= 0) & (counts.counts > 0)
    # one integer a (cell, token); equal ones are summed, so the sort need not be stable, and the plain one is vectorised
    keys = (cells[keep] << 32) | tokens[keep]
    order = np.argsort(keys)
    keys = keys[order]
    values = counts.counts[keep][order]
    first = np.ones(len(keys), dtype=bool)
    first[1:] = keys[1:] != keys[:-1]
    if not first.all():
        sums = np.add.reduceat(values.astype(np.int64), np.flatnonzero(first))
        if sums.max() > MAX_COUNT:
            raise UserError(f"the counts of columns that name one gene sum to {sums.max()} in one cell, over 2³²−1.")
        keys, values = keys[first], sums.astype(np.uint32)
    return CellTokens(
        genes=(keys & 0xFFFFFFFF).astype(np.uint32),
        counts=values,
        offsets=np.searchsorted(keys, np.arange(n_cells + 1) << 32),
        totals=totals,
    )


def content_hash(genes: np.ndarray, counts: np.ndarray, offsets: np.ndarray) -> np.ndarray:
    """A hash of what each cell holds, uint64 [cells]; it doesn't depend on the order of the genes inside a cell.

    The sum (mod 2⁶⁴) over the cell's tokens of a random word of (token, count), mixed once more. An empty cell is the hash
    of the empty sum. Zeros must be gone. Two different cells collide with probability 2⁻⁶⁴.

    Parameters
    ----------
    genes, counts
        Integers [nnz], as in CellTokens.
    offsets
        int64 [cells+1].
    """
    token_keys = random.bits(random.key(0, random.Stream.CONTENT), genes)
    sums = sum_by_cell(random.bits(token_keys, counts), np.asarray(offsets))
    return random.bits(random.key(1, random.Stream.CONTENT), sums)
