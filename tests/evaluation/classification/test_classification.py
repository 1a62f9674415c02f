"""The classification benchmark on planted cells: who may take part, what the numbers must be, what is refused."""

import csv
import hashlib
import json
import sys
import types

import anndata
import numpy as np
import pytest
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import accuracy_score, balanced_accuracy_score, confusion_matrix, f1_score
from sklearn.neighbors import KNeighborsClassifier
from sklearn.preprocessing import StandardScaler

from scbench.config import ClassificationConfig
from scbench.data.cells import content_hash, to_tokens
from scbench.data.gene_identity import map_genes
from scbench.data.sources.anndata import AnnDataSource
from scbench.errors import UserError
from scbench.evaluation import embed
from scbench.evaluation.classification.benchmark import benchmark_classification, run_classification
from scbench.evaluation.classification.probing import predict
from scbench.evaluation.classification.selection import GRID, choose_regression
from scbench.evaluation.external import ExternalEmbedding, ExternalPredictions
from scbench.evaluation.folds import fold_parts
from scbench.evaluation.labelled_cells import choose_cells, read_labelled
from scbench.evaluation.scores import stratified_folds
from scbench.evaluation.split_files import read_split
from scbench.models.model import ExpressionModel

ONCE = {"seeds": 1, "folds": 3}


def hashes_of(model, cells) -> np.ndarray:
    source = AnnDataSource(cells)
    tokens = to_tokens(source.read(0, cells.n_obs), map_genes(source.identity, model.vocabulary, "cells"))
    return content_hash(tokens.genes, tokens.counts, tokens.offsets)


def row(table, model: str, probe: str) -> dict:
    return next(row for row in table.rows if (row["model"], row["probe"]) == (model, probe))


def folds_of(table, tmp_path, names) -> np.ndarray:
    """Each cell's or group's fold in each repetition, from the file that a table leaves."""
    table.beside["split.json"](tmp_path / "split.json")
    fold = json.loads((tmp_path / "split.json").read_text())["fold"]
    return np.array([fold[hashlib.sha256(name.encode()).hexdigest()[:16]] for name in names]).T


def external(cells, values: np.ndarray) -> ExternalEmbedding:
    """An embedding in obsm of the cells."""
    cells.obsm["X_other"] = np.asarray(values, dtype=np.float32)
    return ExternalEmbedding("obsm:X_other")


def one_hot(cells) -> np.ndarray:
    return np.eye(3)[np.unique(cells.obs["type"], return_inverse=True)[1]]


def test_probes_equal_plain_scikit_learn_on_the_same_embeddings_and_folds(model, cells, tmp_path):
    table = benchmark_classification(model, cells, "type", seeds=2, folds=4, seed=5)
    cells = cells[np.argsort([hashlib.sha256(name.encode()).hexdigest()[:16] for name in cells.obs_names])].copy()
    embedding = embed.embed(model, cells, seed=5)
    truth = np.unique(cells.obs["type"], return_inverse=True)[1]
    found, strengths = {"k-NN": [], "linear": []}, []
    for fold in folds_of(table, tmp_path, cells.obs_names):
        knn, linear, chosen = np.empty_like(truth), np.empty_like(truth), []
        for number in range(4):
            test, aside = fold == number, fold == (number + 1) % 4
            train = ~test & ~aside
            knn[test] = KNeighborsClassifier(10).fit(embedding[train], truth[train]).predict(embedding[test])
            values = StandardScaler().fit(embedding[train]).transform(embedding)
            plain = [LogisticRegression(C=c, max_iter=5000).fit(values[train], truth[train]) for c in GRID]
            reached = [balanced_accuracy_score(truth[aside], one.predict(values[aside])) for one in plain]
            chosen.append(GRID[int(np.argmax(reached))])
            linear[test] = plain[int(np.argmax(reached))].predict(values[test])
        strengths.append(chosen)
        for probe, predicted in [("k-NN", knn), ("linear", linear)]:
            found[probe].append(predicted)
    for probe, repetitions in found.items():
        result = row(table, "trained model", probe)
        for metric, oracle in [("accuracy", accuracy_score), ("balanced_accuracy", balanced_accuracy_score),
                               ("macro_f1", lambda t, p: f1_score(t, p, average="macro"))]:
            assert result[metric] == pytest.approx(np.mean([oracle(truth, each) for each in repetitions]), abs=1e-9)
            assert result[f"{metric}_low"] < result[metric] < result[f"{metric}_high"]
        matrices = table.details["confusion"]["matrices"]
        matrix = next(m for m in matrices if (m["model"], m["probe"]) == ("trained model", probe))
        assert matrix["cells"] == sum(confusion_matrix(truth, each) for each in repetitions).tolist()
    first = table.details["strengths"][0]
    assert (first["model"], first["probe"], first["chosen"]) == ("trained model", "linear", strengths)
    assert len({c for chosen in strengths for c in chosen}) > 1


def test_rows_and_their_fields(model, cells):
    table = benchmark_classification(model, cells, "type", **ONCE)
    probes = ["k-NN", "linear"]
    embeddings = ("trained model", "untrained model", "PCA 16", "PCA 50")
    assert [(r["model"], r["probe"]) for r in table.rows] == [
        *((name, probe) for name in (*embeddings[:2], "depth only", *embeddings[2:]) for probe in probes),
        ("variable genes", "linear"), ("majority class", "none"),
    ]
    assert list(table.rows[0]) == [
        "task", "dataset", "label", "model", "kind", "probe", "protocol", "overlap", "values",
        *(name + end for name in ("accuracy", "balanced_accuracy", "macro_f1") for end in ("", "_low", "_high")), "depth_r2",
        "pretraining_seeds", "accuracy_pretraining_sd", "seeds", "folds", "cells", "classes", "groups",
    ]
    for r in table.rows:
        assert (r["task"], r["dataset"], r["label"], r["protocol"]) == ("classification", "AnnData", "type", "3-fold by cell")
        assert (r["seeds"], r["folds"], r["cells"], r["classes"], r["groups"], r["values"]) == (1, 3, 120, 3, None, "counts")
        assert r["kind"] == ("model" if r["model"] == "trained model" else "baseline")
        assert (r["depth_r2"] is not None) == (r["model"] in embeddings)
        assert r["pretraining_seeds"] == (1 if r["model"] == "trained model" else None)
    assert row(table, "variable genes", "linear")["accuracy"] > 0.9
    assert row(table, "PCA 50", "linear")["accuracy"] > 0.9


def test_a_perfect_embedding_scores_one_and_its_lead_is_the_rest(cells):
    table = benchmark_classification(external(cells, one_hot(cells)), cells, "type", **ONCE)
    assert {r["model"] for r in table.rows if r["kind"] == "model"} == {"X_other"}
    assert not [r for r in table.rows if "untrained" in r["model"]]
    for probe in ("k-NN", "linear"):
        perfect = row(table, "X_other", probe)
        assert {perfect[name + end] for name in ("accuracy", "balanced_accuracy", "macro_f1") for end in ("", "_low")} == {1}
    for difference in table.details["differences"]:
        other = row(table, difference["baseline"], difference["baseline_probe"])
        assert difference["accuracy"] == pytest.approx(1 - other["accuracy"])
        assert difference["accuracy_low"] == pytest.approx(1 - other["accuracy_high"], abs=1e-9)
    best = max((r for r in table.rows if r["kind"] == "baseline"), key=lambda r: r["accuracy"])
    assert {d["baseline"] for d in table.details["differences"] if d["best"]} == {best["model"]}
    assert f"the best baseline, {best['model']}" in table.sentences[0]


def test_shuffled_labels_give_chance_and_the_majority_gives_its_share(model, planted_cells):
    cells = planted_cells(300)
    cells.obs["type"] = np.random.default_rng(0).permutation(np.repeat(["a", "b", "c"], [180, 60, 60]))
    table = benchmark_classification(model, cells, "type", **ONCE)
    majority = row(table, "majority class", "none")
    assert majority["accuracy"] == pytest.approx(0.6)
    assert majority["macro_f1"] == pytest.approx(2 * 0.6 / 1.6 / 3)
    assert majority["balanced_accuracy"] == pytest.approx(1 / 3)
    for r in table.rows:
        assert r["balanced_accuracy_low"] - 0.01 <= 1 / 3 <= r["balanced_accuracy_high"] + 0.01, r
        assert r["accuracy"] < 0.66
    assert "is not clearly apart from" in table.sentences[0] or "loses to" in table.sentences[0]


def test_a_planted_donor_effect_is_seen_by_a_group_split_alone(cells):
    """The embedding says which of 6 donors a cell is from, and each donor's cells are mostly of one type."""
    generator = np.random.default_rng(0)
    donor = np.arange(120) // 20
    kinds = np.where(generator.random(120) < 0.9, donor % 3, generator.integers(0, 3, 120))
    cells.obs["type"], cells.obs["donor"] = np.array(["a", "b", "c"])[kinds], [f"d{d}" for d in donor]
    model = external(cells, np.eye(6)[donor] * 9 + generator.normal(size=(120, 6)))
    by_cell, by_donor = (benchmark_classification(model, cells, "type", group=group) for group in (None, "donor"))
    for probe in ("k-NN", "linear"):
        one, other = row(by_cell, "X_other", probe), row(by_donor, "X_other", probe)
        assert one["accuracy_low"] > 0.7
        assert other["accuracy"] < one["accuracy_low"] - 0.2
        assert (other["protocol"], other["groups"], one["groups"]) == ("5-fold by donor", 6, None)
    assert "intervals come from resamples of the 6 groups; with fewer than 10 they are rough" in " ".join(by_donor.sentences)


def test_the_interval_over_groups_is_a_bootstrap_over_groups(cells, tmp_path):
    """Two donors of eight are misread: resampled by donor the accuracy scatters far more than by cell."""
    cells.obs["donor"] = [f"d{i % 8}" for i in range(120)]
    values = one_hot(cells)
    values[[i for i in range(120) if i % 8 < 2]] = [1, 0, 0]
    table = benchmark_classification(external(cells, values), cells, "type", group="donor", **ONCE)
    fold = folds_of(table, tmp_path, [f"d{i}" for i in range(8)])
    assert fold.shape == (1, 8)
    right = np.where(np.arange(8) < 2, 1 / 3, 1.0)  # a third of a misread donor's cells is of the first type
    found = row(table, "X_other", "k-NN")
    assert found["accuracy"] == pytest.approx(right.mean())
    draws = right[np.random.default_rng(0).integers(0, 8, (4000, 8))].mean(axis=1)
    np.testing.assert_allclose([found["accuracy_low"], found["accuracy_high"]], np.percentile(draws, [2.5, 97.5]), atol=0.05)


def test_the_labels_of_test_cells_choose_nothing(model, cells, tmp_path):
    """Other labels in the cells that fold 0 tests: what is chosen and said of them in that fold stays the same."""
    _, labelled = choose_cells(read_labelled(AnnDataSource(cells), "type"), "type")
    embeddings = {"noisy": [np.random.default_rng(0).normal(size=(120, 6)) + np.eye(6)[labelled.classes]]}
    parts = fold_parts(stratified_folds(labelled.classes, labelled.keys, 4, 0, 0), 0, 4)
    first = predict(labelled, embeddings, [[parts]], 0, False)
    labelled.classes[parts.test] = np.random.default_rng(1).permutation(labelled.classes[parts.test])
    second = predict(labelled, embeddings, [[parts]], 0, False)
    assert first.strengths == second.strengths
    for method, predicted in first.predictions.items():
        np.testing.assert_array_equal(predicted[..., parts.test], second.predictions[method][..., parts.test])
    labelled.classes[parts.validation] = np.random.default_rng(2).permutation(labelled.classes[parts.validation])
    assert predict(labelled, embeddings, [[parts]], 0, False).strengths != first.strengths, "but those of validation cells do"


@pytest.mark.parametrize(("width", "scale", "worst"), [(150, 3, 10), (2, 0.05, 0.001)])
def test_validation_picks_the_strength_that_matters(width, scale, worst):
    """Of many noisy numbers only a strong penalty makes something; of a few small ones only a weak one."""
    generator = np.random.default_rng(0)
    classes = generator.permutation(np.arange(900) % 2)
    values = generator.normal(size=(900, width))
    values[:, 0] += 1.5 * classes
    values *= scale
    train, aside, test = np.split(np.arange(900), [150, 500])
    chosen = choose_regression(values[train], classes[train], values[aside], classes[aside], values[test])
    poor = LogisticRegression(C=worst, max_iter=5000).fit(values[train], classes[train]).predict(values[test])
    assert chosen.strength != worst
    reached = balanced_accuracy_score(classes[test], chosen.predicted)
    assert reached > balanced_accuracy_score(classes[test], poor) + 0.03


def test_pretraining_seeds_are_one_row_with_their_scatter(model, cells, tmp_path):
    models = [model, *(ExpressionModel(model.config, model.vocabulary, seed=seed) for seed in (2, 3))]
    table = benchmark_classification({"mine": models, "theirs": [external(cells, one_hot(cells))]}, cells, "type", **ONCE)
    alone = [row(benchmark_classification({"mine": [each]}, cells, "type", **ONCE), "mine", "linear") for each in models]
    mine = row(table, "mine", "linear")
    assert mine["accuracy"] == pytest.approx(np.mean([each["accuracy"] for each in alone]))
    assert mine["macro_f1"] == pytest.approx(np.mean([each["macro_f1"] for each in alone]))
    assert mine["accuracy_pretraining_sd"] == pytest.approx(np.std([each["accuracy"] for each in alone], ddof=1))
    assert (mine["pretraining_seeds"], row(table, "theirs", "k-NN")["accuracy_pretraining_sd"]) == (3, None)
    details = next(d for d in table.details["pretraining"] if d["probe"] == "linear")
    assert details["accuracy"] == pytest.approx([each["accuracy"] for each in alone])
    assert [r["model"] for r in table.rows if r["kind"] == "model"] == ["mine", "mine", "theirs", "theirs"]
    assert row(table, "mine, untrained model", "linear")["kind"] == "baseline"
    assert len(table.details["models"]["mine"]) == 3
    assert f"standard deviation of {mine['accuracy_pretraining_sd']:.3f} between seeds" in " ".join(table.sentences)
    assert any("scVI was not run" in said for said in table.sentences)


def test_a_split_file_is_used_and_does_not_depend_on_the_model(model, cells, tmp_path):
    """Written by a run with one model, read by one with another, on the file in another order."""
    first = benchmark_classification(model, cells, "type", seeds=2, folds=3, seed=4)
    first.beside["split.json"](tmp_path / "split.json")
    split = read_split(tmp_path / "split.json")
    turned = cells[::-1].copy()
    model.training_cells = np.sort(hashes_of(model, cells)[:30])
    second = benchmark_classification(
        {"other": [external(turned, one_hot(turned))]}, turned, "type", split=split, seeds=9, folds=8, seed=4
    )
    assert (second.rows[0]["seeds"], second.rows[0]["folds"]) == (2, 3)
    for name, probe in [("PCA 50", "linear"), ("variable genes", "linear")]:
        assert row(first, name, probe) == row(second, name, probe)
    third = benchmark_classification(model, cells, "type", split=split, max_overlap=1, seed=4)
    assert third.details["split_sha256"] == first.details["split_sha256"] == second.details["split_sha256"]
    assert third.rows[0]["cells"] == 90
    with pytest.raises(UserError, match="of label 'type', not 'n'"):
        benchmark_classification(model, cells, "n", split=split)
    cells.obs["donor"] = ["x", "y", "z"] * 40
    with pytest.raises(UserError, match="of unit 'cell', not 'group'"):
        benchmark_classification(model, cells, "type", group="donor", split=split)


def test_predictions_of_others_are_scored_as_they_are(cells, model, tmp_path):
    table = benchmark_classification(model, cells, "type", seeds=2, folds=3)
    truth = cells.obs["type"].to_numpy()
    wrong = np.where(np.arange(120) % 10 == 0, "alpha", truth)
    obs = cells.obs.assign(prediction_0=truth, prediction_1=wrong)[["prediction_0", "prediction_1"]]
    theirs = anndata.AnnData(np.zeros((120, 1)), obs=obs, uns={"split_sha256": table.details["split_sha256"]})
    theirs[::-1].copy().write_h5ad(tmp_path / "theirs.h5ad")
    predictions = ExternalPredictions(tmp_path / "theirs.h5ad")
    found = row(benchmark_classification(predictions, cells, "type", seeds=2, folds=3), "theirs", "none")
    assert found["accuracy"] == pytest.approx(np.mean([1, (wrong == truth).mean()]))
    assert found["balanced_accuracy"] == pytest.approx(np.mean([1, balanced_accuracy_score(truth, wrong)]))
    assert (found["kind"], found["overlap"], found["depth_r2"]) == ("model", "not checkable", None)


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
    assert any("60 that a model was trained or validated on" in sentence for sentence in table.sentences)
    everything = benchmark_classification(model, cells, "type", allow_overlap=True, **ONCE)
    assert {r["overlap"] for r in everything.rows if r["kind"] == "model"} == {"transductive"}
    assert everything.rows[0]["cells"] == 120
    model.training_cells = None
    unknown = benchmark_classification(model, cells, "type", **ONCE)
    assert {r["overlap"] for r in unknown.rows if r["kind"] == "model"} == {"not checkable"}
    assert {r["overlap"] for r in unknown.rows if r["kind"] == "baseline"} == {"unseen"}
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


def test_classes_that_are_in_too_few_groups_are_named_and_left_out(model, cells):
    cells.obs["donor"] = [f"d{i % 8}" for i in range(120)]
    cells.obs.loc[cells.obs["type"] == "gamma", "donor"] = [f"d{i % 2}" for i in range(40)]
    cells.obs.iloc[:3, cells.obs.columns.get_loc("donor")] = ""
    table = benchmark_classification(model, cells, "type", group="donor", **ONCE)
    assert table.details["cells"]["dropped_classes"] == {"gamma": 39}
    assert table.details["cells"]["ungrouped"] == 3
    assert any("under 10 cells or in fewer than 3 groups, left out everywhere: gamma (39)" in said for said in table.sentences)
    assert any("with fewer than 10 they are rough" in said for said in table.sentences)
    with pytest.raises(UserError, match="with 0 classes of at least 10 cells in 3 groups in 'n'"):
        benchmark_classification(model, cells, "n", group="donor", **ONCE)
    with pytest.raises(UserError, match=r"no column 'donr' in obs: choose --group among"):
        benchmark_classification(model, cells, "type", group="donr", **ONCE)
    cells.obs["donor"] = ["x", "y"] * 60
    with pytest.raises(UserError, match=r"column 'donor' of AnnData holds 2 groups of labelled cells, and 3 are needed"):
        benchmark_classification(model, cells, "type", group="donor", **ONCE)


def test_depth_is_told_by_its_r_squared(cells):
    log_totals = np.log1p(np.asarray(cells.X.sum(axis=1)).ravel())
    noise = np.random.default_rng(0).normal(size=(120, 3))
    for values, least, most in [(np.column_stack([noise, log_totals]), 0.98, 1), (noise, -1, 0.1)]:
        table = benchmark_classification(external(cells, values), cells, "type", **ONCE)
        assert least < row(table, "X_other", "k-NN")["depth_r2"] < most


def test_the_same_seed_gives_the_same_table_in_any_order_of_cells(model, cells):
    first = benchmark_classification(model, cells, "type", **ONCE)
    turned = cells[np.random.default_rng(0).permutation(120)].copy()
    for again in (benchmark_classification(model, each, "type", **ONCE) for each in (cells, turned)):
        assert again.record() == first.record()
    other = benchmark_classification(model, cells, "type", seed=1, **ONCE)
    assert other.rows != first.rows
    assert other.details["cells_sha256"] == first.details["cells_sha256"]


def test_scvi_is_a_baseline_where_it_is_installed(cells, monkeypatch):
    """A stand-in for scvi-tools: what it is fitted on, and that its latent space is probed."""
    with pytest.raises(UserError, match="scVI needs scvi-tools, which is not installed"):
        benchmark_classification(external(cells, one_hot(cells)), cells, "type", scvi=True, **ONCE)
    fitted = []

    class SCVI:
        def __init__(self, adata):
            self.total = adata.X.sum()
            fitted.append(adata.n_obs)

        @staticmethod
        def setup_anndata(adata): ...

        def train(self, **options): ...

        def get_latent_representation(self, adata):
            counts = adata.X.toarray()
            return np.column_stack([counts[:, :20].sum(1), counts[:, 20:40].sum(1), counts[:, 40:60].sum(1)])

    fake = types.ModuleType("scvi")
    fake.settings, fake.model = types.SimpleNamespace(), types.SimpleNamespace(SCVI=SCVI)
    fake.__spec__ = types.SimpleNamespace()
    monkeypatch.setitem(sys.modules, "scvi", fake)
    table = benchmark_classification(external(cells, one_hot(cells)), cells, "type", scvi=True, **ONCE)
    assert fitted == [40, 40, 40], "a third of the cells trains"
    assert row(table, "scVI", "linear")["accuracy"] > 0.8
    assert not any("scVI was not run" in said for said in table.sentences)


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
    about = record["models"]["trained model"][0]
    assert about["fingerprint"] == embed.fingerprint(embed.load_model(tmp_path / "model"))
    assert record["split_sha256"] == read_split(tmp_path / "out" / "split.json").digest
    with open(tmp_path / "out" / "confusion.csv", newline="") as file:
        counted = [int(r["cells"]) for r in csv.DictReader(file) if (r["model"], r["probe"]) == ("trained model", "linear")]
    assert (len(counted), sum(counted)) == (9, 108)
    assert record["cells"]["overlapping"] == 12
    with open(tmp_path / "out" / "results.csv", newline="") as file:
        assert [r["accuracy"] for r in csv.DictReader(file)] == [str(r["accuracy"]) for r in record["rows"]]
    markdown = (tmp_path / "out" / "results.md").read_text()
    shown = capsys.readouterr().out
    for name in ("trained model", "majority class", "unseen"):
        assert name in markdown
        assert name in shown
    assert "The trained model with k-NN" in markdown
    run_classification(files(output=tmp_path / "again", json=True))
    assert capsys.readouterr().out == ""
    assert (tmp_path / "again" / "results.json").read_bytes() == (tmp_path / "out" / "results.json").read_bytes()


def test_bad_input_is_one_sentence_and_leaves_nothing(files, tmp_path, cells):
    for options, message in [
        ({"label": "typ"}, r"in\.h5ad has no column 'typ' in obs: choose --label among type, n"),
        ({"label": "n"}, r"120 labelled cells are left, with 0 classes"),
        ({"model": tmp_path}, "not a model directory"),
        ({"input": tmp_path / "no.h5ad"}, "there is no file"),
        ({"layer": "nope"}, "no layer 'nope'"),
        ({"model": "obsm:X_none"}, "no 'X_none' in obsm"),
        ({"model": "obsm:X_none", "protocol": "aaai2025", "seeds": 3, "folds": 5}, "take a model directory, not obsm:X_none"),
        ({"split_file": tmp_path / "no.json", "seeds": 3, "folds": 5}, "the split file .* cannot be read"),
    ]:
        with pytest.raises(UserError, match=message):
            run_classification(files(**options))
    for options, message in [
        ({"folds": 2}, "--folds is 2: it must be at least 3"), ({"seeds": 0}, "--seeds is 0"),
        ({"split_file": tmp_path / "no.json"}, "--seeds and --folds are those of --split-file"),
        ({"group": "n", "protocol": "aaai2025", "seeds": 3, "folds": 5}, "--group is no part of --protocol aaai2025"),
    ]:
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
    with pytest.raises(UserError, match="20 cells leave 6 to train on in a fold, fewer than the 10 that k-NN needs"):
        benchmark_classification(model, two[:20], "type", folds=3)
    assert benchmark_classification(model, two, "type", seeds=1, folds=7).rows
    with pytest.raises(UserError, match="2 folds cannot train, validate and test"):
        benchmark_classification(model, two, "type", folds=2)
