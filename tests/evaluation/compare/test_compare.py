"""`scbench compare` from a store to its tables: its numbers, going on where it was stopped, what it refuses."""

import csv
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch

from scbench import prepare
from scbench.config import CompareConfig
from scbench.data.store import Store
from scbench.errors import DivergedError, UserError
from scbench.evaluation import embed
from scbench.evaluation.compare import runs as compare_runs
from scbench.evaluation.compare.compare import run_compare
from scbench.evaluation.masked.evaluate import evaluate_baselines, evaluate_model

TINY = {"width": 16, "layers": 1, "heads": 2, "max_genes": 30, "batch_cells": 16, "dropout": 0.0, "precision": "fp32",
        "structures": "linear,cnn", "budget_tokens": 900, "seeds": 2, "learning_rates": "1e-3,1e-2", "json": True,
        "label": "cell_type"}
MEASURED = ("cells_per_second", "seconds", "search_seconds")  # what depends on the machine's mood


@pytest.fixture(scope="module")
def store(cells_file, tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("compare") / "store"
    prepare([cells_file], path, split=".5,.2,.3", keep_obs=("cell_type",), workers=1)
    return path


@pytest.fixture(scope="module")
def finished(store, tmp_path_factory) -> tuple[Path, dict]:
    directory = tmp_path_factory.mktemp("compare") / "finished"
    return directory, run_compare(CompareConfig(store=store, output=directory, **TINY))


def timeless(record: dict) -> list[dict]:
    return [{name: value for name, value in row.items() if name not in MEASURED} for row in record["rows"]]


def test_the_table_and_its_files(finished):
    directory, record = finished
    rows = {row["row"]: row for row in record["rows"]}
    assert list(rows) == ["linear-avg", "cnn", "gene mean", "gene mean + cell offset", "truncated Poisson", "depth only",
                          "PCA"]
    assert json.loads((directory / "results.json").read_text()) == json.loads(json.dumps(record))
    names = {path.name for path in directory.iterdir()}
    assert names == {"compare.json", "baselines.json", "runs", "runs.csv", "results.json", "results.csv", "results.md",
                     "quality.png", "accuracy.png"}
    linear, cnn = rows["linear-avg"], rows["cnn"]
    assert linear["steps"] == cnn["steps"] == round(900 / (16 * linear["tokens_per_cell"]))
    assert cnn["regression_loss"] is None
    assert linear["regression_loss"] is not None
    assert (linear["seeds"], linear["diverged"], linear["pooling"], cnn["pooling"]) == (2, 0, "avg", "own")
    markdown = (directory / "results.md").read_text()
    assert "Below gene mean + cell offset" in markdown
    assert "linear-avg" in markdown


def test_the_numbers_are_those_of_evaluate_on_the_same_models(finished, store):
    directory, record = finished
    opened = Store.open(store)
    losses = []
    for number in range(2):
        model = embed.load_model(directory / "runs" / "linear-avg" / f"seed-{number}" / "model")
        assert model.provenance["training"]["seed"] == number
        assert model.provenance["training"]["structure"] == "linear"
        found = {row["method"]: row for row in evaluate_model(model, opened, max_genes=30).rows()}
        losses.append((found["mvc"]["mse"], found["regression"]["mse"]))
    row = record["rows"][0]
    assert [row["mvc_loss"], row["regression_loss"]] == pytest.approx(np.mean(losses, axis=0))
    half = 12.7062 * abs(losses[0][0] - losses[1][0]) / 2
    assert row["mvc_loss_high"] - row["mvc_loss"] == pytest.approx(half, rel=1e-4)
    gene_mean = evaluate_baselines(opened, max_genes=30).rows()[0]
    assert record["rows"][2]["mvc_loss"] == record["rows"][2]["regression_loss"] == gene_mean["mse"]
    with open(directory / "runs.csv", newline="") as file:
        runs = list(csv.DictReader(file))
    assert [(run["row"], run["seed"]) for run in runs] == [(name, seed) for name in ("linear-avg", "cnn") for seed in "01"]
    assert [float(run["mvc_loss"]) for run in runs[:2]] == [mvc for mvc, _ in losses]


def test_probes_tell_the_planted_types_from_pca_and_say_how_deep_cells_are(finished):
    rows = {row["row"]: row for row in finished[1]["rows"]}
    assert rows["PCA"]["linear_accuracy"] > 0.8
    assert 0 <= rows["linear-avg"]["knn_accuracy"] <= 1
    assert rows["PCA"]["depth_r2"] is not None
    assert rows["depth only"]["depth_r2"] is None
    assert rows["gene mean"]["linear_accuracy"] is None


def test_the_rate_is_the_one_with_the_lowest_validation_loss(finished):
    for search in finished[1]["searches"].values():
        best = min(search["tried"], key=lambda trial: trial["validation_loss"])
        assert [trial["lr"] for trial in search["tried"]] == [1e-3, 1e-2]
        assert search["chosen"] == best["lr"]
        assert search["seconds"] == pytest.approx(sum(trial["seconds"] for trial in search["tried"]))
        assert search["steps"] == 2 * max(1, round(finished[1]["rows"][0]["steps"] / 5))


def test_a_finished_comparison_trains_nothing_again(finished, store, monkeypatch):
    directory, record = finished
    monkeypatch.setattr(compare_runs, "pretrain", lambda *_, **__: pytest.fail("trained again"))
    assert run_compare(CompareConfig(store=store, output=directory, **TINY)) == record
    assert not list(directory.glob("runs/*/*/checkpoints"))


def test_an_interrupted_comparison_goes_on_to_the_same_table(finished, store, tmp_path, monkeypatch):
    cut = tmp_path / "cut"
    shutil.copytree(finished[0], cut)
    for path in cut.glob("results.*"):
        path.unlink()
    linear, cnn = cut / "runs" / "linear-avg", cut / "runs" / "cnn"
    (linear / "seed-1" / "result.json").unlink()  # stopped before it was measured
    shutil.rmtree(cnn / "rate-0.01")
    (cnn / "rates.json").unlink()  # between two rates
    shutil.rmtree(cnn / "seed-0")
    (cnn / "seed-0").mkdir()
    (cnn / "seed-0" / ".partial-config.json").write_text("{")  # before it began
    real, trained = compare_runs.pretrain, []
    monkeypatch.setattr(compare_runs, "pretrain", lambda *a, **o: (trained.append(a[1].name), real(*a, **o))[1])
    record = run_compare(CompareConfig(store=store, output=cut, **TINY))
    assert timeless(record) == timeless(finished[1])
    assert trained == ["rate-0.01", "seed-0"]


def test_another_command_on_the_same_directory_is_refused_by_name(finished, store, cells_file, tmp_path):
    directory, _ = finished
    with pytest.raises(UserError, match=r"--width was 16 when the comparison .* was started and is 32 now"):
        run_compare(CompareConfig(store=store, output=directory, **{**TINY, "width": 32}))
    with pytest.raises(UserError, match=r"--budget-tokens was 900"):
        run_compare(CompareConfig(store=store, output=directory, **{**TINY, "budget_tokens": 901}))
    other = tmp_path / "store"
    prepare([cells_file], other, split=".5,.2,.3", keep_obs=("cell_type",), workers=1, seed=1)
    with pytest.raises(UserError, match="the store was"):
        run_compare(CompareConfig(store=other, output=directory, **TINY))
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "file").write_text("")
    with pytest.raises(UserError, match="exists already"):
        run_compare(CompareConfig(store=store, output=tmp_path / "mine", **TINY))


def test_bad_stores_and_labels_are_refused_before_anything_is_written(store, small_store, cells_file, tmp_path, monkeypatch):
    output = tmp_path / "out"
    for where, options, message in [
        (store, {"label": "type"}, "keeps no column 'type': prepare it with --keep-obs type"),
        (small_store, {}, "keeps no column 'cell_type'"),
        (store, {"label": "source"}, "two are needed"),
        (tmp_path / "none", {}, "there is no store"),
    ]:
        with pytest.raises(UserError, match=message):
            run_compare(CompareConfig(store=where, output=output, **{**TINY, **options}))
    prepare([cells_file], tmp_path / "half", split=".5,.5,0", workers=1)
    with pytest.raises(UserError, match="has no test cells"):
        run_compare(CompareConfig(store=tmp_path / "half", output=output, **{**TINY, "label": None}))
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(UserError, match="runs in one process"):
        run_compare(CompareConfig(store=store, output=output, **TINY))
    assert not output.exists()


def test_rates_that_diverge_are_out_and_a_row_without_any_is_told(store, tmp_path, monkeypatch, capsys):
    real = compare_runs.pretrain

    def diverging(opened, run, **options):
        if options["structure"] == "cnn" or options["lr"] == 1e-2 or options["seed"] == 1:
            raise DivergedError("the loss of step 1 is not finite")
        return real(opened, run, **options)

    monkeypatch.setattr(compare_runs, "pretrain", diverging)
    record = run_compare(CompareConfig(store=store, output=tmp_path / "out", **{**TINY, "label": None, "json": False}))
    linear, cnn = record["rows"][:2]
    assert (linear["lr"], linear["seeds"], linear["diverged"]) == (1e-3, 1, 1)
    assert linear["mvc_loss_low"] is None
    assert (cnn["lr"], cnn["seeds"], cnn["mvc_loss"]) == (None, 0, None)
    shown = capsys.readouterr()
    assert "cnn: diverged at every rate." in shown.out
    assert "linear-avg: 1 of 2 runs diverged." in shown.out
    assert "linear-avg, rate 0.01 on 1 steps: diverged" in shown.err


def test_varied_options_and_a_budget_in_seconds(store, tmp_path):
    options = {**TINY, "structures": None, "vary": "pooling,mvc", "structure": "linear", "learning_rates": "1e-3",
               "budget_tokens": None, "budget_seconds": 0.05, "seeds": 1, "label": None}
    config = CompareConfig(store=store, output=tmp_path / "out", **options)
    record = run_compare(config)
    off, on = record["rows"][:2]
    assert [(row["mvc"], row["mvc_loss"] is None, row["structure"]) for row in (off, on)] == [
        ("off", True, "linear"), ("on", False, "linear"),
    ]
    assert [(row["row"], row["pooling"]) for row in record["rows"][:3]] == [
        ("pooling=avg,mvc=off", "avg"), ("pooling=avg,mvc=on", "avg"), ("gene mean", None),
    ]
    assert [refused["name"] for refused in record["refused"]] == ["pooling=cls,mvc=off", "pooling=cls,mvc=on"]
    assert "no token sees another" in record["refused"][0]["reason"]
    for row in (off, on):
        planned = json.loads((tmp_path / "out" / "runs" / row["row"] / "plan.json").read_text())
        assert row["steps"] == planned["steps"] == max(1, round(0.05 / planned["seconds_per_step"]))
    effect, overall = record["effects"]
    assert (effect["setting"], overall["setting"], effect["metric"]) == ("pooling avg", "all settings", "regression_loss")
    assert effect["difference"] == pytest.approx(on["regression_loss"] - off["regression_loss"])
    names = {path.name for path in (tmp_path / "out").iterdir()}
    assert {"effects.json", "effects.csv", "effects.md", "effects.png"} < names
    assert "quality.png" not in names  # both rows cost the same
    before = (tmp_path / "out" / "results.json").read_bytes()
    run_compare(config)  # with the recorded step time, not a new one
    assert (tmp_path / "out" / "results.json").read_bytes() == before


@pytest.mark.full
def test_kill_9_anywhere_ends_in_the_same_table(finished, store, tmp_path):
    options = {**TINY, "json": None}
    arguments = [f"--{name.replace('_', '-')}={value}" for name, value in options.items() if value is not None]
    command = [sys.executable, "-m", "scbench", "compare", str(store), "-o", str(tmp_path / "cut"), "--json", *arguments]
    environment = {**os.environ, "OMP_NUM_THREADS": str(torch.get_num_threads())}  # as `finished`: bits depend on it
    for seconds in (6, 7, 8, 9, 10):  # start-up takes about 5
        process = subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        time.sleep(seconds)
        process.send_signal(signal.SIGKILL)
        process.wait()
    last = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    assert timeless(json.loads(last.stdout)) == timeless(finished[1])
