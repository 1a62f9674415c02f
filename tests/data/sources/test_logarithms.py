"""Files whose values are logarithms: counts come back from log1p, and values as they are reach a model as they are."""

import anndata
import numpy as np
import pandas as pd
import pytest
import scipy.sparse

from scbench.data.sources.anndata import AnnDataSource
from scbench.data.sources.logarithms import LogarithmSource
from scbench.errors import UserError
from scbench.evaluation.embed import opened
from scbench.evaluation.reference_cells import described, values_sentences

COUNTS = np.random.default_rng(0).poisson(1.5, size=(30, 20)) * np.array([1] * 19 + [5000])
GENES = [f"GENE{i}" for i in range(20)]


def adata(X, dtype=np.float32, **layers) -> anndata.AnnData:
    obs = pd.DataFrame(index=[f"cell {i}" for i in range(len(X))])
    return anndata.AnnData(scipy.sparse.csr_matrix(X.astype(dtype)), obs=obs, var=pd.DataFrame(index=GENES), layers=layers)


def dense(source) -> np.ndarray:
    counts = source.read(0, source.n_cells)
    return scipy.sparse.csr_matrix((counts.counts, counts.columns, counts.offsets), (source.n_cells, 20)).toarray()


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_log1p_of_counts_gives_the_counts(tmp_path, dtype):
    adata(np.log1p(COUNTS), dtype, counts=COUNTS + 1).write_h5ad(tmp_path / "cells.h5ad")
    with opened(tmp_path / "cells.h5ad", values="log1p_counts") as source:
        np.testing.assert_array_equal(dense(source), COUNTS)
        assert source.read(0, 1).counts.dtype == np.uint32
        assert described(source) == {
            "name": "cells.h5ad", "layer": "X", "recovered_counts": None, "values": "log1p_counts",
        }
        assert len(values_sentences(source)) == 1
    with opened(adata(COUNTS * 0.3, logged=np.log1p(COUNTS)), layer="logged", values="log1p_counts") as source:
        np.testing.assert_array_equal(dense(source), COUNTS)


def test_what_is_no_log1p_of_counts_is_refused():
    for wrong, said in [
        (np.minimum(COUNTS, 9), "expm1 is no whole number"), (np.log1p(COUNTS * 0.3), r"0\.262364 in cell 'cell 0'"),
        (np.log1p(COUNTS) - 1, "negative values"), (np.where(COUNTS == 1, np.nan, 0), "NaN"), (COUNTS, "infinite or huge"),
    ]:
        with opened(adata(wrong), values="log1p_counts") as source, pytest.raises(UserError, match=said):
            source.read(0, 30)
    with pytest.raises(UserError, match=r"no layer 'x' \(there are: X\)"):
        LogarithmSource(adata(COUNTS), "log1p_counts", layer="x")


def test_values_as_they_are():
    values = np.log1p(COUNTS * np.linspace(0.1, 9, 30)[:, None]).astype(np.float32)
    with opened(adata(values), values="as_is") as source:
        read = dense(source)
        np.testing.assert_array_equal(np.log1p(read).astype(np.float32), values)
        assert "the leakage guard can know no cell by its counts" in values_sentences(source)[0]
        assert described(source)["values"] == "as_is"
    with opened(adata(-values), values="as_is") as source, pytest.raises(UserError, match="negative"):
        source.read(0, 30)
    with opened(adata(values + 15), values="as_is") as source, pytest.raises(UserError, match="give the log1p"):
        source.read(0, 30)


def test_log_normalised_values_give_counts_or_an_error():
    counts = np.where(COUNTS.min(axis=1, keepdims=True) == COUNTS, 1, COUNTS)[:, :19]
    normalised = np.zeros(COUNTS.shape)
    normalised[:, :19] = np.log1p(counts * (1e4 / counts.sum(axis=1, keepdims=True)))
    with opened(adata(normalised, np.float64), values="lognorm") as source:
        np.testing.assert_array_equal(dense(source)[:, :19], counts)
        assert described(source)["values"] == "lognorm"
        assert described(source)["recovered_counts"]["inexact_values"] == 0
        assert "0.00% of the values are no whole multiples" in values_sentences(source)[0]
    noisy = np.log1p(np.random.default_rng(1).lognormal(size=COUNTS.shape))
    with pytest.raises(UserError, match="no counts can be recovered"), opened(adata(noisy), values="lognorm"):
        pass
    with pytest.raises(UserError, match="holds whole numbers in X"), opened(adata(COUNTS), values="lognorm"):
        pass
    with pytest.raises(UserError, match="no raw counts were found"), opened(adata(normalised)):
        pass


def test_counts_are_what_they_were():
    with opened(adata(COUNTS)) as source:
        assert type(source) is AnnDataSource
        np.testing.assert_array_equal(dense(source), COUNTS)
        assert described(source) == {"name": "AnnData", "layer": "X", "recovered_counts": None, "values": "counts"}
        assert values_sentences(source) == []
