"""Several models, pretraining seeds, embeddings and predictions from elsewhere, on folds that can be fixed."""

import json

import anndata
import numpy as np
import pandas as pd
import pytest

from scbench.cli import main
from scbench.errors import UserError
from scbench.evaluation.embed import embed
from scbench.evaluation.external import ExternalEmbedding, open_model
from scbench.evaluation.perturbation.benchmark import benchmark_perturbation
from scbench.evaluation.perturbation.cells import PANEL
from scbench.evaluation.perturbation.report import SPOKEN
from scbench.evaluation.perturbation.scoring import METRICS
from scbench.evaluation.split_files import read_split
from scbench.models.model import ExpressionModel

SINGLES = [f"GENE{i}" for i in range(6)]


def run(models, cells, **options):
    given = {"context": ("line",), "total_counts_column": PANEL, "seeds": 1, "folds": 3, **options}
    return benchmark_perturbation(models, cells, "condition", "control", **given)


def row(table, name: str) -> dict:
    return next(row for row in table.rows if (row["model"], row["stratum"]) == (name, "all"))


def scores(row: dict, *ends: str) -> list:
    return [row[f"{metric}{end}"] for metric in METRICS for end in ("", *ends)]


def another(model, seed: int) -> ExpressionModel:
    return ExpressionModel(model.config, model.vocabulary, seed)


def test_pretraining_seeds_are_averaged_and_folds_depend_on_no_model(model, planted):
    cells = planted(SINGLES, cells=20)
    first, second, third = (another(model, seed) for seed in (5, 6, 7))
    together = run({"ours": [first, second], "other": [third]}, cells)
    alone = [run(one, cells) for one in (first, second, third)]
    ours, other = row(together, "ours"), row(together, "other")
    for metric in METRICS:
        values = [row(table, "trained model")[metric] for table in alone]
        assert ours[metric] == pytest.approx(np.mean(values[:2]), abs=1e-12)
        assert ours[f"{metric}_pretraining_sd"] == pytest.approx(np.std(values[:2], ddof=1), abs=1e-12)
        assert other[metric] == values[2]
        assert other[f"{metric}_pretraining_sd"] is None
        found = [one[metric] for one in together.details["models"]["ours"]]
        assert found == pytest.approx(values[:2])
    assert (ours["pretraining_seeds"], ours["kind"], ours["probe"]) == (2, "model", "ridge")
    for name in ("train mean", "PCA gene loadings", "random vectors", "other half of the cells"):
        assert scores(row(together, name), "_low", "_high") == scores(row(alone[0], name), "_low", "_high")
    kinds = {r["model"]: r["kind"] for r in together.rows}
    assert (kinds["ours − random vectors"], kinds["train mean"], kinds["other half of the cells"]) == (
        "difference", "baseline", "ceiling"
    )
    assert any("ours is the mean of 2 pretraining seeds" in sentence for sentence in together.sentences)
    assert any(sentence.startswith("In the MSE of the change other ") for sentence in together.sentences)


def test_the_best_baseline_is_named_metric_by_metric(model, planted):
    table = run(model, planted(SINGLES, cells=20))
    baselines = [r for r in table.rows if r["kind"] == "baseline"]
    for one in table.details["comparisons"]:
        sign = 1 if one["metric"] in ("mse", "mse_top", "energy") else -1
        best = min(sign * r[one["metric"]] for r in baselines)
        assert sign * row(table, one["baseline"])[one["metric"]] == best
        assert one["difference"] == pytest.approx(row(table, "trained model")[one["metric"]] - sign * best, abs=1e-9)
        ahead = (one["high"] < 0) if sign > 0 else (one["low"] > 0)
        assert (one["verdict"] == "beats") == ahead
        assert (one["probe"], one["baseline_probe"]) == ("ridge", row(table, one["baseline"])["probe"])
        if one["sentence"] is not None:
            assert one["sentence"] in table.sentences and f"the best baseline, {one['baseline']} (" in one["sentence"]
    assert [one["metric"] for one in table.details["comparisons"]] == list(METRICS)
    assert {one["metric"] for one in table.details["comparisons"] if one["sentence"]} == set(SPOKEN)


def constant(cells) -> None:
    """All cells of a group alike: halves don't differ, and a profile can be predicted without an error."""
    dense = cells.X.toarray()
    for _, rows in cells.obs.reset_index().groupby(["condition", "line"], observed=True).groups.items():
        dense[rows] = dense[rows[0]]
    cells.X = type(cells.X)(dense)


def predictions(cells, split, profile_of) -> anndata.AnnData:
    """What `profile_of` (condition, line) says of all that a split by perturbation holds out."""
    rows = [(r, split.folds_of([name], "")[r, 0], f"{name}+ctrl", line) for r in range(split.repetitions)
            for name in SINGLES for line in cells.obs["line"].unique()]
    obs = pd.DataFrame(rows, columns=["repetition", "fold", "perturbation", "context"])
    obs.index = obs.index.astype(str)
    values = np.stack([profile_of(name.removesuffix("+ctrl"), line) for _, _, name, line in rows])
    return anndata.AnnData(values, obs=obs, var=cells.var[[]], uns={"split_sha256": split.digest})


def written(table, tmp_path):
    table.write(tmp_path / "out")
    return read_split(tmp_path / "out" / "split.json")


def test_perfect_predictions_get_the_optimum(model, planted, tmp_path):
    cells = planted(SINGLES, cells=20, contexts=("a", "b"))
    constant(cells)
    split = written(run(model, cells, seeds=2), tmp_path)
    dense = np.log1p(1e4 * cells.X.toarray() / cells.X.sum(axis=1))

    def truth(name, line):
        return np.asarray(dense[np.flatnonzero((cells.obs["condition"] == name) & (cells.obs["line"] == line))[0]]).ravel()

    predictions(cells, split, truth).write_h5ad(tmp_path / "perfect.h5ad")
    table = run(open_model(tmp_path / "perfect.h5ad"), cells, split_file=split)
    perfect = row(table, "perfect")
    for metric in METRICS:
        best = 0 if metric in ("mse", "mse_top", "energy") else 1
        assert perfect[metric] == pytest.approx(best, abs=1e-5), metric
    assert (perfect["kind"], perfect["probe"], perfect["pairs"]) == ("model", "predictions", 12)
    assert any("perfect beats the best baseline" in sentence for sentence in table.sentences)
    copies = 320 - 14  # all but one of each group
    assert any(sentence.startswith(f"{copies} of these cells are exact copies") for sentence in table.sentences)


def test_saved_predictions_of_the_train_mean_are_that_baseline_and_belong_to_their_split(model, planted, tmp_path):
    model.embedding.table.data[:] = 1.0  # one feature for all: the prediction is the train mean
    cells = planted(SINGLES, cells=20, contexts=("a", "b"))
    table = run(model, cells, save_predictions=True)
    split = written(table, tmp_path)
    saved = anndata.read_h5ad(tmp_path / "out" / "predictions.h5ad")
    assert saved.uns["split_sha256"] == table.details["split_sha256"] == split.digest
    assert (saved.obs["perturbation"] == "control").sum() == 2 * 3, "the controls of each context, fold by fold"
    external = open_model(tmp_path / "out" / "predictions.h5ad")
    again = run({"mean": [external], "ours": [model]}, cells)
    mean = row(again, "train mean")
    assert scores(row(again, "mean"), "_low", "_high") == pytest.approx(scores(mean, "_low", "_high"), abs=1e-9)
    assert scores(mean, "_low", "_high") == scores(row(table, "train mean"), "_low", "_high")
    with pytest.raises(UserError, match="was predicted on the split"):
        run(external, cells, seed=1)
    saved[saved.obs["perturbation"] != "GENE5"].write_h5ad(tmp_path / "part.h5ad")
    with pytest.raises(UserError, match=r"no prediction of repetition 0, fold \d, perturbation 'GENE5'"):
        run(open_model(tmp_path / "part.h5ad"), cells)


def test_saved_predictions_say_which_targets_were_left_out(model, planted, tmp_path):
    """What a model refuses is in nobody's training cells when its predictions are scored again."""
    cells = planted([*SINGLES, "NOGENE", "GENE0+NOGENE"], cells=20)
    table = run(model, cells, save_predictions=True)
    split = written(table, tmp_path)
    assert anndata.read_h5ad(tmp_path / "out" / "predictions.h5ad").uns["refused_targets"].tolist() == ["NOGENE"]
    again = run(open_model(tmp_path / "out" / "predictions.h5ad"), cells, split_file=split)
    assert scores(row(again, "predictions"), "_low", "_high") == pytest.approx(
        scores(row(table, "trained model"), "_low", "_high"), abs=1e-9
    )
    assert scores(row(again, "train mean")) == scores(row(table, "train mean"))
    assert again.details["targets"]["refused"] == {"left out of the predictions": ["NOGENE"]}


def test_the_profiles_of_saved_predictions_are_control_and_change(model, planted, tmp_path):
    cells = planted(SINGLES, cells=20)
    constant(cells)
    run(model, cells, save_predictions=True).write(tmp_path / "out")
    saved = anndata.read_h5ad(tmp_path / "out" / "predictions.h5ad")
    first = cells[cells.obs["condition"] == "control"][0, saved.var_names].X.toarray()[0]
    expected = np.log1p(1e4 * first / cells.X[np.flatnonzero(cells.obs["condition"] == "control")[0]].sum())
    np.testing.assert_allclose(saved[saved.obs["perturbation"] == "control"].X[0], expected, rtol=1e-5)
    assert set(saved.obs["perturbation"]) == {*SINGLES, "control"}


def test_studies_are_told_apart_in_saved_predictions(model, planted, tmp_path):
    cells = planted(SINGLES, cells=20, contexts=("a", "b"))
    cells.obs["study"] = np.where(cells.obs["line"] == "a", "one", "two")
    cells.obs["line"] = "k"
    run({"x": [model], "y": [another(model, 5), another(model, 6)]}, cells, save_predictions=True).write(tmp_path / "out")
    files = sorted((tmp_path / "out").glob("*.h5ad"))
    assert [path.name for path in files] == [
        "predictions.1.x.h5ad", "predictions.2.y__pretraining_seed_1.h5ad", "predictions.3.y__pretraining_seed_2.h5ad"
    ]
    again = run({"ours": [model], "saved": [open_model(files[0])]}, cells)
    assert scores(row(again, "saved")) == pytest.approx(scores(row(again, "ours")), abs=1e-9)


def test_values_other_than_counts_are_flagged(model, planted):
    cells = planted(SINGLES, cells=20)
    logarithms = cells.copy()
    logarithms.X = cells.X.astype(np.float32).log1p()
    counted, undone = run(model, cells), run(model, logarithms, values="log1p_counts")
    assert [{**r, "values": "log1p_counts"} for r in counted.rows] == undone.rows
    assert {r["values"] for r in counted.rows} == {"counts"}
    assert any("are log1p of whole counts" in sentence for sentence in undone.sentences)


def test_gene_embeddings_from_a_file_do_what_the_model_s_own_do(model, planted, tmp_path):
    cells = planted([*SINGLES, "GENE30"], cells=20)
    table = model.embedding.gene_table().detach().double().numpy()
    frame = pd.DataFrame({name: table[model.vocabulary.tokens[name]] for name in SINGLES}).T
    frame.columns = frame.columns.astype(str)
    frame.to_parquet(tmp_path / "genes.parquet")
    found = run(ExternalEmbedding(tmp_path / "genes.parquet"), cells)
    both = run({"ours": [model], "file": [ExternalEmbedding(tmp_path / "genes.parquet")]}, cells)
    assert found.details["targets"]["refused"] == {"no embedding": ["GENE30"]}
    assert row(found, "genes")["overlap"] == "not checkable"
    assert scores(row(both, "file")) == pytest.approx(scores(row(both, "ours")), abs=1e-9)
    assert scores(row(both, "file")) == pytest.approx(scores(row(found, "genes")), abs=1e-9)
    frame.index = [f"cell {i}" for i in range(6)]
    frame.to_parquet(tmp_path / "cells.parquet")
    with pytest.raises(UserError, match=r"none of the 7 targets .* the model has an embedding of, which ridge needs"):
        run(ExternalEmbedding(tmp_path / "cells.parquet"), cells)
    with pytest.raises(UserError, match="obsm:X is an embedding of cells, and one of genes is needed"):
        run(ExternalEmbedding("obsm:X"), cells)


def test_an_embedding_in_obsm_does_what_the_model_s_own_does(model, planted):
    cells = planted(["GENE0", "GENE1"], cells=20, contexts=("a", "b", "c"), shift=0.3)
    cells.obsm["X_theirs"] = embed(model, cells)
    models = {"ours": [model], "theirs": [ExternalEmbedding("obsm:X_theirs")]}
    table = run(models, cells, split="unseen-context", predictor="context")
    assert scores(row(table, "theirs")) == pytest.approx(scores(row(table, "ours")), abs=1e-4)
    assert [r["model"] for r in table.rows if r["probe"] == "context" and r["kind"] != "difference"] == [
        "ours", "theirs", "ours, untrained model", "PCA"
    ]


def test_folds_can_be_fixed(model, planted, tmp_path):
    cells = planted(SINGLES, cells=20)
    table = run(model, cells, seeds=2, seed=3)
    split = written(table, tmp_path)
    assert (split.repetitions, split.folds, split.unit) == (2, 3, "perturbation")
    assert run(model, cells, seed=3, folds=5, seeds=7, split_file=split).rows == table.rows
    other = run(model, cells[::-1].copy(), seed=4, split_file=split)  # other halves of the same folds
    assert (other.details["split_sha256"], row(other, "train mean")["seeds"]) == (split.digest, 2)
    for changed, message in [
        ({"split_file": split._replace(unit="cell")}, "is of unit 'cell', not 'perturbation'"),
        ({"split_file": split._replace(label="guide")}, "is of label 'guide', not 'condition'"),
        ({"split_file": split._replace(fold=dict(list(split.fold.items())[1:]))}, "has no fold for 1 of 6 perturbations"),
    ]:
        with pytest.raises(UserError, match=message):
            run(model, cells, **changed)


def test_names_of_rows_are_taken(model, planted):
    with pytest.raises(UserError, match="a model cannot be called 'train mean', as another row of the table is"):
        run({"train mean": [model]}, planted(SINGLES, cells=20))


def test_the_verb_writes_the_split_and_the_predictions_and_takes_them_again(model, planted, tmp_path, capsys):
    model.save_pretrained(tmp_path / "model", {})
    planted(SINGLES, cells=20).write_h5ad(tmp_path / "in.h5ad")
    asked = [str(tmp_path / "in.h5ad"), "--perturbation-column", "condition", "--control", "control", "--context", "line",
             "--total-counts-column", "panel", "--folds", "3", "--seeds", "1"]
    start = ["benchmark", "perturbation"]
    main([*start, str(tmp_path / "model"), *asked, "-o", str(tmp_path / "one"), "--save-predictions"])
    assert {path.name for path in (tmp_path / "one").iterdir()} == {
        "results.json", "results.csv", "results.md", "forest.png", "split.json", "predictions.h5ad"
    }
    main([*start, str(tmp_path / "one" / "predictions.h5ad"), *asked[:-4], "-o", str(tmp_path / "two"), "--split-file",
          str(tmp_path / "one" / "split.json")])
    one, two = (json.loads((tmp_path / name / "results.json").read_text())["rows"] for name in ("one", "two"))
    assert scores(two[0]) == pytest.approx(scores(one[0]), abs=1e-9)
    capsys.readouterr()
    for changed, message in [
        (asked[:3], "--control must be given for"), ([*asked, "--unseen"], "--unseen goes with --protocol aaai2025"),
        (["in.pt"], "give --protocol aaai2025, or an h5ad"),
    ]:
        with pytest.raises(SystemExit) as stop:
            main([*start, str(tmp_path / "model"), *changed, "-o", str(tmp_path / "three")])
        assert stop.value.code == 2
        assert message in capsys.readouterr().err
