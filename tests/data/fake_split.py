"""A split in memory behind the interface of a store's, its windows, and a slow oracle of what a window holds."""

import itertools
import time
import weakref
from types import SimpleNamespace

import numpy as np

from scbench.config import InputLaw
from scbench.data.batch import CellBatch
from scbench.data.loader import Loader, validation_batches
from scbench.data.sampling import draw_genes, draw_mask
from scbench.data.values import log1p_counts

CLS_TOKEN = 301
VOCABULARY = SimpleNamespace(cls=CLS_TOKEN, pad=300)
OPTIONS = {"seed": 7, "batch_cells": 24, "micro_batch_cells": 5, "inputs": InputLaw(20), "mask_ratio": 0.4,
           "weighted_share": 0.5, "lanes": 3}  # fmt: skip
VALIDATION = {"seed": 7, "inputs": InputLaw(20), "mask_ratio": 0.4, "max_cells": 100, "batch_cells": 16}


class Extent:
    def __init__(self, genes, counts, offsets):
        self.genes, self.counts, self.offsets = genes, counts, offsets


class FakeSplit:
    """Cells in memory behind the interface of a store's split; remembers what was read and what is still held."""

    def __init__(self, n_cells: int, extent_cells: int, genes: tuple[int, int] = (0, 40), delay: float = 0.0):
        full, rest = divmod(n_cells, extent_cells)
        self.extent_sizes = np.array([extent_cells] * full + [rest] * (rest > 0), dtype=np.int64)
        self.n_cells = n_cells
        rng = np.random.default_rng(n_cells)
        self.lengths = rng.integers(genes[0], genes[1] + 1, n_cells)
        self.offsets = np.concatenate([[0], np.cumsum(self.lengths)])
        some = [np.sort(rng.choice(300, n, replace=False)) for n in range(genes[1] + 1)]
        self.genes = np.concatenate([np.zeros(0, np.int64), *(some[n] for n in self.lengths)]).astype(np.uint16)
        self.counts = rng.geometric(0.4, len(self.genes)).astype(np.uint8)
        self.starts = np.concatenate([[0], np.cumsum(self.extent_sizes)])
        self.delay = delay
        self.reads: list[int] = []
        self.most_held = 0
        self.held = 0

    def cell(self, number: int) -> tuple[np.ndarray, np.ndarray]:
        row = slice(self.offsets[number], self.offsets[number + 1])
        return self.genes[row], self.counts[row]

    def read_extent(self, extent: int) -> Extent:
        time.sleep(self.delay)
        self.reads.append(extent)
        offsets = self.offsets[self.starts[extent] : self.starts[extent + 1] + 1]
        row = slice(offsets[0], offsets[-1])
        # wider counts in every other extent, as the shards of a store may have
        counts = self.counts[row].astype(np.uint16 if extent % 2 else np.uint8)
        arrays = Extent(self.genes[row].copy(), counts, offsets - offsets[0])
        self.held += 1
        self.most_held = max(self.most_held, self.held)
        weakref.finalize(arrays.genes, self._dropped)
        return arrays

    def _dropped(self) -> None:
        self.held -= 1


def windows(split, steps: int, **options) -> list[list[CellBatch]]:
    with Loader(split, VOCABULARY, **OPTIONS | options) as loader:
        return list(itertools.islice(loader, steps))


def validation(split, **options) -> list[CellBatch]:
    return list(validation_batches(split, VOCABULARY, **VALIDATION | options))


def cells_of(batch: CellBatch) -> list[tuple]:
    """A batch as one comparable record a cell."""
    hidden = np.zeros(len(batch.genes), dtype=bool)
    hidden[batch.masked.numpy()] = True
    true_values = batch.values.numpy().copy()
    true_values[batch.masked.numpy()] = batch.targets.numpy()
    return [
        (int(sample), int(cell), batch.genes[a:b].tolist(), true_values[a:b].tolist(), hidden[a:b].tolist())
        for sample, cell, (a, b) in zip(
            batch.samples, batch.cells, itertools.pairwise(batch.cell_offsets.tolist()), strict=True
        )
    ]


def regrouped(window: list[CellBatch]) -> list[tuple]:
    """The window's cells, whatever micro-batch they were in."""
    return sorted(record for batch in window for record in cells_of(batch))


def oracle_cell(split, number, key, *, seed, mask_ratio, weighted_share, max_genes=20) -> tuple:
    """One cell by itself."""
    genes, counts = split.cell(number)
    offsets, samples = np.array([0, len(genes)]), np.array([key])
    kept, offsets = draw_genes(genes, counts, offsets, samples, seed=seed, max_genes=max_genes, weighted_share=weighted_share)
    masked = draw_mask(genes[kept], offsets, samples, seed=seed, ratio=mask_ratio)
    return (
        key, number, [CLS_TOKEN, *genes[kept].tolist()], [0.0, *log1p_counts(counts[kept]).tolist()],
        [False, *masked.tolist()],
    )  # fmt: skip
