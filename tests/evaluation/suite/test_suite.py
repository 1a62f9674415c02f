"""Suites: every data set in one table, whatever is missing or fails; what was done is kept; tests over data sets."""

import csv
import json
from pathlib import Path

import numpy as np
import pytest
from scipy.stats import wilcoxon

from scbench.cli import main
from scbench.errors import UserError
from scbench.evaluation import external, report
from scbench.evaluation.classification.benchmark import benchmark_classification
from scbench.evaluation.comparisons import Comparison, sentences_of
from scbench.evaluation.report import Column, Table
from scbench.evaluation.suite import suite, tasks
from scbench.evaluation.suite.merge import merge
from scbench.evaluation.suite.models import SuiteModels, name_models
from scbench.evaluation.suite.suite import benchmark_suite, comparable

SUITE = """
title = "Two and a half sets"
seeds = 1
folds = 3

[[dataset]]
name = "first"
task = "classification"
path = ["first.pt", "first.h5ad"]
label = "type"
label_origin = "sorted"
source = "planted"

[[dataset]]
name = "second"
task = "classification"
path = "second.h5ad"
label = "type"

[[dataset]]
name = "third"
task = "classification"
path = "third.h5ad"
label = "type"
source = "nowhere"
note = "write it yourself"
"""


@pytest.fixture
def folder(tmp_path):
    """A suite and what stands for its data; the third file is missing."""
    (tmp_path / "suite.toml").write_text(SUITE)
    for name in ("first", "second"):
        (tmp_path / f"{name}.h5ad").write_text(name)
    (tmp_path / "model").mkdir()
    return tmp_path


COMPARED = "ours with a linear probe beats the best baseline, PCA with a linear probe (+0.100 accuracy)."


def fake_table(dataset: str, shift: float = 0.0) -> Table:
    def row(model, kind, probe, value):
        return {
            "task": "classification", "dataset": f"{dataset}.h5ad", "label": "type", "model": model, "kind": kind,
            "probe": probe, "protocol": "3-fold", "overlap": "unseen", "accuracy": value + shift,
            "accuracy_low": value + shift - 0.01, "accuracy_high": value + shift + 0.01, "seeds": 1, "cells": 100,
            "classes": 3,
        }

    rows = [row("ours", "model", "linear", 0.8), row("PCA", "baseline", "linear", 0.7),
            row("majority class", "baseline", "none", 0.4), row("ours − PCA", "difference", "linear", 0.1)]
    flags = {"sentences": ["Confounded."], "origin": None}
    columns = [Column("model", ("model",))]
    compared = Comparison("ours", "linear", "PCA", "linear", "accuracy", 0.1, 0.05, 0.15)
    comparisons = [compared.record(COMPARED), compared._replace(metric="macro_f1").record("Of another metric.")]
    details = {"label_flags": flags, "comparisons": comparisons}
    said = ["A sentence.", *sentences_of(comparisons)]
    return Table(f"Table of {dataset}", rows, columns, said, details, {}, "accuracy")


@pytest.fixture
def asked(monkeypatch):
    """The names of the data sets that were run; those in `refused` raise."""
    class Asked(list):
        refused = ()

    names = Asked()

    def run(dataset, file, models, folder, seeds, folds, scvi, options):
        names.append(dataset.name)
        if dataset.name in names.refused:
            raise UserError(f"{file} is no good: give another.")
        return fake_table(dataset.name)

    monkeypatch.setattr(tasks, "run", run)
    monkeypatch.setattr(suite, "SuiteModels", lambda specs: type("None", (), {"of": lambda self, name: {}})())
    return names


def run(folder, **options) -> Table:
    return benchmark_suite(folder / "suite.toml", {"ours": [str(folder / "model")]}, folder / "results", **options)


def test_one_table_over_all_and_one_of_each(folder, asked):
    table = run(folder)
    assert asked == ["first", "second"]
    assert [(row["dataset"], row["model"], row["status"]) for row in table.rows] == [
        *((name, model, "done") for name in ("first", "second") for model in ("ours", "PCA", "majority class", "ours − PCA")),
        ("third", None, "missing"),
    ]
    assert {row["metric"] for row in table.rows[:-1]} == {"accuracy"}
    assert [table.rows[0][field] for field in ("value", "value_low", "value_high")] == [0.8, 0.79, 0.81]
    assert table.rows[-1]["reason"] == (
        f"there is no {folder}/third.h5ad: put one there (source: nowhere; write it yourself)."
    )
    written = folder / "results"
    assert sorted(path.name for path in written.iterdir()) == [
        "classification", "forest.png", "results.csv", "results.json", "results.md", "suite.json",
    ]
    assert json.loads((written / "results.json").read_text())["rows"] == table.rows
    with open(written / "results.csv", newline="") as file:
        assert [row["status"] for row in csv.DictReader(file)] == [row["status"] for row in table.rows]
    own = json.loads((written / "classification" / "first" / "results.json").read_text())
    assert [row["dataset"] for row in own["rows"]] == ["first"] * 4
    origin = "The label comes from sorting the cells, not from their expression."
    assert own["label_flags"] == {"sentences": [origin, "Confounded."], "origin": "sorted"}
    assert origin in own["sentences"] and f"first: {origin}" in table.sentences
    assert "3 data sets: 2 done, 1 missing, 0 failed." in table.sentences
    assert "first: Confounded." in table.sentences
    assert [line for line in table.sentences if COMPARED in line] == [f"first: {COMPARED}", f"second: {COMPARED}"]
    assert not any(line.endswith(("A sentence.", "Of another metric.")) for line in table.sentences)
    assert [(one["dataset"], one["difference"]) for one in table.details["comparisons"]] == [("first", 0.1), ("second", 0.1)]
    assert "| third | classification |" in (written / "results.md").read_text()


def test_a_set_that_fails_loses_no_other_and_is_the_one_that_is_run_again(folder, asked, capsys):
    asked.refused = ["first"]
    arguments = ["benchmark", "suite", str(folder / "suite.toml"), "--model", f"ours={folder / 'model'}", "-o",
                 str(folder / "results")]
    with pytest.raises(SystemExit) as stop:
        main(arguments)
    assert stop.value.code == 2
    message = capsys.readouterr().err.splitlines()[-1]
    assert message.startswith("scbench: 1 of 3 data sets failed (first)") and "results.md" in message
    record = json.loads((folder / "results" / "results.json").read_text())
    assert [row["status"] for row in record["rows"]] == ["failed", "done", "done", "done", "done", "missing"]
    assert record["rows"][0]["reason"] == f"{folder}/first.h5ad is no good: give another."
    asked.refused = []
    main(arguments)
    assert asked == ["first", "second", "first"]
    (folder / "third.h5ad").write_text("now it is there")
    main(arguments)
    assert asked == ["first", "second", "first", "third"]
    record = json.loads((folder / "results" / "results.json").read_text())
    assert {row["status"] for row in record["rows"]} == {"done"} and len(record["rows"]) == 12


def test_results_of_something_else_are_left_alone(folder, asked):
    run(folder)
    with pytest.raises(UserError, match=r"another command \(seed differ"):
        run(folder, seed=1)
    (folder / "first.h5ad").write_text("changed")
    assert "is not the file that" in run(folder).rows[0]["reason"]
    (folder / "suite.toml").write_text(SUITE + "\n")
    with pytest.raises(UserError, match="suite differ"):
        run(folder)
    (folder / "other").mkdir()
    (folder / "other" / "mine.txt").write_text("mine")
    with pytest.raises(UserError, match="exists already"):
        benchmark_suite(folder / "suite.toml", {"ours": [str(folder / "model")]}, folder / "other")


def test_a_label_that_nobody_knows_is_missing(folder, asked):
    (folder / "suite.toml").write_text(SUITE.replace('label = "type"', 'label = "unknown"'))
    (folder / "first.pt").write_text("implies its label")
    table = run(folder)
    assert asked == ["first"]
    assert [row["status"] for row in table.rows] == ["done"] * 4 + ["missing"] * 2
    assert "its label is 'unknown' in the suite: write it in a copy" in table.rows[4]["reason"]


def test_the_shipped_suite_without_its_data_says_how_to_get_it(folder, asked, capsys):
    main(["benchmark", "suite", "aaai2025", "--model", str(folder / "model"), "--data", str(folder), "-o",
          str(folder / "results")])
    record = json.loads((folder / "results" / "results.json").read_text())
    assert len(record["rows"]) == 16 and {row["status"] for row in record["rows"]} == {"missing"}
    assert "put one there (source: Cheng et al. 2021" in record["rows"][0]["reason"]
    assert "16 data sets: 0 done, 16 missing, 0 failed." in capsys.readouterr().out
    assert not (folder / "results" / "forest.png").exists()


def test_wilcoxon_over_the_data_sets_is_scipys(folder, asked, monkeypatch):
    differences = np.random.default_rng(4).normal(0.02, 0.05, 8)
    entry = '[[dataset]]\nname = "set{0}"\ntask = "classification"\npath = "first.h5ad"\nlabel = "type"\n'
    (folder / "suite.toml").write_text("".join(entry.format(number) for number in range(8)))

    def table_of(dataset, *_):
        table = fake_table(dataset.name)
        table.rows[0]["accuracy"] = table.rows[1]["accuracy"] + differences[int(dataset.name[3:])]
        return table

    monkeypatch.setattr(tasks, "run", table_of)
    monkeypatch.setattr(suite, "forest_plot", lambda *_: None)
    monkeypatch.setattr(report, "forest_plot", lambda *_: None)
    table = run(folder)
    tests = {(one["baseline"], one["baseline_probe"]): one for one in table.details["wilcoxon"]}
    assert tests["PCA", "linear"]["p"] == pytest.approx(wilcoxon(differences).pvalue)
    assert tests["PCA", "linear"]["median_difference"] == pytest.approx(np.median(differences))
    said = [line for line in table.sentences if "Wilcoxon signed-rank p" in line]
    assert len(said) == 1 and said[0].startswith("classification default: By accuracy ours (linear) is better than")
    few = run_few(folder)
    assert any("fewer than 6 data sets that differ" in line for line in few.sentences)
    assert all(one["p"] is None for one in few.details["wilcoxon"])


def run_few(folder) -> Table:
    """The first five of its data sets."""
    text = (folder / "suite.toml").read_text()
    (folder / "few.toml").write_text("[[dataset]]".join(text.split("[[dataset]]")[:6]))
    return benchmark_suite(folder / "few.toml", {"ours": [str(folder / "model")]}, folder / "few")


def test_names_of_models(tmp_path):
    for name in ("a/model", "b/model"):
        (tmp_path / name).mkdir(parents=True)
    a, b = str(tmp_path / "a" / "model"), str(tmp_path / "b" / "model")
    assert name_models([a, b, "obsm:X_scGPT", "x/vectors.npz"]) == {
        "a": [a], "b": [b], "X_scGPT": ["obsm:X_scGPT"], "vectors": ["x/vectors.npz"],
    }
    assert name_models([f"ours={a}", f"ours={b}", "theirs=obsm:X=Y"]) == {"ours": [a, b], "theirs": ["obsm:X=Y"]}
    for wrong, said in [
        (["=x"], r"is no \[NAME=\]SPEC"), (["ours="], r"is no \[NAME=\]SPEC"), ([a, a], "called 'a'"),
        (["x/v.npz", "y/v.npz"], "called 'v'"), ([f"ours={a}", f"ours={a}"], "given twice"), ([f"a={b}", a], "called 'a'"),
    ]:
        with pytest.raises(UserError, match=said):
            name_models(wrong)


def test_a_spec_may_name_the_data_set_and_models_of_ours_are_opened_once(monkeypatch, model):
    opened = []

    def open_model(spec):
        opened.append(spec)
        return model if spec == "run" else spec

    monkeypatch.setattr(external, "open_model", open_model)
    models = SuiteModels({"ours": ["run"], "theirs": ["vectors/{dataset}.npz", "obsm:X"]})
    assert opened == ["run", "obsm:X"]  # what can be opened is, before anything else is done
    assert models.of("first") == {"ours": [model], "theirs": ["vectors/first.npz", "obsm:X"]}
    assert models.of("second")["theirs"][0] == "vectors/second.npz"
    assert opened.count("run") == 1


def test_a_suite_needs_a_model(folder, capsys):
    with pytest.raises(SystemExit) as stop:
        main(["benchmark", "suite", str(folder / "suite.toml"), "-o", str(folder / "results")])
    assert stop.value.code == 2
    assert "--model is missing" in capsys.readouterr().err


@pytest.fixture
def real(tmp_path, planted_cells, model) -> Path:
    """Two planted sets, one of which has no label at all in a third entry, and a model's directory."""
    planted_cells(120, seed=1).write_h5ad(tmp_path / "first.h5ad")
    cells = planted_cells(90, seed=2)
    cells.obs["donor"] = [f"donor {number % 5}" for number in range(90)]
    cells.obsm["X_theirs"] = np.random.default_rng(0).normal(size=(90, 4)).astype(np.float32)
    cells.write_h5ad(tmp_path / "second.h5ad")
    model.save_pretrained(tmp_path / "model", {})
    (tmp_path / "suite.toml").write_text(SUITE.replace('second.h5ad"\n', 'second.h5ad"\ngroup = "donor"\n'))
    return tmp_path


def test_rows_equal_those_of_the_single_benchmarks(real, model):
    """The first set has no obsm: it fails when an embedding of obsm is asked for, and the second goes on."""
    table = benchmark_suite(real / "suite.toml", {"ours": [str(real / "model")]}, real / "results")
    alone = {
        "first": benchmark_classification({"ours": [model]}, real / "first.h5ad", "type", seeds=1, folds=3),
        "second": benchmark_classification({"ours": [model]}, real / "second.h5ad", "type", group="donor", seeds=1, folds=3),
    }
    expected = [{**row, "dataset": name} for name, own in alone.items() for row in own.rows]
    for found, wanted in zip(table.rows[:-1], expected, strict=True):
        assert {field: found[field] for field in wanted} == wanted
        assert (found["metric"], found["value"]) == ("accuracy", wanted["accuracy"])
        assert (found["value_low"], found["value_high"]) == (wanted["accuracy_low"], wanted["accuracy_high"])
    assert table.rows[-1]["status"] == "missing"
    single = json.loads((real / "results" / "classification" / "first" / "results.json").read_text())
    assert single["split_sha256"] == alone["first"].details["split_sha256"]
    both = {"ours": [str(real / "model")], "theirs": ["obsm:X_theirs"]}
    beside = benchmark_suite(real / "suite.toml", both, real / "both")
    assert [one["status"] for one in beside.details["data_sets"]] == ["failed", "done", "missing"]
    assert "X_theirs" in beside.rows[0]["reason"]
    assert {row["model"] for row in beside.rows if row["kind"] == "model"} == {"ours", "theirs"}


def test_the_comparisons_of_tables_of_one_model_are_those_of_the_merged_one():
    def table(baseline: str, difference: float) -> Table:
        compared = Comparison("trained model", "linear", baseline, "linear", "accuracy", difference, None, None)
        row = {"model": "trained model", "kind": "model", "probe": "linear", "accuracy": 0.5}
        record = compared.record(f"The trained model is {difference:+.1f} apart.")
        return Table("", [row], [], ["Said of all.", record["sentence"]], {"comparisons": [record]}, {}, "accuracy")

    merged = merge({"ours": [table("PCA", 0.1), table("untrained model", 0.2)], "theirs": [table("untrained model", 0.3)]})
    found = [(one["model"], one["baseline"], one["difference"], one["sentence"]) for one in merged.details["comparisons"]]
    assert found == [
        ("ours", "PCA", 0.1, "ours, pretraining seed 1: The trained model is +0.1 apart."),
        ("ours", "ours, untrained model", 0.2, "ours, pretraining seed 2: The trained model is +0.2 apart."),
        ("theirs", "theirs, untrained model", 0.3, "theirs: The trained model is +0.3 apart."),
    ]
    assert merged.sentences == [*(said for *_, said in found), "Said of all."]
    alone = merge({"ours": [table("PCA", 0.1)]})
    assert alone.details["comparisons"][0]["sentence"] == alone.sentences[1] == "The trained model is +0.1 apart."


def test_a_baseline_of_some_pairs_alone_is_not_the_best_of_a_set():
    rows = [{"model": name, "value": value, "pairs": pairs} for name, value, pairs in [
        ("ours", 0.5, 13), ("additive", 0.6, 5), ("mean", 0.4, 13), ("undefined", None, 13),
    ]]
    assert [row["model"] for row in comparable(rows)] == ["ours", "mean"]
    assert len(comparable([{"model": "ours", "value": 0.5, "pairs": None}, {"model": "mean", "value": 0.4}])) == 2
