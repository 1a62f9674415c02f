"""scbench: a shard store and `scbench.data.loader.Loader`."""

from collections.abc import Iterator
from pathlib import Path

import numpy as np
from loaders.law import Law

from scbench.config import InputLaw
from scbench.data.batch import CellBatch
from scbench.data.extents import Cells, ExtentCache, SplitReader
from scbench.data.loader import Loader
from scbench.data.order import SampleOrder, default_lanes
from scbench.data.store import Store
from scbench.data.vocabulary import Vocabulary
from scbench.kernels.sampler import CellRows

TRIED = ({},)  # as a run of `scbench pretrain` has it
FILLED = True  # the last batch of an epoch is filled with cells of the next
FORMAT = "shard store: TensorStore zarr3, raw chunks"


def build(corpus: Path, folder: Path) -> None:
    """`scbench prepare`, everything for training."""
    from scbench.data.prepare import prepare

    prepare([corpus / "cells.h5ad"], folder / "store", vocabulary=corpus / "vocabulary.json", split=(1, 0, 0))


def open_split(folder: Path) -> SplitReader:
    """The split to read."""
    return Store.open(folder / "store").split("train")


def training(corpus: Path, folder: Path, law: Law, settings: dict) -> Iterator[CellBatch]:
    """Epoch after epoch."""
    return batches(open_split(folder), corpus, law)


def batches(split: SplitReader, corpus: Path, law: Law) -> Iterator[CellBatch]:
    """Those of scbench's loader."""
    vocabulary = Vocabulary.load(corpus / "vocabulary.json")
    with Loader(split, vocabulary, InputLaw(law.max_genes), seed=law.seed, batch_cells=law.batch_cells,
                micro_batch_cells=None, mask_ratio=law.mask_ratio, weighted_share=law.weighted_share, lanes=None) as loader:
        while True:
            yield next(loader)[0]


def rows(corpus: Path, folder: Path, law: Law, settings: dict) -> Iterator[Cells]:
    """Raw cells in the loader's order, copied batch by batch (the loader itself samples them where they lie)."""
    for cells in _located(open_split(folder), law):
        if isinstance(cells, CellRows):
            yield Cells(*cells.copied())


def shuffled(corpus: Path, folder: Path, law: Law, settings: dict) -> Iterator[Cells]:
    """The extents of epochs, read and checked, and all that the loader does to mix their cells: every batch is located."""
    for cells in _located(open_split(folder), law):
        if isinstance(cells, Cells):
            yield cells


def _located(split: SplitReader, law: Law) -> Iterator[Cells | CellRows]:
    """Group by group, its extents as they are read, then its cells in batches, in the loader's order."""
    order = _order(split, law)
    cache = ExtentCache(split)
    start = 0
    while True:
        group = order.group(start)
        cache.keep_only(set())
        for extent in group.extents:
            cache.read([int(extent)])
            [piece] = cache.rows(np.array([extent]), np.zeros(1, dtype=np.int64)).pieces
            yield Cells(piece.genes, piece.counts, piece.offsets)
        for first in range(start, group.stop, law.batch_cells):
            located = order.locate(first, min(first + law.batch_cells, group.stop))
            yield cache.rows(located.extents, located.indices)
        start = group.stop


def extents(corpus: Path, folder: Path, law: Law, settings: dict) -> Iterator[Cells]:
    """Whole extents in the order of the epochs, each read and checked."""
    return in_order(open_split(folder), law)


def in_order(split: SplitReader, law: Law) -> Iterator[Cells]:
    """A split's extents in the order in which the epochs meet them."""
    order = _order(split, law)
    start = 0
    while True:
        group = order.group(start)
        for extent in group.extents.tolist():
            yield Cells(*split.read_extent(extent))
        start = group.stop


def _order(split: SplitReader, law: Law) -> SampleOrder:
    return SampleOrder(split.extent_sizes, law.seed, default_lanes(len(split.extent_sizes), law.batch_cells))
