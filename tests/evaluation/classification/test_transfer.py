"""Label transfer between planted files: against scikit-learn, classes that one file lacks, copies between the files."""

import hashlib
import json

import anndata
import numpy as np
import pytest
from planted_tables import row
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import accuracy_score, balanced_accuracy_score, f1_score
from sklearn.neighbors import KNeighborsClassifier
from sklearn.preprocessing import StandardScaler

from scbench.config import ClassificationConfig
from scbench.data.cells import content_hash, to_tokens
from scbench.data.gene_identity import map_genes
from scbench.data.sources.anndata import AnnDataSource
from scbench.errors import UserError
from scbench.evaluation import embed
from scbench.evaluation.classification.benchmark import run_classification
from scbench.evaluation.classification.transfer import benchmark_transfer
from scbench.evaluation.scores import stratified_folds


@pytest.fixture
def other(planted_cells) -> anndata.AnnData:
    """New cells of the same types, genes in another order, 15 of them missing and one that the first file lacks."""
    cells = planted_cells(90, seed=8)[:, np.random.default_rng(0).permutation(80)[:65]].copy()
    cells.var_names = [*cells.var_names[:64], "ANOTHER"]
    return cells


def test_probes_and_genes_equal_plain_scikit_learn(model, cells, other):
    table = benchmark_transfer(model, cells, other, "type", seed=5)
    first, second = embed.embed(model, cells, seed=5), embed.embed(model, other, seed=5)
    known, truth = cells.obs["type"], other.obs["type"]
    keys = np.array([int(hashlib.sha256(name.encode()).hexdigest()[:16], 16) for name in cells.obs_names], dtype=np.uint64)
    fold = stratified_folds(np.unique(known, return_inverse=True)[1], keys, 5, 5, 0)
    fitted, aside = fold != 0, fold == 0
    scaler = StandardScaler().fit(first[fitted])
    shared = [gene for gene in cells.var_names if gene in set(other.var_names)]

    def normalised(adata):
        counts = adata[:, shared].X.toarray().astype(float)
        return np.log1p(1e4 * counts / counts.sum(axis=1, keepdims=True))

    def chosen(train, test):
        """Logistic regression of the strength that is best on the cells set aside."""
        plain = [LogisticRegression(C=c, max_iter=5000).fit(train[fitted], known[fitted]) for c in (0.001, 0.01, 0.1, 1, 10)]
        return max(plain, key=lambda one: balanced_accuracy_score(known[aside], one.predict(train[aside]))).predict(test)

    assert table.details["shared_genes"] == len(shared) == 64
    for (name, probe), predicted in {
        ("trained model", "k-NN"): KNeighborsClassifier(10).fit(first[fitted], known[fitted]).predict(second),
        ("trained model", "linear"): chosen(scaler.transform(first), scaler.transform(second)),
        ("variable genes", "linear"): chosen(normalised(cells), normalised(other)),
        ("majority class", "none"): np.full(90, "alpha"),
    }.items():
        result = row(table, name, probe)
        assert result["accuracy"] == pytest.approx(accuracy_score(truth, predicted))
        assert result["macro_f1"] == pytest.approx(f1_score(truth, predicted, average="macro"))
        assert (result["protocol"], result["cells"], result["classes"], result["groups"]) == ("transfer", 90, 3, None)
        assert result["overlap"] == ("not checkable" if name == "trained model" else "unseen")
    assert row(table, "variable genes", "linear")["accuracy"] > 0.9
    assert row(table, "PCA 50", "linear")["accuracy"] > 0.8


def test_classes_that_one_file_lacks(model, cells, other):
    """In the second file one type has another name, and one has a single cell."""
    other = other[[*np.flatnonzero(other.obs["type"] != "beta"), 1]].copy()
    other.obs["type"] = [name.replace("gamma", "delta") for name in other.obs["type"]]
    table = benchmark_transfer(model, cells, other, "type")
    assert {(r["cells"], r["classes"]) for r in table.rows} == {(31, 2)}
    assert table.details["cells"]["in_lacking_classes"] == 30
    assert table.details["cells"]["dropped_classes"] == {"delta": 30}
    assert table.details["cells"]["classes"] == {"alpha": 30, "beta": 1, "gamma": 0}
    assert any("delta (30)" in sentence for sentence in table.sentences)
    assert row(table, "majority class", "none")["accuracy"] == pytest.approx(30 / 31)
    only = other[other.obs["type"] == "alpha"].copy()
    assert {r["classes"] for r in benchmark_transfer(model, cells, only, "type").rows} == {1}
    only.obs["type"] = "omega"
    with pytest.raises(UserError, match="has a class of AnnData: there 'type' is one of alpha, beta, gamma; here omega"):
        benchmark_transfer(model, cells, only, "type")


def test_shuffled_labels_give_chance(model, cells, planted_cells):
    cells.obs["type"] = np.random.default_rng(0).permutation(cells.obs["type"].to_numpy())
    new = planted_cells(150, seed=8)
    new.obs["type"] = np.random.default_rng(1).permutation(new.obs["type"].to_numpy())
    for result in benchmark_transfer(model, cells, new, "type").rows:
        assert 0.15 < result["accuracy"] < 0.55


def test_copies_of_training_cells_are_found_and_left_out(model, cells, planted_cells):
    new = planted_cells(90, seed=8)
    leaky = anndata.concat([new, cells[:6]], index_unique="-")
    with pytest.raises(UserError, match=r"6 of the 96 labelled cells of AnnData are in AnnData too, and 1\.0% are allowed"):
        benchmark_transfer(model, cells, leaky, "type")
    table = benchmark_transfer(model, cells, leaky, "type", max_overlap=1)
    assert table.rows == benchmark_transfer(model, cells, new, "type").rows
    assert table.details["cells"]["in_training_file"] == 6
    kept = benchmark_transfer(model, cells, leaky, "type", allow_overlap=True)
    assert {r["cells"] for r in kept.rows} == {96}
    assert row(kept, "trained model", "k-NN")["overlap"] == "transductive"


def test_cells_of_pretraining_are_asked_of_the_second_file_alone(model, cells, planted_cells):
    def hashes_of(adata) -> np.ndarray:
        source = AnnDataSource(adata)
        tokens = to_tokens(source.read(0, adata.n_obs), map_genes(source.identity, model.vocabulary, "cells"))
        return content_hash(tokens.genes, tokens.counts, tokens.offsets)

    new = planted_cells(90, seed=8)
    model.training_cells = np.sort(np.concatenate([hashes_of(cells), hashes_of(new)[:9]]))
    with pytest.raises(UserError, match="trained or validated on 9 of the 90 labelled cells"):
        benchmark_transfer(model, cells, new, "type")
    table = benchmark_transfer(model, cells, new, "type", max_overlap=1)
    assert {(r["cells"], r["overlap"]) for r in table.rows} == {(81, "unseen")}
    assert table.details["cells"]["overlapping"] == 9
    assert table.details["train_cells"]["used"] == 120


def test_the_verb(model, cells, other, tmp_path, capsys):
    model.save_pretrained(tmp_path / "model", {})
    cells.write_h5ad(tmp_path / "a.h5ad")
    other.write_h5ad(tmp_path / "b.h5ad")
    paths = {"model": tmp_path / "model", "train": tmp_path / "a.h5ad", "test": tmp_path / "b.h5ad"}
    result = run_classification(ClassificationConfig(**paths, label="type", output=tmp_path / "out"))
    assert json.loads((tmp_path / "out" / "results.json").read_text()) == json.loads(json.dumps(result))
    assert (tmp_path / "out" / "results.csv").exists()
    assert "Transfer of type from a.h5ad to b.h5ad" in capsys.readouterr().out
    assert result["rows"][0]["dataset"] == "a.h5ad → b.h5ad"
    both = {"label": "type", "output": tmp_path / "none"}
    for options, message in [
        ({"train": paths["train"]}, "both --train and --test"),
        ({"input": paths["train"], "train": paths["train"], "test": paths["test"]}, "either one file"),
        ({}, "either one file"),
        ({"train": paths["train"], "test": paths["test"], "label": None}, "--label is missing"),
        ({"train": paths["train"], "test": paths["test"], "folds": 3}, "no part of label transfer"),
        ({"train": paths["train"], "test": paths["test"], "protocol": "aaai2025"}, "no part of label transfer"),
    ]:
        with pytest.raises(UserError, match=message):
            ClassificationConfig(**{"model": paths["model"], **both, **options})
    for options, message in [
        ({"label": "typ"}, r"a\.h5ad has no column 'typ' in obs"),
        ({"label": "n"}, "with 0 classes of at least 10 cells"),
        ({"test": tmp_path / "no.h5ad"}, "there is no file"),
        ({"test": tmp_path / "a.h5ad"}, r"120 of the 120 labelled cells of a\.h5ad are in a\.h5ad too"),
    ]:
        with pytest.raises(UserError, match=message):
            run_classification(ClassificationConfig(**{**paths, **both, **options}))
    assert not (tmp_path / "none").exists()
