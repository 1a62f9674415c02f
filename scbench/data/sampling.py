"""The random part of a training sample: which genes of a long cell are shown, and which of those are masked.

Every decision comes from the keyed generator: word `gene` of the key `bits(key(seed, stream), sample)`. So it depends on
the seed, the sample number and the gene alone, not on the batch, the rank or the order in which cells are built; and not
on the machine: weighted draws use a logarithm of their own (kernels/logarithm.py). kernels/sampler.c does the same, faster.
"""

import numpy as np

from scbench.kernels import random
from scbench.kernels.logarithm import log, log1p
from scbench.kernels.random import Stream

WEIGHT_FLOOR = 1e-5  # added to every weight, as the reference does: a cell's least expressed genes are almost never drawn
_BLOCK_GENES = 1 << 14  # genes worked on at a time: their words stay in a core's cache


def draw_genes(
    genes: np.ndarray,
    counts: np.ndarray,
    offsets: np.ndarray,
    samples: np.ndarray,
    *,
    seed: int,
    max_genes: int,
    weighted_share: float,
    in_draw_order: bool = False,
) -> tuple[np.ndarray, np.ndarray]:
    """At most `max_genes` genes of each cell.

    A cell with at most `max_genes` genes keeps all. Of a longer one `max_genes` are drawn without replacement: uniformly
    (those with the smallest random words) or, with probability `weighted_share`, by weight w = v − min v + 1e-5 where
    v = ln(1 + count) (those with the smallest −ln(u) / w: exponential clocks, the law of torch.multinomial).
    Source: the AAAI 2025 benchmark's sampling, where that probability is 1/2 in pretraining.

    Parameters
    ----------
    genes, counts
        int [N]: token ids and raw counts, cell by cell.
    offsets
        int [B+1]: where each cell starts.
    samples
        int64 or uint64 [B]: what the draw is keyed by.
    seed
        Any integer.
    max_genes
        At least 1.
    weighted_share
        Share of the long cells' draws that go by weight.
    in_draw_order
        Give a long cell's genes in the order in which they are drawn.

    Returns
    -------
    positions
        int64 [n]: the kept genes' positions in `genes`, ascending (or as drawn) in each cell.
    offsets
        int64 [B+1]: where each cell starts in them.
    """
    offsets = np.asarray(offsets, dtype=np.int64)
    lengths = np.diff(offsets)
    keep = np.ones(len(genes), dtype=bool)
    keys = random.bits(random.key(seed, Stream.SUBSET), samples)
    by_weight = random.below(random.bits(random.key(seed, Stream.SUBSET_LAW), samples), weighted_share)
    rank = np.zeros(len(genes) if in_draw_order else 0, dtype=np.uint64)  # short cells' genes are equal: they keep their order
    for cells in _blocks(np.flatnonzero(lengths > max_genes), lengths):
        first, end = cells[0], cells[-1] + 1
        start, stop = offsets[first], offsets[end]  # short cells in between are few or short
        clocks = random.bits(np.repeat(keys[first:end], lengths[first:end]), genes[start:stop])
        weighted = np.flatnonzero(by_weight[first:end] & (lengths[first:end] > max_genes)) + first
        if len(weighted):
            chosen = np.concatenate([np.arange(offsets[cell], offsets[cell + 1]) for cell in weighted.tolist()])
            clocks[chosen - start] = _weighted_clocks(clocks[chosen - start], counts[chosen], lengths[weighted])
        for cell in cells.tolist():
            row = slice(offsets[cell], offsets[cell + 1])
            _keep_smallest(clocks[row.start - start : row.stop - start], max_genes, keep[row])
        if in_draw_order:
            rank[start:stop] = np.where(np.repeat(lengths[first:end] > max_genes, lengths[first:end]), clocks, 0)
    positions = np.flatnonzero(keep)
    if in_draw_order:
        cell_of = np.repeat(np.arange(len(lengths)), lengths)
        positions = positions[np.lexsort((rank[positions], cell_of[positions]))]
    return positions, np.concatenate([[0], np.cumsum(np.minimum(lengths, max_genes))])


def draw_mask(genes: np.ndarray, offsets: np.ndarray, samples: np.ndarray, *, seed: int, ratio: float) -> np.ndarray:
    """Which genes are masked, bool [N]: each with probability `ratio`, independently. Arguments as in `draw_genes`."""
    keys = random.bits(random.key(seed, Stream.MASK), samples)
    return random.below(random.bits(np.repeat(keys, np.diff(offsets)), genes), ratio)


def _blocks(cells: np.ndarray, lengths: np.ndarray) -> list[np.ndarray]:
    """Ascending `cells` in runs that span about _BLOCK_GENES genes."""
    if len(cells) == 0:
        return []
    before = (np.cumsum(lengths) - lengths)[cells]
    return np.split(cells, np.flatnonzero(np.diff(before // _BLOCK_GENES)) + 1)


def _weighted_clocks(words: np.ndarray, counts: np.ndarray, lengths: np.ndarray) -> np.ndarray:
    """The bits of −ln(u) / w, uint64: positive floats are in the order of their bits. The cells lie one after the other."""
    values = log1p(counts)
    lowest = np.minimum.reduceat(values, np.cumsum(lengths) - lengths)
    return (-log(random.uniform(words)) / (values - np.repeat(lowest, lengths) + WEIGHT_FLOOR)).view(np.uint64)


def _keep_smallest(clocks: np.ndarray, number: int, keep: np.ndarray) -> None:
    """Set bool `keep` True at the `number` smallest of `clocks`, False elsewhere; the first ones of equal clocks win."""
    np.less_equal(clocks, np.partition(clocks, number - 1)[number - 1], out=keep)
    if np.count_nonzero(keep) != number:
        keep[:] = False
        keep[np.argsort(clocks, kind="stable")[:number]] = True
