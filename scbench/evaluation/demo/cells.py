"""The cells of the demo: 700 PBMCs that ship with scanpy, or a bounded number of cells of the user's own file."""

from pathlib import Path

import anndata
import numpy as np
import pandas as pd
import scipy.sparse

from scbench.data.sources.anndata import AnnDataSource
from scbench.errors import UserError
from scbench.evaluation.labelled_cells import take_counts
from scbench.evaluation.labels import SMALLEST_CLASS, read_labels
from scbench.kernels import random
from scbench.kernels.random import Stream

MOST_CELLS = 4000  # of a user's file: what fits into three minutes
PBMC_LABEL = "bulk_labels"
_CELLS = 4  # what a key of Stream.EVALUATION decides, beside those of the other files


def pbmcs() -> anndata.AnnData:
    """scanpy's pbmc68k_reduced with its counts brought back: 700 cells × 765 genes.

    Its `.raw` holds log1p of counts per 10⁴ with three decimals and obs["n_counts"] the totals: the product lies within
    0.1 of an integer.
    """
    try:
        import scanpy
    except ImportError:
        raise UserError(
            "the demo's cells come with scanpy, which is not installed: pip install 'scbench[demo]', or give your own h5ad."
        ) from None
    found = scanpy.datasets.pbmc68k_reduced()
    values = scipy.sparse.csr_matrix(found.raw.X, dtype=np.float64)
    totals = found.obs["n_counts"].to_numpy(dtype=np.float64)
    values.data = np.rint(np.expm1(values.data) * np.repeat(totals, np.diff(values.indptr)) / 1e4)
    values.eliminate_zeros()
    return anndata.AnnData(
        X=values.astype(np.int32),
        obs=pd.DataFrame({PBMC_LABEL: found.obs[PBMC_LABEL].astype(str)}, index=found.obs_names.astype(str)),
        var=pd.DataFrame(index=found.raw.var_names.astype(str)),
    )


def own_cells(path: Path, label: str, test_share: float, seed: int) -> anndata.AnnData:
    """At most MOST_CELLS cells of a file, drawn at random, counts in X; UserError if the label can't be benchmarked.

    Parameters
    ----------
    path, label
        The h5ad file and the column of obs to predict.
    test_share
        The share of cells that the benchmark will see: two classes must keep enough of them.
    seed
        Of the draw.
    """
    with AnnDataSource(path) as source:
        labels = read_labels(source.obs, label, source.name)
        rows = np.sort(random.permutation(random.key(seed, Stream.EVALUATION, _CELLS), source.n_cells)[:MOST_CELLS])
        known = labels[rows][[label is not None for label in labels[rows]]].astype(str)
        sizes = np.unique(known, return_counts=True)[1]
        if (sizes * test_share >= SMALLEST_CLASS).sum() < 2:
            raise UserError(
                f"{source.name} has fewer than two classes of {round(SMALLEST_CLASS / test_share)} cells in {label!r}: "
                "choose another --label or give more cells."
            )
        genes = source.identity
        names = [id_ or symbol or f"column {i}" for i, (id_, symbol) in enumerate(zip(genes.ids, genes.symbols, strict=True))]
        return anndata.AnnData(
            X=take_counts(source, rows).astype(np.int32),
            obs=source.obs.iloc[rows],
            var=pd.DataFrame({"gene_symbols": [symbol or "" for symbol in genes.symbols]}, index=names),
        )
