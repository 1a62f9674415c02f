"""annbatch: a shuffled, sharded zarr v3 collection, chunks of rows preloaded and shuffled in memory. Needs Python 3.12."""

from collections.abc import Iterator
from pathlib import Path

import annbatch
import anndata
import numpy as np
import zarr
from loaders.law import Law

from scbench.data.extents import Cells

# Rows of a chunk, chunks preloaded, cells of a batch that it yields (cut to training batches later), compressed or not,
# batches read ahead by a thread.
TRIED = tuple({"chunk": chunk, "preload": preload, "batch": batch, "store": store, "ahead": ahead}
              for chunk, preload, batch, store, ahead in (
    (256, 32, 128, "lz4", 0), (256, 32, 1024, "lz4", 0), (256, 32, 1024, "raw", 0), (1024, 8, 1024, "raw", 0),
    (32, 256, 4096, "raw", 0), (256, 32, 1024, "raw", 2), (1024, 8, 1024, "raw", 2)))
FORMAT = "zarr v3 collection of annbatch, sharded, lz4 (its default) or uncompressed"


def _fast_zarr() -> None:
    zarr.config.set({"codec_pipeline.path": "zarrs.ZarrsCodecPipeline"})  # as its documentation asks for on local disks


def build(corpus: Path, folder: Path) -> None:
    """Two collections, made by annbatch itself."""
    _fast_zarr()
    for name, options in (("lz4", {}), ("raw", {"zarr_compressor": ()})):
        annbatch.DatasetCollection(str(folder / f"{name}.zarr")).add_adatas([str(corpus / "cells.h5ad")], **options)


def rows(corpus: Path, folder: Path, law: Law, settings: dict) -> Iterator[Cells]:
    """Raw rows, epoch after epoch; the matrix alone, no obs."""
    _fast_zarr()
    loader = annbatch.Loader(chunk_size=settings["chunk"], preload_nchunks=settings["preload"], batch_size=settings["batch"],
                             shuffle=True, preload_to_gpu=False, rng=np.random.default_rng(law.seed))
    for group in annbatch.DatasetCollection(str(folder / f"{settings['store']}.zarr"), mode="r"):
        loader.add_dataset(anndata.io.sparse_dataset(group["X"]))
    while True:
        for batch in loader:
            matrix = batch["X"]
            yield Cells(matrix.indices, matrix.data, matrix.indptr)
