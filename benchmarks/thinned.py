"""More cells than there are real ones at hand: real cells repeated, and thinned so that no two are alike."""

from pathlib import Path

import anndata
import numpy as np
import pandas as pd
import scipy.sparse as sp

from scbench.errors import UserError

KEPT = 0.8  # probability that a molecule of a repeated cell is kept


def read_cells(file: Path) -> anndata.AnnData:
    """The cells of an h5ad with raw counts in X."""
    if not file.is_file():
        raise UserError(f"there is no file {file}.")
    cells = anndata.read_h5ad(file)
    cells.X = sp.csr_matrix(cells.X, dtype=np.float32)
    return cells


def repeat(cells: anndata.AnnData, copies: int, rng: np.random.Generator) -> anndata.AnnData:
    """`copies` of the cells, one block after the other, as they are in the first; obs is left out but for the names."""
    blocks = [sp.csr_matrix(cells.X)]
    for _ in range(copies - 1):
        kept = rng.binomial(cells.X.data.astype(np.int64), KEPT).astype(np.float32)
        blocks.append(sp.csr_matrix((kept, cells.X.indices, cells.X.indptr), shape=cells.shape, copy=True))
        blocks[-1].eliminate_zeros()
    obs = pd.DataFrame(index=[f"{name}-{copy}" for copy in range(copies) for name in cells.obs_names])
    return anndata.AnnData(sp.vstack(blocks, format="csr"), obs=obs, var=pd.DataFrame(index=cells.var_names))
