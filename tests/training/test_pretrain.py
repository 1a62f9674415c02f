"""The loop: what a run leaves, that it repeats to the bit, and that nothing is lost by a kill."""

import itertools
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from scbench import ExpressionModel, Store, prepare, pretrain
from scbench.config import InputLaw
from scbench.data.loader import validation_batches
from scbench.errors import UserError
from scbench.training import checkpoint
from scbench.training.telemetry import OF_THE_MACHINE

SMALL = {"width": 16, "layers": 1, "heads": 2, "max_genes": 40, "batch_cells": 32, "steps": 12, "checkpoint_every": 5}
FLAGS = [word for name, value in SMALL.items() for word in (f"--{name.replace('_', '-')}", str(value))]


def rows(run: Path) -> list[dict]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def weights(run: Path) -> dict[str, torch.Tensor]:
    return load_file(run / "model" / "model.safetensors")


def assert_same_weights(a: Path, b: Path) -> None:
    first, second = weights(a), weights(b)
    assert first.keys() == second.keys()
    for name in first:
        assert torch.equal(first[name], second[name]), f"{name} differs"


@pytest.fixture(scope="module")
def finished(small_store, tmp_path_factory) -> Path:
    """An uninterrupted run in a process of its own (one thread, as the interrupted ones)."""
    path = tmp_path_factory.mktemp("runs") / "run"
    assert start(small_store, path).wait(timeout=120) == 0
    return path


def start(store: Path, output: Path, *more: str) -> subprocess.Popen:
    command = [sys.executable, "-m", "scbench", "pretrain", str(store), "-o", str(output), *FLAGS, *more]
    return subprocess.Popen(command, env={**os.environ, "OMP_NUM_THREADS": "1"}, stdout=subprocess.DEVNULL,
                            stderr=subprocess.PIPE, text=True)


def wait_for_step(process: subprocess.Popen, output: Path, step: int) -> None:
    metrics = output / "metrics.jsonl"
    for _ in range(3000):
        if metrics.is_file() and f'"step": {step},' in metrics.read_text():
            return
        assert process.poll() is None, process.stderr.read()
        time.sleep(0.02)
    raise AssertionError("the run did not get there")


def test_a_staged_store_gives_the_same_run(finished, small_store, tmp_path):
    run = tmp_path / "run"
    process = start(small_store, run, "--stage-to", str(tmp_path / "disk"))
    assert process.wait(timeout=120) == 0, process.stderr.read()
    assert_same_weights(run, finished)
    assert [path.name for path in (tmp_path / "disk").glob("[!.]*")] == [f"store-{Store.open(small_store).fingerprint[:16]}"]
    for directory in (run / "model", run / "checkpoints"):  # a published model carries no path of its maker
        assert not any(b"disk" in file.read_bytes() for file in directory.rglob("*.json"))


def test_a_run_leaves_what_it_promises(finished, small_store):
    assert {p.name for p in finished.iterdir()} == {"config.json", "environment.json", "vocabulary.json", "data.json",
                                                     "metrics.jsonl", "tensorboard", "checkpoints", "model"}
    steps = [row for row in rows(finished) if "loss" in row]
    assert [row["step"] for row in steps] == list(range(1, 13))
    assert steps[-1]["loss"] < steps[0]["loss"]
    assert [p.name for p in sorted((finished / "checkpoints").iterdir())] == ["step-00000010", "step-00000012"]
    files = [p for p in finished.rglob("*") if p.is_file() and "tensorboard" not in p.parts]
    assert {p.suffix for p in files} <= {".json", ".jsonl", ".safetensors", ".npy", ".md"}  # no pickle
    model = ExpressionModel.from_pretrained(finished / "model")
    store = Store.open(small_store)
    assert model.provenance["store_fingerprint"] == store.fingerprint
    assert model.provenance["training"]["width"] == 16
    assert str(small_store) not in (finished / "model" / "config.json").read_text()
    seen = np.concatenate([store.split(s).cells()["content_hash"] for s in ("train", "validation")])
    np.testing.assert_array_equal(model.training_cells, np.sort(seen))


def test_the_validation_loss_is_that_of_the_model(small_store, tmp_path):
    run = pretrain(small_store, tmp_path / "run", **{**SMALL, "steps": 3}, precision="fp32")
    store = Store.open(small_store)
    model = ExpressionModel.from_pretrained(run.model_dir)
    batches = validation_batches(store.split("validation"), store.vocabulary, InputLaw(40), seed=0, mask_ratio=0.4,
                                 max_cells=4096, batch_cells=7)
    errors, targets = [], []
    for batch in batches:
        output = model(batch)
        errors.append((output.regression - batch.targets).square())
        targets.append(torch.expm1(batch.targets).round())
    errors, counts = torch.cat(errors), torch.cat(targets)
    assert run.validation["masked_genes"] == len(counts)
    assert run.validation["regression_loss"] == pytest.approx(float(errors.mean()), rel=1e-5)
    for name, inside in {"1": counts == 1, "2-10": (counts >= 2) & (counts <= 10), "over 10": counts > 10}.items():
        assert run.validation[f"regression_loss_count_{name}"] == pytest.approx(float(errors[inside].mean()), rel=1e-5)


def test_the_same_seed_gives_the_same_run_and_another_seed_another(small_store, tmp_path):
    options = {**SMALL, "steps": 4}
    for name, seed in {"a": 1, "b": 1, "c": 2}.items():
        pretrain(small_store, tmp_path / name, **options, seed=seed)
    assert_same_weights(tmp_path / "a", tmp_path / "b")
    assert not torch.equal(weights(tmp_path / "a")["embedding.table"], weights(tmp_path / "c")["embedding.table"])


DEFAULT = ("zero1", "bf16")
OTHERS = [pair for pair in itertools.product(["zero0", "zero1", "zero2", "zero3"], ["bf16", "fp32"]) if pair != DEFAULT]


@pytest.mark.parametrize(("stage", "precision"), [DEFAULT, *(pytest.param(*o, marks=pytest.mark.full) for o in OTHERS)])
def test_kill_9_between_checkpoints_loses_nothing(small_store, tmp_path, finished, stage, precision):
    more = ("--deepspeed", stage, "--precision", precision)
    whole, cut = finished, tmp_path / "cut"
    if (stage, precision) != DEFAULT:
        whole = tmp_path / "whole"
        assert start(small_store, whole, *more).wait(timeout=120) == 0
    process = start(small_store, cut, *more)
    wait_for_step(process, cut, 7)
    process.kill()
    process.wait()
    assert not (cut / "model").exists()
    resumed = start(small_store, cut, *more, "--resume")
    assert resumed.wait(timeout=120) == 0, resumed.stderr.read()
    assert_same_weights(whole, cut)
    timeless = [[{k: v for k, v in row.items() if k not in OF_THE_MACHINE} for row in rows(run)]
                for run in (whole, cut)]
    assert timeless[0] == timeless[1]  # every row once, bit for bit


def test_sigterm_saves_and_leaves(small_store, tmp_path, finished):
    process = start(small_store, tmp_path / "run", "--checkpoint-every", "1000")
    wait_for_step(process, tmp_path / "run", 3)
    process.send_signal(signal.SIGTERM)
    assert process.wait(timeout=60) == 143
    assert "go on with --resume" in process.stderr.read()
    assert len(list((tmp_path / "run" / "checkpoints").iterdir())) == 1
    assert start(small_store, tmp_path / "run", "--resume").wait(timeout=120) == 0
    assert_same_weights(finished, tmp_path / "run")


def test_a_damaged_newest_checkpoint_is_skipped(finished):
    newest = finished / "checkpoints" / "step-00000012" / "exp_avg.safetensors"
    content = newest.read_bytes()
    newest.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    try:
        with pytest.warns(UserWarning, match="step-00000012 is damaged"):
            assert checkpoint.newest(finished).name == "step-00000010"
    finally:
        newest.write_bytes(content)
    assert checkpoint.newest(finished).name == "step-00000012"


def test_resuming_with_another_option_is_refused_by_name(small_store, finished):
    with pytest.raises(UserError, match=r"--width was 16 .* is 32 now"):
        pretrain(small_store, finished, **{**SMALL, "width": 32}, resume=True)


def test_a_store_without_validation_cells_trains(cells_file, tmp_path):
    store = prepare([cells_file], tmp_path / "store", split=(1, 0, 0), workers=1)
    run = pretrain(store, tmp_path / "run", **{**SMALL, "steps": 2})
    assert run.validation == {}
    assert len(ExpressionModel.from_pretrained(run.model_dir).training_cells) == 300


def test_an_existing_output_is_refused_and_resume_on_nothing_starts_anew(small_store, tmp_path, finished):
    with pytest.raises(UserError, match="exists already"):
        pretrain(small_store, finished, **SMALL)
    run = pretrain(small_store, tmp_path / "new", **{**SMALL, "steps": 2}, resume=True)
    assert run.steps == 2


def test_precision_policy_bf16_weights_fp32_master(small_store, tmp_path, monkeypatch):
    seen = {}
    from scbench.training import pretrain as module

    real = module.backward

    def spy(engine, window, denominator):
        losses = real(engine, window, denominator)
        seen["parameters"] = {p.dtype for p in engine.module.parameters()}
        seen["losses"] = losses.dtype
        return losses

    monkeypatch.setattr(module, "backward", spy)
    pretrain(small_store, tmp_path / "run", **{**SMALL, "steps": 2}, precision="bf16")
    assert seen == {"parameters": {torch.bfloat16}, "losses": torch.float32}
    master = load_file(tmp_path / "run" / "checkpoints" / "step-00000002" / "master.safetensors")
    assert all(t.dtype == torch.float32 for t in master.values())
    table = master["embedding.table"]
    assert (table != table.bfloat16().float()).any()  # finer than bf16: the update was kept in fp32
