"""The numbers of the classification benchmark on planted cells, and the statistics over them."""

import hashlib
import sys
import types

import anndata
import numpy as np
import pytest
from planted_tables import ONCE, external, folds_of, one_hot, row
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import accuracy_score, balanced_accuracy_score, confusion_matrix, f1_score
from sklearn.neighbors import KNeighborsClassifier
from sklearn.preprocessing import StandardScaler

from scbench.data.sources.anndata import AnnDataSource
from scbench.errors import UserError
from scbench.evaluation import embed
from scbench.evaluation.classification.benchmark import benchmark_classification
from scbench.evaluation.classification.probing import predict
from scbench.evaluation.classification.selection import GRID, choose_regression
from scbench.evaluation.external import ExternalPredictions
from scbench.evaluation.folds import fold_parts
from scbench.evaluation.labelled_cells import choose_cells, read_labelled
from scbench.evaluation.scores import stratified_folds
from scbench.models.model import ExpressionModel


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
    for number, compared in enumerate(table.details["comparisons"]):
        assert (compared["baseline"], compared["baseline_probe"]) == (best["model"], best["probe"])
        assert compared["difference"] == pytest.approx(1 - best["accuracy"])
        assert compared["low"] == pytest.approx(1 - best["accuracy_high"], abs=1e-9)
        assert compared["sentence"] == table.sentences[number]
        assert f"the best baseline, {best['model']}" in compared["sentence"]
    assert [(compared["model"], compared["probe"]) for compared in table.details["comparisons"]] == [
        ("X_other", "k-NN"), ("X_other", "linear"),
    ]


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


def test_depth_is_told_by_its_r_squared(cells):
    log_totals = np.log1p(np.asarray(cells.X.sum(axis=1)).ravel())
    noise = np.random.default_rng(0).normal(size=(120, 3))
    for values, least, most in [(np.column_stack([noise, log_totals]), 0.98, 1), (noise, -1, 0.1)]:
        table = benchmark_classification(external(cells, values), cells, "type", **ONCE)
        assert least < row(table, "X_other", "k-NN")["depth_r2"] < most


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
