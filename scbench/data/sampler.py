"""From raw cells to a batch: genes drawn, masked, turned into input values, put in order, packed.

What is drawn and masked depends on seed, key and gene alone, not on the model: two models with the same `max_genes` see the
same genes and hide the same ones, whatever their values and order.
"""

from typing import NamedTuple

import numpy as np

from scbench.config import InputLaw
from scbench.data.batch import CellBatch, make_cells, pack_cells
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
from scbench.errors import UserError
from scbench.kernels import random, sampler
from scbench.kernels.native import BuildError
from scbench.kernels.random import Stream
from scbench.kernels.sampler import CellRows, Law, Piece


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
        self._cls, self._pad = vocabulary.cls, vocabulary.pad
        self._seed = seed
        subset_key, weighted_key, mask_key = (
            random.key(seed, stream) for stream in (Stream.SUBSET, Stream.SUBSET_LAW, Stream.MASK)
        )
        self._law = Law(subset_key, weighted_key, weighted_share, mask_key, mask_ratio, inputs.max_genes)
        try:
            self._native = sampler.library() is not None and inputs.order != "drawn"
            self._at_once = self._native and inputs == InputLaw(inputs.max_genes)
        except BuildError as error:
            raise UserError(f"{error}.") from error

    def draw(self, cells: Cells | CellTokens | CellRows, keys: np.ndarray) -> Sampled:
        """One draw of each cell; `keys`, int64 or uint64 [B], are what it depends on."""
        law = self.inputs
        rows = cells if isinstance(cells, CellRows) else _rows(cells)
        if self._native and rows.takes:
            drawn = sampler.draw(rows, keys, self._law)
        else:
            drawn = self._draw_numpy(Cells(*rows.copied()) if rows is cells else cells, keys)
        genes, counts, values, masked, positions, offsets, totals = drawn
        lengths = np.diff(offsets)
        if law.preprocess == "bin":
            raw = Cells(*rows.copied()) if rows is cells else cells
            values = quantile_bins(raw.counts, raw.offsets)[positions + np.repeat(raw.offsets[:-1], lengths)]
        elif law.preprocess == "bin_aaai2025":
            words = self._words(Stream.BINS, keys, genes, lengths)
            values = reference_bins(values, offsets, words, law.pad_to or law.max_genes)
        elif law.normalize == "total":
            values = normalized_counts(counts, np.repeat(totals, lengths))
        sampled = Sampled(genes, counts, values, masked, offsets, totals)
        if law.order == "random":
            words = self._words(Stream.ORDER, keys, genes, lengths)
            order = np.lexsort((words, np.repeat(np.arange(len(lengths)), lengths)))
            sampled = Sampled(genes[order], counts[order], values[order], masked[order], offsets, totals)
        return sampled

    def _draw_numpy(self, cells: Cells | CellTokens, keys: np.ndarray) -> sampler.Drawn:
        starts = np.asarray(cells.offsets)
        kept, offsets = draw_genes(
            cells.genes, cells.counts, starts, keys, seed=self._seed, max_genes=self.inputs.max_genes,
            weighted_share=self._law.weighted_share, in_draw_order=self.inputs.order == "drawn",
        )
        genes, counts = cells.genes[kept], cells.counts[kept]
        masked = np.zeros(len(genes), dtype=bool)
        if self._law.mask_ratio:
            masked = draw_mask(genes, offsets, keys, seed=self._seed, ratio=self._law.mask_ratio)
        positions = kept - np.repeat(starts[:-1], np.diff(offsets))
        totals = library_sizes(cells.counts, starts)
        return sampler.Drawn(genes, counts, log1p_counts(counts), masked, positions, offsets, totals)

    def _words(self, stream: Stream, keys: np.ndarray, genes: np.ndarray, lengths: np.ndarray) -> np.ndarray:
        return random.bits(np.repeat(random.bits(random.key(self._seed, stream), keys), lengths), genes)

    def pack(self, sampled: Sampled, rows: np.ndarray, samples: np.ndarray, numbers: np.ndarray) -> CellBatch:
        """The batch of some of the cells: their `rows` in `sampled`, their sample numbers and their own numbers, [B] each."""
        starts, lengths = sampled.offsets[rows], np.diff(sampled.offsets)[rows]
        return pack_cells(
            sampled.genes, sampled.values, sampled.counts, sampled.masked, starts, lengths,
            library_sizes=sampled.library_sizes[rows], cls_token=self._cls, pad_token=self._pad, pad_to=self.inputs.pad_to,
            samples=samples, cells=numbers,
        )

    def make(self, cells: CellRows, samples: np.ndarray, numbers: np.ndarray) -> CellBatch:
        """The batch of cells keyed by their sample numbers, int64 [B]: `draw` and `pack` in one."""
        if self._at_once and cells.takes:
            return make_cells(cells, self._law, cls_token=self._cls, samples=samples, cells=numbers)
        return self.pack(self.draw(cells, samples), np.arange(len(cells)), samples, numbers)


def _rows(cells: Cells | CellTokens) -> CellRows:
    piece = Piece(cells.genes, cells.counts, cells.offsets)
    return CellRows([piece], np.zeros(piece.n_cells, dtype=np.int64), np.arange(piece.n_cells))


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
