"""The classification benchmark on planted cells: who may take part, what the numbers must be, what is refused."""

import csv
import json

import anndata
import numpy as np
import pytest
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import accuracy_score, f1_score
from sklearn.neighbors import KNeighborsClassifier
from sklearn.preprocessing import StandardScaler

from scbench.config import ClassificationConfig
from scbench.data.cells import content_hash, to_tokens
from scbench.data.gene_identity import map_genes
from scbench.data.sources.anndata import AnnDataSource
from scbench.errors import UserError
from scbench.evaluation import embed
from scbench.evaluation.classification import benchmark_classification, run_classification
from scbench.evaluation.scores import stratified_folds

ONCE = {"seeds": 1, "folds": 3}


def hashes_of(model, cells) -> np.ndarray:
    source = AnnDataSource(cells)
    tokens = to_tokens(source.read(0, cells.n_obs), map_genes(source.identity, model.vocabulary, "cells"))
    return content_hash(tokens.genes, tokens.counts, tokens.offsets)


def row(table, model: str, probe: str) -> dict:
    return next(row for row in table.rows if (row["model"], row["probe"]) == (model, probe))


def with_embedding(monkeypatch, model, values: np.ndarray) -> None:
    """Let the trained model embed cells as `values`, the untrained one as itself."""
    encode = embed.encode
    monkeypatch.setattr(embed, "encode", lambda net, *rest, **o: values if net is model else encode(net, *rest, **o))


def test_probes_equal_plain_scikit_learn_on_the_same_embeddings_and_folds(model, cells):
    table = benchmark_classification(model, cells, "type", seeds=2, folds=4, seed=5)
    embedding = embed.embed(model, cells, seed=5)
    truth = np.unique(cells.obs["type"], return_inverse=True)[1]
    found = {"k-NN": [], "linear": []}
    for repetition in range(2):
        fold = stratified_folds(truth, hashes_of(model, cells), 4, 5, repetition)
        knn, linear = np.empty_like(truth), np.empty_like(truth)
        for number in range(4):
            train, test = fold != number, fold == number
            knn[test] = KNeighborsClassifier(10).fit(embedding[train], truth[train]).predict(embedding[test])
            scaler = StandardScaler().fit(embedding[train])
            plain = LogisticRegression(max_iter=2000).fit(scaler.transform(embedding[train]), truth[train])
            linear[test] = plain.predict(scaler.transform(embedding[test]))
        for probe, predicted in [("k-NN", knn), ("linear", linear)]:
            found[probe].append((accuracy_score(truth, predicted), f1_score(truth, predicted, average="macro")))
    for probe, scores in found.items():
        result = row(table, "trained model", probe)
        np.testing.assert_allclose([result["accuracy"], result["macro_f1"]], np.mean(scores, axis=0), atol=1e-9)
        assert result["accuracy_low"] < result["accuracy"] < result["accuracy_high"]


def test_rows_and_their_fields(model, cells):
    table = benchmark_classification(model, cells, "type", **ONCE)
    probes = ["k-NN", "linear"]
    assert [(r["model"], r["probe"]) for r in table.rows] == [
        *((name, probe) for name in ("trained model", "untrained model", "depth only", "PCA") for probe in probes),
        ("variable genes", "linear"), ("majority class", "none"),
    ]
    for r in table.rows:
        assert (r["task"], r["dataset"], r["label"], r["protocol"]) == ("classification", "AnnData", "type", "3-fold")
        assert (r["seeds"], r["folds"], r["cells"], r["classes"]) == (1, 3, 120, 3)
        embedding = r["model"] in ("trained model", "untrained model", "PCA")
        assert (r["depth_r2"] is not None) == embedding
    assert row(table, "variable genes", "linear")["accuracy"] > 0.9
    assert row(table, "PCA", "linear")["accuracy"] > 0.9


def test_a_perfect_embedding_scores_one_and_its_lead_is_the_rest(model, cells, monkeypatch):
    truth = np.unique(cells.obs["type"], return_inverse=True)[1]
    with_embedding(monkeypatch, model, np.eye(3, dtype=np.float32)[truth])
    table = benchmark_classification(model, cells, "type", **ONCE)
    for probe in ("k-NN", "linear"):
        perfect = row(table, "trained model", probe)
        assert (perfect["accuracy"], perfect["macro_f1"], perfect["accuracy_low"], perfect["accuracy_high"]) == (1, 1, 1, 1)
    for difference in table.details["differences"]:
        other = row(table, difference["baseline"], difference["probe"])
        assert difference["accuracy"] == pytest.approx(1 - other["accuracy"])
        assert difference["accuracy_low"] == pytest.approx(1 - other["accuracy_high"], abs=1e-9)
    assert "beats an untrained model" in table.sentences[0]


def test_shuffled_labels_give_chance_and_the_majority_gives_its_share(model, planted_cells):
    cells = planted_cells(300)
    cells.obs["type"] = np.random.default_rng(0).permutation(np.repeat(["a", "b", "c"], [180, 60, 60]))
    table = benchmark_classification(model, cells, "type", **ONCE)
    majority = row(table, "majority class", "none")
    assert majority["accuracy"] == pytest.approx(0.6)
    assert majority["macro_f1"] == pytest.approx(2 * 0.6 / 1.6 / 3)
    for r in table.rows:
        assert r["accuracy"] < 0.66
        assert r["macro_f1"] < 0.45
    assert "is not clearly apart from" in table.sentences[0] or "loses to" in table.sentences[0]


def test_cells_of_pretraining_are_left_out(model, cells, monkeypatch):
    hashes = hashes_of(model, cells)
    model.training_cells = np.sort(hashes[:60])
    used = []
    encode = embed.encode
    monkeypatch.setattr(embed, "encode", lambda *args, **options: (used.append(args[2]), encode(*args, **options))[1])
    table = benchmark_classification(model, cells, "type", max_overlap=1, **ONCE)
    assert {r["overlap"] for r in table.rows} == {"unseen"}
    assert set(used[0]) == set(hashes[60:])
    assert table.details["cells"]["overlapping"] == 60
    assert any("60 that the model was trained or validated on" in sentence for sentence in table.sentences)
    everything = benchmark_classification(model, cells, "type", allow_overlap=True, **ONCE)
    assert {r["overlap"] for r in everything.rows} == {"transductive"}
    assert everything.rows[0]["cells"] == 120
    model.training_cells = None
    unknown = benchmark_classification(model, cells, "type", **ONCE)
    assert {r["overlap"] for r in unknown.rows} == {"not checkable"}
    assert any("cannot be checked" in sentence for sentence in unknown.sentences)


def test_a_leak_that_is_all_there_is_names_the_way_out(model, cells):
    model.training_cells = np.sort(hashes_of(model, cells))
    with pytest.raises(UserError, match=r"120 were removed because the model was trained or validated .*--allow-overlap"):
        benchmark_classification(model, cells, "type", max_overlap=1)
    model.training_cells = np.sort(hashes_of(model, cells)[:100])  # 7 cells a class stay
    with pytest.raises(UserError, match=r"20 labelled cells are left, with 0 classes .*--allow-overlap"):
        benchmark_classification(model, cells, "type", max_overlap=1)


def test_missing_labels_small_classes_and_duplicates_are_left_out_everywhere(model, cells):
    doubled = anndata.concat([cells, cells[:7]], index_unique="-")
    doubled.obs["type"] = doubled.obs["type"].astype(object)
    doubled.obs.iloc[20:23, 0] = [None, "", "Unknown"]
    doubled.obs.iloc[30:39, 0] = "rare"
    table = benchmark_classification(model, doubled, "type", **ONCE)
    counted = table.details["cells"]
    assert counted["total"] == 127
    assert (counted["unlabelled"], counted["duplicates"], counted["in_small_classes"], counted["used"]) == (3, 7, 9, 108)
    assert counted["dropped_classes"] == {"rare": 9}
    assert counted["classes"] == {"alpha": 36, "beta": 36, "gamma": 36}
    assert any("rare (9)" in sentence for sentence in table.sentences)


def test_depth_is_told_by_its_r_squared(model, cells, monkeypatch):
    log_totals = np.log1p(np.asarray(cells.X.sum(axis=1)).ravel())
    noise = np.random.default_rng(0).normal(size=(120, 3))
    with_embedding(monkeypatch, model, np.column_stack([noise, log_totals]))
    assert row(benchmark_classification(model, cells, "type", **ONCE), "trained model", "k-NN")["depth_r2"] > 0.99
    with_embedding(monkeypatch, model, noise)
    assert row(benchmark_classification(model, cells, "type", **ONCE), "trained model", "k-NN")["depth_r2"] < 0.1


def test_the_same_seed_gives_the_same_table_in_any_order_of_cells(model, cells):
    first = benchmark_classification(model, cells, "type", **ONCE)
    assert benchmark_classification(model, cells, "type", **ONCE) == first
    other = benchmark_classification(model, cells, "type", seed=1, **ONCE)
    assert other.rows != first.rows
    assert other.details["cells_sha256"] == first.details["cells_sha256"]


@pytest.fixture
def files(model, cells, tmp_path):
    model.save_pretrained(tmp_path / "model", {}, hashes_of(model, cells)[:12])
    cells.write_h5ad(tmp_path / "in.h5ad")
    paths = {"model": tmp_path / "model", "input": tmp_path / "in.h5ad", "output": tmp_path / "out"}
    defaults = {**paths, "label": "type", **ONCE}
    return lambda **options: ClassificationConfig(**{"max_overlap": 1, **defaults, **options})


def test_run_classification_writes_and_shows_the_table(files, tmp_path, capsys):
    result = run_classification(files())
    record = json.loads((tmp_path / "out" / "results.json").read_text())
    assert record == json.loads(json.dumps(result))
    assert record["model"]["fingerprint"] == embed.fingerprint(embed.load_model(tmp_path / "model"))
    assert record["cells"]["overlapping"] == 12
    with open(tmp_path / "out" / "results.csv", newline="") as file:
        assert [r["accuracy"] for r in csv.DictReader(file)] == [str(r["accuracy"]) for r in record["rows"]]
    markdown = (tmp_path / "out" / "results.md").read_text()
    shown = capsys.readouterr().out
    for name in ("trained model", "majority class", "unseen"):
        assert name in markdown
        assert name in shown
    assert "With k-NN the trained model" in markdown
    run_classification(files(output=tmp_path / "again", json=True))
    assert capsys.readouterr().out == ""
    assert (tmp_path / "again" / "results.json").read_bytes() == (tmp_path / "out" / "results.json").read_bytes()


def test_bad_input_is_one_sentence_and_leaves_nothing(files, tmp_path, cells):
    for options, message in [
        ({"label": "typ"}, r"in\.h5ad has no column 'typ' in obs: choose --label among type, n"),
        ({"label": "n"}, r"108 labelled cells are left, with 0 classes"),
        ({"model": tmp_path}, "not a model directory"),
        ({"input": tmp_path / "no.h5ad"}, "there is no file"),
        ({"layer": "nope"}, "no layer 'nope'"),
        ({"folds": 400}, "400 folds"),
    ]:
        with pytest.raises(UserError, match=message):
            run_classification(files(**options))
    for options, message in [({"folds": 1}, "--folds is 1"), ({"seeds": 0}, "--seeds is 0")]:
        with pytest.raises(UserError, match=message):
            files(**options)
    assert not (tmp_path / "out").exists()
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine").write_text("")
    with pytest.raises(UserError, match="exists already"):
        run_classification(files())


@pytest.mark.parametrize(("change", "message"), [
    (lambda cells: cells.obs.__setitem__("type", "one"), "with 1 classes of at least 10 cells in 'type', and two are needed"),
    (lambda cells: cells.obs.__setitem__("type", ""), "holds no label at all"),
    (lambda cells: cells.obs.__setitem__("type", np.linspace(0, 1, 120)), "fractional numbers"),
    (lambda cells: setattr(cells, "X", cells.X * np.float32(0.3)), "no raw counts"),
    (lambda cells: setattr(cells, "var_names", [f"{'OTHER' if i > 4 else 'GENE'}{i}" for i in range(80)]), "of the counts of"),
])
def test_bad_cells(model, cells, change, message):
    change(cells)
    with pytest.raises(UserError, match=message):
        benchmark_classification(model, cells, "type", **ONCE)


def test_few_cells_are_too_few_for_ten_neighbours(model, cells):
    two = cells[cells.obs["type"] != "gamma"][:21].copy()
    two.obs["type"] = ["a", "b"] * 10 + ["a"]
    with pytest.raises(UserError, match="fewer than 10 training cells"):
        benchmark_classification(model, two[:20], "type", folds=30)
    assert len(benchmark_classification(model, two, "type", seeds=1, folds=2).rows) == 10
