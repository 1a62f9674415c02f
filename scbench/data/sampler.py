"""From raw cells to a batch: genes drawn, masked, turned into input values, put in order, packed.

What is drawn and masked depends on seed, key and gene alone, not on the model: two models with the same `max_genes` see the
same genes and hide the same ones, whatever their values and order.
"""

from typing import NamedTuple

import numpy as np

from scbench.config import InputLaw
from scbench.data.batch import CellBatch
from scbench.data.cells import CellTokens
from scbench.data.extents import Cells
from scbench.data.sampling import draw_genes, draw_mask
from scbench.data.values import (
    decode_bins,
    decode_normalized,
    library_sizes,
    log1p_counts,
    normalized_counts,
    quantile_bins,
    reference_bins,
)
from scbench.data.vocabulary import Vocabulary
from scbench.kernels import random
from scbench.kernels.random import Stream


class Sampled(NamedTuple):
    """Cells as one draw shows them, cell by cell, each cell's genes in the order of the model's tokens."""

    genes: np.ndarray  # int [n], token ids
    counts: np.ndarray  # int or float [n], raw counts
    values: np.ndarray  # float32 [n], what the model sees unless it is masked
    masked: np.ndarray  # bool [n]
    offsets: np.ndarray  # int64 [B+1]
    library_sizes: np.ndarray  # int64 or float64 [B], all counts of the cell


class CellSampler:
    """Draws and packs cells.

    Parameters
    ----------
    vocabulary
        Gives `<cls>` and `<pad>`.
    inputs
        How a model sees a cell.
    seed
        Of every draw.
    mask_ratio
        Probability that a gene is masked; 0: none is.
    weighted_share
        As in `sampling.draw_genes`.
    """

    def __init__(
        self, vocabulary: Vocabulary, inputs: InputLaw, *, seed: int, mask_ratio: float = 0.0, weighted_share: float = 0.0
    ) -> None:
        self.inputs = inputs
        self._vocabulary = vocabulary
        self._seed = seed
        self._mask_ratio = mask_ratio
        self._weighted_share = weighted_share

    def draw(self, cells: Cells | CellTokens, keys: np.ndarray) -> Sampled:
        """One draw of each cell; `keys`, int64 or uint64 [B], are what it depends on."""
        law = self.inputs
        kept, offsets = draw_genes(
            cells.genes, cells.counts, cells.offsets, keys, seed=self._seed, max_genes=law.max_genes,
            weighted_share=self._weighted_share, in_draw_order=law.order == "drawn",
        )
        genes, counts = cells.genes[kept], cells.counts[kept]
        totals = library_sizes(cells.counts, cells.offsets)
        masked = np.zeros(len(genes), dtype=bool)
        if self._mask_ratio:
            masked = draw_mask(genes, offsets, keys, seed=self._seed, ratio=self._mask_ratio)
        lengths = np.diff(offsets)
        if law.preprocess == "bin":
            values = quantile_bins(cells.counts, np.asarray(cells.offsets))[kept]
        elif law.preprocess == "bin_aaai2025":
            words = self._words(Stream.BINS, keys, genes, lengths)
            values = reference_bins(log1p_counts(counts), offsets, words, law.pad_to or law.max_genes)
        elif law.normalize == "total":
            values = normalized_counts(counts, np.repeat(totals, lengths))
        else:
            values = log1p_counts(counts)
        sampled = Sampled(genes, counts, values, masked, offsets, totals)
        if law.order == "random":
            words = self._words(Stream.ORDER, keys, genes, lengths)
            order = np.lexsort((words, np.repeat(np.arange(len(lengths)), lengths)))
            sampled = Sampled(genes[order], counts[order], values[order], masked[order], offsets, totals)
        return sampled

    def _words(self, stream: Stream, keys: np.ndarray, genes: np.ndarray, lengths: np.ndarray) -> np.ndarray:
        return random.bits(np.repeat(random.bits(random.key(self._seed, stream), keys), lengths), genes)

    def pack(self, sampled: Sampled, rows: np.ndarray, samples: np.ndarray, numbers: np.ndarray) -> CellBatch:
        """The batch of some of the cells: their `rows` in `sampled`, their sample numbers and their own numbers, [B] each."""
        lengths = np.diff(sampled.offsets)[rows]
        starts = np.concatenate([[0], np.cumsum(lengths)])
        positions = np.arange(starts[-1]) + np.repeat(sampled.offsets[rows] - starts[:-1], lengths)
        return CellBatch.pack(
            sampled.genes[positions], sampled.values[positions], starts, sampled.masked[positions],
            counts=sampled.counts[positions], library_sizes=sampled.library_sizes[rows], cls_token=self._vocabulary.cls,
            pad_token=self._vocabulary.pad, pad_to=self.inputs.pad_to, samples=samples, cells=numbers,
        )


def decode(predictions: np.ndarray, sampled: Sampled, inputs: InputLaw) -> np.ndarray:
    """log1p counts, float64 [M], that a model's predictions at the masked genes of `sampled` (in its order) mean."""
    cells = np.repeat(np.arange(len(sampled.library_sizes)), np.diff(sampled.offsets))
    hidden = sampled.masked
    if inputs.preprocess != "log1p":
        return decode_bins(
            predictions, cells[hidden], sampled.values[~hidden], log1p_counts(sampled.counts[~hidden]), cells[~hidden]
        )
    if inputs.normalize == "total":
        return decode_normalized(predictions, sampled.library_sizes[cells[hidden]])
    return predictions.astype(np.float64)
