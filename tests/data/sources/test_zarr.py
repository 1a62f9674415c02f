"""zarr stores of AnnData, formats 2 and 3: the counts, obs and genes of the h5ad file with the same cells; damage."""

import shutil

import anndata
import numpy as np
import pandas as pd
import pytest
from scipy import sparse
from write_sources import write_zarr

from scbench import prepare
from scbench.data.obs import Obs
from scbench.data.sources.anndata import AnnDataSource
from scbench.errors import UserError

CELLS, GENES = 70, 13


def make(values):
    obs = pd.DataFrame(
        {
            "label": pd.Categorical([f"l{i % 3}" if i % 7 else None for i in range(CELLS)]),
            "donor": [f"d{i % 5}" for i in range(CELLS)],
            "age": np.arange(CELLS),
            "score": np.where(np.arange(CELLS) % 4, np.arange(CELLS) / 3, np.nan),
            "maybe": pd.array([None if i % 3 == 0 else i for i in range(CELLS)], dtype="Int64"),
            "flag": np.arange(CELLS) % 2 == 0,
        },
        index=[f"cell{i}" for i in range(CELLS)],
    )
    var = pd.DataFrame({"gene_ids": [f"ENSG{i:011d}" for i in range(GENES)]}, index=[f"G{i}" for i in range(GENES)])
    return anndata.AnnData(values, obs=obs, var=var, uns={"license": "CC0 1.0"})


@pytest.fixture
def counts():
    rng = np.random.default_rng(0)
    counts = rng.poisson(rng.gamma(0.3, 4, size=GENES), size=(CELLS, GENES))
    counts[3] = counts[-1] = 0
    return counts


LAYOUTS = {
    "csr": lambda counts: sparse.csr_matrix(counts.astype(np.float32)),
    "csc": lambda counts: sparse.csc_matrix(counts.astype(np.int32)),
    "dense": lambda counts: counts.astype(np.float64),
}


@pytest.mark.parametrize("version", [2, 3])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_store_reads_as_the_file(version, layout, counts, tmp_path):
    adata = make(LAYOUTS[layout](counts))
    adata.write_h5ad(tmp_path / "a.h5ad")
    with AnnDataSource(write_zarr(tmp_path / "a.zarr", adata, version)) as store, AnnDataSource(tmp_path / "a.h5ad") as file:
        assert (store.kind, file.kind, store.n_cells) == ("zarr", "h5ad", CELLS)
        assert store.identity == file.identity and store.licence == file.licence == "CC0 1.0"
        assert store.obs_names.tolist() == file.obs_names.tolist()
        pd.testing.assert_frame_equal(store.obs, file.obs)
        for start, stop in [(0, 1), (0, CELLS), (5, 17), (60, CELLS)]:
            for ours, theirs in zip(store.read(start, stop)[:3], file.read(start, stop)[:3], strict=True):
                np.testing.assert_array_equal(ours, theirs)
    ours, theirs = Obs(tmp_path / "a.zarr"), Obs(tmp_path / "a.h5ad")
    assert ours.columns == theirs.columns
    for column in ours.columns:
        assert ours.kind(column) == theirs.kind(column)
        assert ours.read(column, 5, 40).equals(theirs.read(column, 5, 40))
    assert ours.names(3, 9).equals(theirs.names(3, 9))
    theirs.close()


@pytest.mark.parametrize("version", [2, 3])
def test_layers_and_raw(version, counts, tmp_path):
    adata = make(sparse.csr_matrix(np.log1p(counts)))
    adata.raw = make(sparse.csr_matrix(counts))
    adata.layers["spliced"] = sparse.csr_matrix(counts)
    path = write_zarr(tmp_path / "a.zarr", adata, version)
    with AnnDataSource(path) as source:
        assert source.layer == "raw"
    with AnnDataSource(path, layer="spliced") as source:
        assert source.read(0, CELLS).counts.sum() == counts.sum()


@pytest.mark.parametrize("version", [2, 3])
def test_damaged_obs(version, counts, tmp_path):
    path = write_zarr(tmp_path / "a.zarr", make(LAYOUTS["csr"](counts)), version)
    chunk = path / {2: "obs/donor/categories/0", 3: "obs/donor/categories/c/0"}[version]
    chunk.write_bytes(chunk.read_bytes()[:9])
    with pytest.raises(UserError, match=r"a\.zarr is damaged or not an AnnData"):
        prepare(path, tmp_path / "store", keep_obs="donor", workers=1)
    assert not (tmp_path / "store").exists()


@pytest.mark.parametrize("version", [2, 3])
def test_damage(version, counts, tmp_path):
    path = write_zarr(tmp_path / "a.zarr", make(LAYOUTS["csr"](counts)), version)
    metadata, chunk = {2: (".zgroup", "X/data/0"), 3: ("zarr.json", "X/data/c/0")}[version]
    chunk = path / chunk
    chunk.write_bytes(chunk.read_bytes()[:20])
    with pytest.raises(UserError, match=r"a\.zarr is damaged or not a zarr store"):
        AnnDataSource(path)
    shutil.rmtree(path / "obs")
    for name in (".zmetadata", "zarr.json") if version == 2 else ():
        (path / name).unlink(missing_ok=True)
    with pytest.raises(UserError, match=r"a\.zarr (is a zarr store but not of an AnnData: it has no obs|is damaged)"):
        AnnDataSource(path)
    (path / metadata).unlink()
    with pytest.raises(UserError, match=r"a\.zarr cannot be read as a zarr store"):
        AnnDataSource(path)
