"""Ten training steps through the Triton kernels, under their interpreter, are those of the PyTorch path: `pretrain` itself,
DeepSpeed's engine and dropout included."""

import json
import os
import subprocess
import sys
from pathlib import Path

import anndata
import numpy as np
import pytest

from scbench import prepare
from scbench.training.telemetry import OF_THE_MACHINE

pytest.importorskip("triton", reason="Triton is not installed")

WORKER = Path(__file__).with_name("triton_worker.py")
DATA = os.environ.get("SCBENCH_TEST_DATA")
STEPS = 10
# SGD: Adam would hide a wrong gradient. The engine's ZeRO stage 0 leaves the gradients where they can be read.
SMALL = {"width": 32, "layers": 1, "heads": 2, "max_genes": 24, "batch_cells": 3, "steps": STEPS, "dropout": 0.15,
         "optimizer": "sgd", "lr": 0.05, "clip": 1.0, "warmup_steps": 0, "precision": "fp32", "deepspeed": "zero0",
         "validation_cells": 2}
LARGER = {**SMALL, "layers": 2, "heads": 4, "max_genes": 63, "batch_cells": 6}
FAST = {structure: {**SMALL, "structure": structure} for structure in ("transformer", "gnn", "mamba")}
FULL = {f"larger {structure}": {**LARGER, "structure": structure} for structure in FAST}
# The reference's transformer also drops attention probabilities, and its cells are padded.
FULL |= {f"aaai2025 {structure}": {**SMALL, "structure": structure, "recipe": "aaai2025"} for structure in FAST}
MODULES = {"transformer": {"attention_triton", "add_norm"}, "gnn": {"attention_triton", "table_rows"},
           "mamba": {"selective_scan_triton", "causal_conv"}}
OF_ALL = {"gene_value_embedding_triton", "masked_regression", "mvc", "segments"}
# Both paths add the same numbers in another order, at most some 2⁸ at a time. Rounding of n terms is about √n · 2⁻²⁴ of their
# size, here 2⁻²⁰; where terms cancel it is more of the sum. The largest seen: 8e-7 in a metric, 3e-6 in a gradient (of which,
# by fp64, 3e-6 is PyTorch's and 4e-7 Triton's). An error of 1e-4 in attention's query gradient fails, and so do 100 of 65,536
# dropout decisions turned round. (Larger models leave it at times: a number that rounds to the other side of a ReLU's kink
# changes a gradient by 1e-4.)
TOLERANCE = 2**-16


@pytest.fixture(scope="module")
def store(small_store, tmp_path_factory) -> Path:
    """400 real cells and the 300 genes that most of them express, or synthetic cells where there are none: the interpreter
    runs one program after the other, and a gene table's gradient has one for so many genes."""
    if DATA is None:
        return small_store
    path = tmp_path_factory.mktemp("real")
    cells = anndata.read_h5ad(Path(DATA) / "pbmc3k.h5ad")[:400]
    cells[:, np.argsort(-cells.X.getnnz(0), kind="stable")[:300]].write_h5ad(path / "cells.h5ad")
    prepare([path / "cells.h5ad"], path / "store", split=".8,.1,.1", workers=1)
    return path / "store"


def train(store: Path, out: Path, runs: dict[str, dict]) -> dict[str, Path]:
    """The folders of both paths' results."""
    folders = {kernels: out / kernels for kernels in ("torch", "triton")}
    for kernels, folder in folders.items():
        folder.mkdir()
        environment = {**os.environ, "SCBENCH_KERNELS": kernels, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
        command = [sys.executable, str(WORKER), str(store), str(folder), json.dumps(runs)]
        done = subprocess.run(command, env=environment, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr[-3000:]
    return folders


@pytest.fixture(scope="module")
def fast(store, tmp_path_factory) -> dict[str, Path]:
    return train(store, tmp_path_factory.mktemp("fast"), FAST)


@pytest.fixture(scope="module")
def full(store, tmp_path_factory) -> dict[str, Path]:
    return train(store, tmp_path_factory.mktemp("full"), FULL)


def assert_same_run(folders: dict[str, Path], name: str) -> None:
    """Losses and gradient norm of every step, the validation after them, every gradient of the first step."""
    rows = [[json.loads(row) for row in (folder / name / "metrics.jsonl").read_text().splitlines()]
            for folder in folders.values()]
    assert [row["step"] for row in rows[0]] == [row["step"] for row in rows[1]] == [*range(1, STEPS + 1), STEPS]
    for plain, ours in zip(*rows, strict=True):
        for metric in plain.keys() - set(OF_THE_MACHINE):
            assert ours[metric] == pytest.approx(plain[metric], rel=TOLERANCE, abs=0), f"step {plain['step']}: {metric}"
    assert rows[0][STEPS - 1]["loss"] < rows[0][0]["loss"] / 2  # it has learnt: wrong gradients would show
    with np.load(folders["torch"] / f"{name}.npz") as plain, np.load(folders["triton"] / f"{name}.npz") as ours:
        assert set(plain) == set(ours)
        for parameter in plain:
            largest = np.abs(plain[parameter]).max()
            assert largest > 0, f"{parameter} has no gradient to compare"
            assert np.abs(ours[parameter] - plain[parameter]).max() <= TOLERANCE * largest, parameter


def assert_kernels_ran(folders: dict[str, Path], name: str) -> None:
    """Every op's kernels, and the sums of the gene tables' gradients, in every step; none on the PyTorch path."""
    launches = {kernels: json.loads((folder / f"{name}.json").read_text()) for kernels, folder in folders.items()}
    assert launches["torch"] == {}
    dropping = set() if name.startswith("aaai2025") else {"add_norm"}  # the reference's GNN and Mamba have no dropout
    for module in OF_ALL | MODULES[name.split()[-1]] | dropping:
        assert launches["triton"].get(module, 0) >= STEPS, module


@pytest.mark.parametrize("name", FAST)
def test_ten_steps_are_the_same(fast, name):
    assert_same_run(fast, name)
    assert_kernels_ran(fast, name)


@pytest.mark.full
@pytest.mark.parametrize("name", FULL)
def test_ten_steps_of_larger_and_of_the_references_models_are_the_same(full, name):
    assert_same_run(full, name)
    assert_kernels_ran(full, name)
