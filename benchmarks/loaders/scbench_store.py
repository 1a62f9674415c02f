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

TRIED = ({},)  # as a run of `scbench pretrain` has it
ENDLESS = True  # the last batch of an epoch is filled with cells of the next
FORMAT = "shard store: TensorStore zarr3, raw chunks"


def build(corpus: Path, folder: Path) -> None:
    """`scbench prepare`, everything for training."""
    from scbench.data.prepare import prepare

    prepare([corpus / "cells.h5ad"], folder / "store", vocabulary=corpus / "vocabulary.json", split=(1, 0, 0))


def open_split(folder: Path) -> SplitReader:
    """The split to read."""
    return Store.open(folder / "store").split("train")


def training(corpus: Path, folder: Path, law: Law, settings: dict) -> Iterator[CellBatch]:
    """An epoch and what fills its last batch."""
    return batches(open_split(folder), corpus, law)


def batches(split: SplitReader, corpus: Path, law: Law) -> Iterator[CellBatch]:
    """Those of scbench's loader; the samples past the epoch's end are the next epoch's."""
    vocabulary = Vocabulary.load(corpus / "vocabulary.json")
    with Loader(split, vocabulary, InputLaw(law.max_genes), seed=law.seed, batch_cells=law.batch_cells,
                micro_batch_cells=None, mask_ratio=law.mask_ratio, weighted_share=law.weighted_share, lanes=None) as loader:
        for _ in range(-(-split.n_cells // law.batch_cells)):
            yield next(loader)[0]


def rows(corpus: Path, folder: Path, law: Law, settings: dict) -> Iterator[Cells]:
    """Raw cells in the loader's order."""
    split = open_split(folder)
    order = SampleOrder(split.extent_sizes, law.seed, default_lanes(len(split.extent_sizes), law.batch_cells))
    cache = ExtentCache(split)
    for start in range(0, split.n_cells, law.batch_cells):
        located = order.locate(np.arange(start, min(start + law.batch_cells, split.n_cells)))
        cache.keep_only({*order.group(start).extents.tolist(), *located.extents.tolist()})
        cache.read(np.unique(located.extents).tolist())
        yield cache.gather(located.extents, located.indices)


def extents(corpus: Path, folder: Path, law: Law, settings: dict) -> Iterator[Cells]:
    """Whole extents in an epoch's order, each read and checked."""
    return in_order(open_split(folder), law)


def in_order(split: SplitReader, law: Law) -> Iterator[Cells]:
    """A split's extents in the order in which an epoch meets them."""
    order = SampleOrder(split.extent_sizes, law.seed, default_lanes(len(split.extent_sizes), law.batch_cells))
    start = 0
    while start < split.n_cells:
        group = order.group(start)
        for extent in group.extents.tolist():
            yield Cells(*split.read_extent(extent))
        start = group.stop
