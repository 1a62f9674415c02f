"""The documented launch commands, run as documented, against one process."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from scbench.training.telemetry import OF_THE_MACHINE

BIN = Path(sys.executable).parent
OPTIONS = ["--width", "16", "--layers", "1", "--heads", "2", "--max-genes", "40", "--batch-cells", "32", "--steps", "20",
           "--optimizer", "sgd", "--lr", "0.02", "--precision", "fp32"]
LAUNCHERS = {
    "alone": [sys.executable, "-m", "scbench"],
    "torchrun": [BIN / "torchrun", "--standalone", "--nproc-per-node", "2", "-m", "scbench"],
    "deepspeed": [BIN / "deepspeed", "--num_accelerators", "2", "--master_port", "29671", "--module", "scbench"],
}


def pretrain(launcher: str, store: Path, output: Path, *more: str) -> list[dict]:
    command = [*map(str, LAUNCHERS[launcher]), "pretrain", str(store), "-o", str(output), *OPTIONS, *more]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PATH": f"{BIN}:{os.environ['PATH']}"}
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, env=environment)
    assert done.returncode == 0, done.stderr[-3000:]
    rows = [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]
    shutil.rmtree(output)
    return rows


@pytest.fixture(scope="module")
def alone(small_store, tmp_path_factory):
    return pretrain("alone", small_store, tmp_path_factory.mktemp("alone") / "run")


@pytest.mark.full
@pytest.mark.parametrize(("launcher", "stage"), [("torchrun", 2), *(("deepspeed", stage) for stage in range(4))])
def test_two_ranks_train_as_one_process_does(small_store, tmp_path, alone, launcher, stage):
    rows = pretrain(launcher, small_store, tmp_path / "run", "--deepspeed", f"zero{stage}", "--micro-batch-cells", "8")
    assert [row["step"] for row in rows] == [row["step"] for row in alone]
    for row, expected in zip(rows, alone, strict=True):
        for name in expected:
            if name not in OF_THE_MACHINE:
                assert row[name] == pytest.approx(expected[name], rel=1e-4, abs=1e-7), (row["step"], name)


def test_a_mistake_under_a_launcher_is_one_sentence_too(small_store, tmp_path):
    verb = ["pretrain", str(small_store), "-o", str(tmp_path), "--heads", "3"]
    command = [*LAUNCHERS["alone"], "--local_rank=0", *verb]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert done.returncode == 2
    assert done.stderr.count("\n") == 1
