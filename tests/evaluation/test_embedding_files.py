"""Embeddings in files: nothing else in a copy changes, and both small formats hold the same numbers."""

import json

import anndata
import h5py
import numpy as np
import pandas as pd
import pyarrow.parquet
import pytest
import scipy.sparse

from scbench.errors import UserError
from scbench.evaluation.embedding_files import check_suffix, write_alone, write_copy

VALUES = np.random.default_rng(0).normal(size=(5, 3)).astype(np.float32)
PROVENANCE = {"seed": 0, "note": "ä"}


def rich_file(path, with_obsm: bool = True) -> None:
    cells = anndata.AnnData(
        X=scipy.sparse.random(5, 7, 0.5, "csr", np.float32, random_state=0),
        obs=pd.DataFrame({"type": pd.Categorical(list("ababa")), "n": range(5)}, index=[f"cell {i}" for i in range(5)]),
        var=pd.DataFrame({"symbol": list("abcdefg")}, index=[f"g{i}" for i in range(7)]),
        uns={"colors": np.array(["red", "blue"]), "nested": {"a": 1, "text": "x"}},
        layers={"counts": np.arange(35).reshape(5, 7)},
    )
    if with_obsm:
        cells.obsm["X_pca"] = np.ones((5, 2))
        cells.obsm["X_scbench"] = np.zeros((5, 9))
    cells.raw = cells
    cells.write_h5ad(path, compression="gzip")
    with h5py.File(path, "r+") as file:
        file["X"].attrs["a note"] = "kept"


def everything(path) -> dict:
    """Each object of a file: attributes, dtype, storage and raw bytes."""
    found = {}

    def visit(name: str, item) -> None:
        attributes = {key: np.asarray(value).tolist() for key, value in item.attrs.items()}
        if isinstance(item, h5py.Dataset):
            value = item[()]
            content = np.asarray(value).tolist() if item.dtype == object else np.asarray(value).tobytes()
            found[name] = (attributes, str(item.dtype), item.shape, item.chunks, item.compression, content)
        else:
            found[name] = (attributes,)

    with h5py.File(path) as file:
        visit("/", file)
        file.visititems(visit)
    return found


@pytest.mark.parametrize("with_obsm", [True, False])
def test_nothing_else_in_the_copy_changes(tmp_path, with_obsm):
    rich_file(tmp_path / "in.h5ad", with_obsm)
    original = (tmp_path / "in.h5ad").read_bytes()
    write_copy(tmp_path / "in.h5ad", tmp_path / "out.h5ad", VALUES, PROVENANCE)
    assert (tmp_path / "in.h5ad").read_bytes() == original
    before, after = everything(tmp_path / "in.h5ad"), everything(tmp_path / "out.h5ad")
    ours = ("obsm/X_scbench", "uns/scbench")
    assert {name: item for name, item in after.items() if name not in ours} == {
        name: item for name, item in before.items() if name not in ours
    }
    read = anndata.read_h5ad(tmp_path / "out.h5ad")
    np.testing.assert_array_equal(read.obsm["X_scbench"], VALUES)
    assert read.obsm["X_scbench"].dtype == np.float32
    assert json.loads(read.uns["scbench"]) == PROVENANCE
    assert sorted(path.name for path in tmp_path.iterdir()) == ["in.h5ad", "out.h5ad"]


def test_a_file_without_obsm_and_uns_groups_gets_them(tmp_path):
    rich_file(tmp_path / "in.h5ad")
    with h5py.File(tmp_path / "in.h5ad", "r+") as file:
        del file["obsm"], file["uns"]
    write_copy(tmp_path / "in.h5ad", tmp_path / "out.h5ad", VALUES, PROVENANCE)
    np.testing.assert_array_equal(anndata.read_h5ad(tmp_path / "out.h5ad").obsm["X_scbench"], VALUES)


def test_an_old_file_is_refused_and_nothing_is_left(tmp_path):
    rich_file(tmp_path / "in.h5ad")
    with h5py.File(tmp_path / "in.h5ad", "r+") as file:
        del file["obsm"]
        file["obsm"] = np.zeros(5, dtype=[("X_pca", "f4", (2,))])
    with pytest.raises(UserError, match="old h5ad format"):
        write_copy(tmp_path / "in.h5ad", tmp_path / "out.h5ad", VALUES, PROVENANCE)
    assert [path.name for path in tmp_path.iterdir()] == ["in.h5ad"]


def test_small_formats_hold_ids_values_and_provenance(tmp_path):
    ids = np.array(["a", "ü", "c", "d", "e"], dtype=object)
    write_alone(tmp_path / "out.npz", ids, VALUES, PROVENANCE)
    write_alone(tmp_path / "out.parquet", ids, VALUES, PROVENANCE)
    with np.load(tmp_path / "out.npz", allow_pickle=False) as file:
        assert file["cell"].tolist() == ids.tolist()
        np.testing.assert_array_equal(file["X_scbench"], VALUES)
        assert json.loads(str(file["provenance"])) == PROVENANCE
    frame = pd.read_parquet(tmp_path / "out.parquet")
    assert frame.columns.tolist() == ["cell", "X_scbench_0", "X_scbench_1", "X_scbench_2"]
    assert frame["cell"].tolist() == ids.tolist()
    np.testing.assert_array_equal(frame.iloc[:, 1:].to_numpy(), VALUES)
    metadata = pyarrow.parquet.read_schema(tmp_path / "out.parquet").metadata
    assert json.loads(metadata[b"scbench"]) == PROVENANCE


@pytest.mark.parametrize(("name", "alone", "good"), [
    ("a.h5ad", False, True), ("a.npz", True, True), ("a.parquet", True, True),
    ("a.npz", False, False), ("a", False, False), ("a.csv", True, False), ("a.h5ad", True, False),
])
def test_suffixes(tmp_path, name, alone, good):
    if good:
        check_suffix(tmp_path / name, alone)
    else:
        with pytest.raises(UserError, match=name):
            check_suffix(tmp_path / name, alone)
