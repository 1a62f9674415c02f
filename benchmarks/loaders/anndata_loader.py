"""anndata's own loader, `anndata.experimental.AnnLoader`, over a backed h5ad file: rows in random order."""

import warnings
from collections.abc import Iterator
from pathlib import Path

import anndata
from loaders.law import Law

from scbench.data.extents import Cells

warnings.filterwarnings("ignore")  # deprecation notices, once a batch

# Cells of a batch (cut to training batches later), batches read ahead by a thread.
TRIED = tuple({"batch": batch, "ahead": ahead} for batch, ahead in ((1024, 0), (8192, 0), (1024, 2), (8192, 2)))
FORMAT = "h5ad, CSR, uncompressed"


def build(corpus: Path, folder: Path) -> None:
    """Nothing: it reads the h5ad file itself."""


def rows(corpus: Path, folder: Path, law: Law, settings: dict) -> Iterator[Cells]:
    """Raw rows, epoch after epoch, sparse: no conversion to dense tensors."""
    import torch
    from anndata.experimental import AnnLoader

    torch.manual_seed(law.seed)
    source = anndata.read_h5ad(corpus / "cells.h5ad", backed="r")
    loader = AnnLoader(source, batch_size=settings["batch"], shuffle=True, use_default_converter=False)
    while True:
        for view in loader:
            matrix = view.X
            yield Cells(matrix.indices, matrix.data, matrix.indptr)
