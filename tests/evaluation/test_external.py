"""Embeddings from elsewhere: matched by cell id or by place, and what is wrong with them said in a sentence."""

import hashlib

import anndata
import numpy as np
import pandas as pd
import pytest
import scipy.sparse

from scbench.data.sources.anndata import AnnDataSource
from scbench.errors import UserError
from scbench.evaluation.embedding_files import write_alone
from scbench.evaluation.external import ExternalEmbedding, open_model
from scbench.evaluation.predictions_files import ExternalPredictions
from scbench.models.model import ExpressionModel

VALUES = np.random.default_rng(0).normal(size=(5, 3)).astype(np.float32)
IDS = np.array(["a", "b", "ü", "d", "e"], dtype=object)


def source(names=IDS, **obsm) -> AnnDataSource:
    cells = anndata.AnnData(scipy.sparse.csr_matrix(np.arange(len(names) * 4).reshape(-1, 4)), obsm=obsm)
    cells.obs_names, cells.var_names = list(names), ["GENE1", "GENE2", "GENE3", "GENE4"]
    return AnnDataSource(cells)


@pytest.mark.parametrize("suffix", ["npz", "parquet"])
def test_what_embed_writes_is_matched_by_cell_id(tmp_path, suffix):
    write_alone(tmp_path / f"mine.{suffix}", IDS, VALUES, {"seed": 3})
    embedding = ExternalEmbedding(tmp_path / f"mine.{suffix}")
    values = embedding.values_of(source(["e", "a", "ü"]))
    np.testing.assert_array_equal(values, VALUES[[4, 0, 2]])
    assert values.dtype == np.float32
    assert embedding.name == "mine"
    assert embedding.provenance == {
        "embedding": f"mine.{suffix}", "origin": {"seed": 3}, "cells": 3, "width": 3,
        "sha256": hashlib.sha256(VALUES[[4, 0, 2]].tobytes()).hexdigest(),
    }


@pytest.mark.parametrize("index", [None, "barcode"])
def test_a_plain_parquet_with_ids_in_its_index_or_a_column(tmp_path, index):
    frame = pd.DataFrame(VALUES.astype(np.float64), columns=["z", "y", "x"], index=pd.Index(IDS, name=index))
    frame.to_parquet(tmp_path / "index.parquet")
    frame.reset_index(names="id").astype({"id": "category"}).to_parquet(tmp_path / "column.parquet", index=False)
    for name in ("index", "column"):
        np.testing.assert_array_equal(ExternalEmbedding(tmp_path / f"{name}.parquet").values_of(source()), VALUES)


def test_obsm_goes_by_place_in_memory_and_in_files(tmp_path):
    frame = pd.DataFrame(VALUES, index=IDS, columns=["p", "q", "r"])
    cells = source(["a", "a", "a", "b", "b"], X_plain=VALUES, X_sparse=scipy.sparse.csr_matrix(VALUES))
    for key in ("X_plain", "X_sparse"):
        embedding = ExternalEmbedding(f"obsm:{key}")
        np.testing.assert_array_equal(embedding.values_of(cells), VALUES)
        assert (embedding.name, embedding.provenance["embedding"]) == (key, f"obsm:{key}")
    adata = anndata.AnnData(np.ones((5, 2)), obs=pd.DataFrame(index=IDS), obsm={"X_plain": VALUES, "X_frame": frame})
    adata.write_h5ad(tmp_path / "cells.h5ad")
    with AnnDataSource(tmp_path / "cells.h5ad") as stored:
        for key in ("X_plain", "X_frame"):
            np.testing.assert_array_equal(ExternalEmbedding(f"obsm:{key}").values_of(stored), VALUES)
        with pytest.raises(UserError, match=r"cells\.h5ad has no 'X_scGPT' in obsm \(there are: X_frame, X_plain\)"):
            ExternalEmbedding("obsm:X_scGPT").values_of(stored)
    with pytest.raises(UserError, match="there are: nothing"):
        ExternalEmbedding("obsm:X").values_of(source())
    view = adata[::-1]
    np.testing.assert_array_equal(ExternalEmbedding("obsm:X_plain").values_of(AnnDataSource(view)), VALUES[::-1])


def test_cells_of_one_name_are_matched_in_their_order(tmp_path):
    write_alone(tmp_path / "mine.npz", np.array(["a", "b", "a", "a", "d"]), VALUES, {})
    values = ExternalEmbedding(tmp_path / "mine.npz").values_of(source(["b", "a", "a", "a"]))
    np.testing.assert_array_equal(values, VALUES[[1, 0, 2, 3]])
    for names in (["a", "b"], ["a", "a", "b"]):
        with pytest.raises(UserError, match="more than one embedding of cell 'a'"):
            ExternalEmbedding(tmp_path / "mine.npz").values_of(source(names))
    with pytest.raises(UserError, match=r"no embedding of 1 of the 2 cells of AnnData \('b', say\)"):
        ExternalEmbedding(tmp_path / "mine.npz").values_of(source(["b", "b"]))


def test_vectors_of_genes(tmp_path):
    genes = np.array(["TP53", "KLF1", "BAK1", "KLF1", "GATA1"])
    values = VALUES.copy()
    values[4, 1] = np.inf
    write_alone(tmp_path / "genes.npz", genes, values, {})
    embedding = ExternalEmbedding(tmp_path / "genes.npz")
    found = embedding.vectors_of(["BAK1", "MYC", "TP53"])
    assert list(found) == ["BAK1", "TP53"]
    np.testing.assert_array_equal(found["BAK1"], VALUES[2].astype(np.float64))
    for name, said in [("KLF1", "more than one"), ("GATA1", "infinite")]:
        with pytest.raises(UserError, match=f"{said}.*{name}"):
            embedding.vectors_of([name])
    with pytest.raises(UserError, match="obsm:X is an embedding of cells"):
        ExternalEmbedding("obsm:X").vectors_of(["TP53"])


def test_embeddings_with_gaps_are_refused(tmp_path):
    values = VALUES.copy()
    values[1, 2] = np.nan
    write_alone(tmp_path / "mine.npz", IDS, values, {})
    embedding = ExternalEmbedding(tmp_path / "mine.npz")
    np.testing.assert_array_equal(embedding.values_of(source(["a", "e"])), VALUES[[0, 4]])
    with pytest.raises(UserError, match=r"mine of AnnData holds NaN or infinite numbers for 1 cells \('b', say\)"):
        embedding.values_of(source())
    with pytest.raises(UserError, match="NaN or infinite"):
        ExternalEmbedding("obsm:X").values_of(source(X=VALUES.astype(np.float64) * 1e300))


def test_what_is_no_embedding_is_refused(tmp_path):
    np.savez(tmp_path / "other.npz", X=VALUES)
    np.savez(tmp_path / "objects.npz", cell=np.array([{}], dtype=object), X_scbench=VALUES[:1])
    np.savez(tmp_path / "numbers.npz", cell=np.arange(5), X_scbench=VALUES)
    np.savez(tmp_path / "empty.npz", cell=IDS.astype(str), X_scbench=VALUES[:, :0])
    np.savez(tmp_path / "short.npz", cell=IDS.astype(str), X_scbench=VALUES[:4])
    np.savez(tmp_path / "flat.npz", cell=IDS.astype(str), X_scbench=VALUES[:, 0])
    pd.DataFrame(VALUES, columns=list("xyz")).to_parquet(tmp_path / "nameless.parquet")
    pd.DataFrame({"cell": IDS, "kind": IDS, "x": VALUES[:, 0]}).to_parquet(tmp_path / "two.parquet")
    pd.DataFrame({"cell": ["a", None], "x": [1.0, 2]}).to_parquet(tmp_path / "missing.parquet")
    pd.DataFrame({"cell": ["a", "b"]}).to_parquet(tmp_path / "alone.parquet")
    for name in ("broken.npz", "broken.parquet"):
        (tmp_path / name).write_bytes(b"no such file at all")
    for name, said in {
        "other.npz": "no array cell and no X_scbench", "objects.npz": "without objects", "numbers.npz": "list of cell ids",
        "empty.npz": "no dimension", "short.npz": "4 rows for 5 cells", "flat.npz": "no table of numbers",
        "nameless.parquet": "has no other", "two.parquet": r"2 that are none \(cell, kind\)",
        "missing.parquet": "id that is missing", "alone.parquet": "no dimension",
        "broken.npz": "damaged", "broken.parquet": "damaged", "gone.npz": "cannot be read", "gone.parquet": "cannot be read",
    }.items():
        with pytest.raises(UserError, match=said) as error:
            ExternalEmbedding(tmp_path / name)
        assert name in str(error.value)


def test_what_a_model_may_be(tmp_path, model):
    model.save_pretrained(tmp_path / "model", {})
    write_alone(tmp_path / "mine.parquet", IDS, VALUES, {})
    anndata.AnnData(np.ones((2, 2)), uns={"split_sha256": "0" * 64}).write_h5ad(tmp_path / "predicted.h5ad")
    assert isinstance(open_model(tmp_path / "model"), ExpressionModel)
    assert isinstance(open_model(str(tmp_path / "mine.parquet")), ExternalEmbedding)
    assert isinstance(open_model("obsm:X_pca"), ExternalEmbedding)
    assert isinstance(open_model(tmp_path / "predicted.h5ad"), ExternalPredictions)
    with pytest.raises(UserError, match=r"nowhere is no model.*model directory, obsm:KEY, an \.npz or \.parquet.*\.h5ad"):
        open_model("nowhere")
    with pytest.raises(UserError, match="names no embedding"):
        open_model("obsm:")
