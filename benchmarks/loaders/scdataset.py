"""scDataset over an h5ad file: blocks of rows fetched many at a time, shuffled in memory."""

from collections.abc import Iterator
from pathlib import Path

import anndata
import h5py
import numpy as np
from loaders.law import Law
from loaders.tokenise import Tokeniser
from scdataset import BlockShuffling, scDataset
from scipy import sparse
from torch.utils.data import DataLoader, get_worker_info

from scbench.data.batch import CellBatch
from scbench.data.extents import Cells
from scbench.data.vocabulary import Vocabulary

# Blocks, the cells of one fetch, cells of a batch that it yields (cut to training batches later), worker processes (which then
# tokenise too), batches read ahead by a thread.
TRIED = tuple({"block": block, "fetch": fetch, "batch": batch, "workers": workers, "ahead": ahead}
              for block, fetch, batch, workers, ahead in (
    (64, 8192, 128, 0, 0), (256, 8192, 128, 0, 0), (1024, 16384, 1024, 0, 0), (256, 8192, 1024, 0, 2), (256, 8192, 128, 1, 0),
    (256, 8192, 128, 2, 0)))
FORMAT = "h5ad, CSR, uncompressed"


def build(corpus: Path, folder: Path) -> None:
    """Nothing: it reads the h5ad file itself."""


class BackedRows:
    """The matrix of an h5ad file, opened in the process that reads it."""

    def __init__(self, path: Path) -> None:
        self._path, self._matrix = path, None

    def __len__(self) -> int:
        with h5py.File(self._path) as file:
            return len(file["X/indptr"]) - 1

    def __getitem__(self, rows: np.ndarray) -> sparse.csr_matrix:
        if self._matrix is None:
            self._matrix = anndata.io.sparse_dataset(h5py.File(self._path)["X"])
        return self._matrix[rows]


def rows(corpus: Path, folder: Path, law: Law, settings: dict) -> Iterator[Cells]:
    """Raw rows, epoch after epoch."""
    for batch in _batches(corpus, law, settings, None):
        yield _cells(batch)


def training_in_workers(corpus: Path, law: Law, settings: dict) -> Iterator[CellBatch]:
    """The same, tokenised by the processes that read."""
    yield from _batches(corpus, law, settings, TokeniseInWorker(corpus, law))


class TokeniseInWorker:
    """A batch of scDataset to a CellBatch."""

    def __init__(self, corpus: Path, law: Law) -> None:
        self._corpus, self._law, self._tokenise = corpus, law, None

    def __call__(self, batch: sparse.csr_matrix) -> CellBatch:
        if self._tokenise is None:
            vocabulary = Vocabulary.load(self._corpus / "vocabulary.json")
            self._tokenise = Tokeniser(vocabulary, self._law, first=get_worker_info().id << 40)
        [made] = self._tokenise(_cells(batch))
        return made


def _batches(corpus: Path, law: Law, settings: dict, transform: TokeniseInWorker | None) -> Iterator:
    dataset = scDataset(BackedRows(corpus / "cells.h5ad"), BlockShuffling(block_size=settings["block"]),
                        batch_size=settings["batch"], fetch_factor=settings["fetch"] // settings["batch"],
                        batch_transform=transform, seed=law.seed)
    workers = {"num_workers": settings["workers"]}
    if settings["workers"]:
        # as its documentation says; the processes stay from epoch to epoch
        workers |= {"prefetch_factor": settings["fetch"] // settings["batch"] + 1, "persistent_workers": True}
    loader = DataLoader(dataset, batch_size=None, **workers)
    while True:
        yield from loader


def _cells(batch: sparse.csr_matrix) -> Cells:
    return Cells(batch.indices, batch.data, batch.indptr)
