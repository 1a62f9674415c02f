"""What a model sees of a count: log1p, log1p of counts per 10,000, or a bin; and the way back to log1p counts."""

import itertools

import numpy as np

from scbench.data.cells import sum_by_cell, wide
from scbench.kernels import random
from scbench.kernels.logarithm import log1p

TOTAL = 10_000  # --normalize total: counts per so many
BINS = 50  # quantile bins 1 … 50; 0 stays for <cls> (the reference's "51 bins")


def log1p_counts(counts: np.ndarray) -> np.ndarray:
    """ln(1 + count), float32, of raw counts of any shape."""
    return log1p(counts).astype(np.float32)


def library_sizes(counts: np.ndarray, offsets: np.ndarray) -> np.ndarray:
    """The sum of each cell's counts, int64 [cells] (float64 for floating counts)."""
    return sum_by_cell(wide(counts), offsets)


def normalized_counts(counts: np.ndarray, totals: np.ndarray) -> np.ndarray:
    """ln(1 + count · 10⁴ / total), float32; `totals` of each count's cell."""
    return np.log1p(counts * (TOTAL / np.maximum(totals, 1))).astype(np.float32)


def quantile_bins(counts: np.ndarray, offsets: np.ndarray) -> np.ndarray:
    """Each expressed gene's bin among its own cell's expressed genes, 1 … BINS, float32 [N].

    With n genes in the cell, s of them smaller and e equal (itself included), the bin is 1 + ⌊BINS (s + e/2) / n⌋: equal
    counts share a bin, larger counts never get a smaller one, and no random choice is made. All expressed genes count, so a
    gene's bin does not depend on which others are drawn or masked.
    """
    lengths = np.diff(offsets)
    if counts.dtype.kind == "f":
        counts = np.unique(counts, return_inverse=True)[1]  # only their order matters
    keys = (np.repeat(np.arange(len(lengths)), lengths) << 32) | counts.astype(np.int64)
    order = np.argsort(keys, kind="stable")
    run_starts = np.flatnonzero(np.concatenate([[True], np.diff(keys[order]) != 0])[: len(keys)])
    run_lengths = np.diff(np.append(run_starts, len(keys)))
    smaller = np.empty(len(keys), dtype=np.int64)
    equal = np.empty(len(keys), dtype=np.int64)
    smaller[order] = np.repeat(run_starts, run_lengths)
    equal[order] = np.repeat(run_lengths, run_lengths)
    smaller -= np.repeat(offsets[:-1], lengths)
    return (1 + BINS * (2 * smaller + equal) // (2 * np.repeat(lengths, lengths))).astype(np.float32)


def reference_bins(values: np.ndarray, offsets: np.ndarray, words: np.ndarray, pad_to: int) -> np.ndarray:
    """The reference's bins of drawn genes, float32 [n], 0 … 49: quantile edges of the *padded* cell, ties spread at random.

    Parameters
    ----------
    values
        float [n], log1p counts of the drawn genes, cell by cell.
    words
        uint64 [n], the random word of each.
    pad_to
        Genes that a cell is padded to; pads are zeros and enter the quantiles.
    """
    bins = np.empty(len(values), dtype=np.float32)
    places = random.uniform(words)
    for start, stop in itertools.pairwise(offsets.tolist()):
        padded = np.zeros(max(pad_to, stop - start))
        padded[: stop - start] = values[start:stop]
        edges = np.quantile(padded, np.linspace(0, 1, BINS))
        below = np.searchsorted(edges, values[start:stop], side="left")
        up_to = np.searchsorted(edges, values[start:stop], side="right")
        bins[start:stop] = np.ceil(places[start:stop] * (up_to - below) + below) - 1
    return bins


def effective_bins(bins: np.ndarray, offsets: np.ndarray) -> float:
    """Distinct bins of a cell, mean over the cells that have genes; NaN without any."""
    lengths = np.diff(offsets)
    pairs = np.unique((np.repeat(np.arange(len(lengths)), lengths) << 8) | bins.astype(np.int64))
    filled = np.count_nonzero(lengths)
    return len(pairs) / filled if filled else float("nan")


def decode_bins(
    predictions: np.ndarray, cells: np.ndarray, bins: np.ndarray, log_counts: np.ndarray, bin_cells: np.ndarray
) -> np.ndarray:
    """log1p counts of predicted bins, float64 [M].

    In each cell a bin means the mean log1p count of the *visible* genes in it (masked ones would leak); between the bins
    that have any, linear; beyond them, the nearest. A cell without visible genes borrows those of all cells.

    Parameters
    ----------
    predictions, cells
        float and int [M]: predicted bins, and their cells.
    bins, log_counts, bin_cells
        [n]: bins, log1p counts and cells of the visible genes.
    """
    decoded = np.empty(len(predictions))
    everywhere = _bin_means(bins, log_counts)
    by_cell = np.argsort(bin_cells, kind="stable")
    for cell in np.unique(cells):
        first, last = np.searchsorted(bin_cells, [cell, cell + 1], sorter=by_cell)
        mine = by_cell[first:last]
        known, means = _bin_means(bins[mine], log_counts[mine]) if len(mine) else everywhere
        chosen = cells == cell
        decoded[chosen] = np.interp(predictions[chosen], known, means)
    return decoded


def _bin_means(bins: np.ndarray, log_counts: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The bins that occur, ascending, and the mean log1p count in each; one bin that means one count if there are none."""
    if len(bins) == 0:
        return np.zeros(1), np.log1p(np.ones(1))
    known, inverse = np.unique(bins, return_inverse=True)
    return known, np.bincount(inverse, weights=log_counts) / np.bincount(inverse)


def decode_normalized(predictions: np.ndarray, totals: np.ndarray) -> np.ndarray:
    """log1p counts, float64 [M], of predicted log1p counts per 10,000; `totals` of each one's cell."""
    return np.log1p(np.expm1(np.clip(predictions.astype(np.float64), 0, 50)) * np.maximum(totals, 1) / TOTAL)
