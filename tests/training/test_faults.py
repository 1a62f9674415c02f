"""What a run does when something breaks: what it says, what it leaves, with which exit code."""

import errno
import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch

from scbench import Store, pretrain
from scbench.config import PretrainConfig
from scbench.errors import UserError
from scbench.training import checkpoint, faults, plan
from scbench.training import pretrain as module

SMALL = {"width": 16, "layers": 1, "heads": 2, "max_genes": 40, "batch_cells": 32, "steps": 12, "checkpoint_every": 5,
         "validate_every": 100, "validation_cells": 1}


@pytest.fixture
def planted(monkeypatch):
    """Let something happen in the backward pass of a step (counted from 1)."""
    def plant(at: int, happens) -> None:
        real, steps = module.backward, []

        def backward(engine, window, denominator):
            steps.append(1)
            losses = real(engine, window, denominator)
            return happens(engine, losses) if len(steps) == at else losses

        monkeypatch.setattr(module, "backward", backward)
    return plant


def assert_names_the_batch(error: str, run: Path, store: Path, what: str) -> list[int]:
    """Step 7; returns the cells that were listed."""
    assert error.startswith(f"the {what} of step 7 is not finite (seed 0, samples 192 to 223: ")
    listed = json.loads((run / "diverged-step-00000007.json").read_text())
    assert listed["step"] == 7 and listed["not_finite"] == what
    split = Store.open(store).split("train")
    table = split.cells()
    for row in listed["cells"]:
        assert table["original_id"][row["cell"]] == row["original_id"] and row["source"] == "cells.h5ad"
    assert sorted(row["sample"] for row in listed["cells"]) == list(range(192, 224))
    assert f"{listed['cells'][0]['original_id']} of cells.h5ad" in error
    return [row["cell"] for row in listed["cells"]]


@pytest.mark.parametrize("deepspeed", ["zero0", "zero1", pytest.param("zero3", marks=pytest.mark.full)])
@pytest.mark.parametrize("precision", ["bf16", pytest.param("fp32", marks=pytest.mark.full)])
def test_a_gradient_that_is_not_finite_stops_before_it_is_saved(deepspeed, precision, small_store, tmp_path, monkeypatch):
    """DeepSpeed leaves such a step out and goes on, or updates by it: both would be silent."""
    windows, hooks, real = [], [], module.backward

    def spoil(engine, window, denominator):
        windows.append(window)
        if len(windows) == 7:
            parameter = next(p for name, p in engine.module.named_parameters() if "value" in name)
            hooks.append(parameter.register_hook(lambda gradient: gradient * torch.inf))
        return real(engine, window, denominator)

    monkeypatch.setattr(module, "backward", spoil)
    with pytest.raises(UserError) as error:
        pretrain(small_store, tmp_path / "run", **SMALL, deepspeed=deepspeed, precision=precision)
    cells = assert_names_the_batch(str(error.value), tmp_path / "run", small_store, "gradient")
    assert cells == [int(cell) for batch in windows[6] for cell in batch.cells]
    assert [path.name for path in (tmp_path / "run" / "checkpoints").iterdir()] == ["step-00000005"]
    assert not (tmp_path / "run" / "model").exists()


def test_a_loss_that_is_not_finite_stops_the_run_and_names_the_batch(small_store, tmp_path, planted):
    planted(7, lambda engine, losses: losses * torch.nan)
    with pytest.raises(UserError) as error:
        pretrain(small_store, tmp_path / "run", **SMALL)
    assert_names_the_batch(str(error.value), tmp_path / "run", small_store, "loss")


@pytest.mark.parametrize("failure", [
    lambda *_: torch.empty(2**55, dtype=torch.uint8),  # torch's own words, on the CPU
    lambda *_: (_ for _ in ()).throw(torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")),
    lambda *_: np.empty(2**60, dtype=np.uint8),
])
def test_out_of_memory_says_which_knob_helps(failure, small_store, tmp_path, planted):
    planted(2, failure)
    with pytest.raises(UserError, match=r"^rank 0 is out of memory \(.*\): go on with --resume and --micro-batch-cells 16 "
                                        r"\(now 32; the same training\), or start a new run with a smaller --max-genes .*"
                                        r"; by `scbench plan` this run fits, so something else takes memory here\.$"):
        pretrain(small_store, tmp_path / "run", **SMALL)


def test_out_of_memory_says_what_plan_recommends(small_store, monkeypatch):
    """With less and less free memory: the run fits, smaller micro-batches do, nothing does."""
    options = {**SMALL, "width": 64, "layers": 6, "max_genes": 500}
    config = PretrainConfig(store=small_store, output=Path("run"), **options)
    said, cells = [], []
    for free in np.geomspace(1e9, 1e5, 60):
        monkeypatch.setattr(plan, "_free_memory", lambda free=free: free)
        words = str(faults.memory_error(MemoryError(), config, 0, 1)).split("; ")[-1]
        number = re.search(r"^`scbench plan` recommends --deepspeed zero\d --micro-batch-cells (\d+) \(predicted\)\.$", words)
        cells += [int(number[1])] if number else []
        kind = "recommends" if number else "fits" if "this run fits, so something else" in words else "nothing"
        assert kind != "nothing" or words.startswith("`scbench plan` says: nothing fits the host's memory: ")
        said += [kind] if said[-1:] != [kind] else []
    assert said == ["fits", "recommends", "nothing"]
    assert cells == sorted(cells, reverse=True) and 1 <= cells[-1] < cells[0] < 32


def test_other_errors_are_left_as_they_are(small_store, tmp_path, planted):
    planted(2, lambda *_: (_ for _ in ()).throw(RuntimeError("something else")))
    with pytest.raises(RuntimeError, match="something else"):
        pretrain(small_store, tmp_path / "run", **SMALL)


def test_a_full_disk_keeps_the_last_checkpoint(small_store, tmp_path):
    """A real one, of 1 MB: two checkpoints fit in it, and not a third beside them. Safetensors' own error is no OSError."""
    disk = tmp_path / "disk"
    disk.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", disk], capture_output=True).returncode:
        pytest.skip("mounting a small disk takes root")
    try:
        with pytest.raises(UserError, match=r"the checkpoint of step 12 could not be written to .*[Nn]o space left.*--resume"):
            pretrain(small_store, disk / "run", **{**SMALL, "width": 48})
        left = sorted(path.name for path in (disk / "run" / "checkpoints").iterdir())
        assert left == ["step-00000005", "step-00000010"]
        assert checkpoint.newest(disk / "run").name == "step-00000010"
    finally:
        subprocess.run(["umount", disk], check=True)


def test_a_disk_that_fails_keeps_the_last_checkpoint(small_store, tmp_path, monkeypatch):
    real = checkpoint.save_file

    def full(tensors, path):
        if "step-00000010" in str(path):
            raise OSError(errno.EIO, "Input/output error")
        real(tensors, path)

    monkeypatch.setattr(checkpoint, "save_file", full)
    with pytest.raises(UserError, match=r"step 10 could not be written.*Input/output error"):
        pretrain(small_store, tmp_path / "run", **SMALL)
    assert [path.name for path in (tmp_path / "run" / "checkpoints").iterdir()] == ["step-00000005"]


def test_what_a_killed_writer_left_is_removed_and_only_the_last_checkpoints_are_kept(small_store, tmp_path):
    run = pretrain(small_store, tmp_path / "run", **{**SMALL, "checkpoint_every": 2, "keep_last": 3})
    checkpoints = run.directory / "checkpoints"
    assert sorted(path.name for path in checkpoints.iterdir()) == [f"step-{step:08d}" for step in (8, 10, 12)]
    partial = checkpoints / ".partial-0123-step-00000014"
    partial.mkdir()
    (partial / "master.safetensors").write_bytes(b"half")
    pretrain(small_store, tmp_path / "run", **{**SMALL, "checkpoint_every": 2, "keep_last": 3}, resume=True)
    assert not partial.exists()


def test_tensorboard_and_metrics_are_cut_back_to_the_checkpoint(small_store, tmp_path):
    """Read as TensorBoard does, which drops what a later session says again."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    start = [sys.executable, "-m", "scbench", "pretrain", str(small_store), "-o", str(tmp_path / "run"),
             *(word for name, value in SMALL.items() for word in (f"--{name.replace('_', '-')}", str(value)))]
    killed = subprocess.Popen(start, stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL)
    metrics = tmp_path / "run" / "metrics.jsonl"
    while not (metrics.is_file() and '"step": 8,' in metrics.read_text()):
        assert killed.poll() is None
        time.sleep(0.01)
    killed.send_signal(signal.SIGKILL)
    killed.wait()
    subprocess.run([*start, "--resume"], check=True, capture_output=True)
    rows = [json.loads(line) for line in metrics.read_text().splitlines()]
    events = EventAccumulator(str(tmp_path / "run" / "tensorboard"), size_guidance={"scalars": 0})
    events.Reload()
    assert "validation_loss" in events.Tags()["scalars"] and "token_imbalance" in events.Tags()["scalars"]
    for name in ("loss", "gradient_norm", "lr", "tokens"):
        shown = [(event.step, event.value) for event in events.Scalars(name)]
        assert [step for step, _ in shown] == list(range(1, 13))
        np.testing.assert_allclose([value for _, value in shown], [row[name] for row in rows if name in row], rtol=1e-6)
    assert os.listdir(tmp_path / "run" / "tensorboard")
