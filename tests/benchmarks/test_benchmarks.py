"""The benchmarks run as users run them, refuse to time what computes something else, and count FLOPs as torch does."""

import csv
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
TINY = ["--batch-cells", "3", "--width", "32", "--layers", "2", "--heads", "4", "--steps", "2", "--warmup", "1"]
SYNTHETIC = ["--genes", "20", "--vocabulary-size", "300"]

# One weight of plain_sdpa doubled after loading: the loss check must see it.
PLANTED = """
import sys
sys.path.insert(0, sys.argv.pop(1))
import plain, rivals
load = plain.PlainModel.load_weights
def load_wrongly(model, weights):
    load(model, weights)
    model.regression_head.linear3.weight.data *= 2
plain.PlainModel.load_weights = load_wrongly
rivals.main(sys.argv[1:])
"""


def run(*arguments) -> subprocess.CompletedProcess:
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=300, env=environment)


def rows_of(process: subprocess.CompletedProcess, path: Path) -> dict[str, dict]:
    assert process.returncode == 0, process.stderr[-3000:]
    return {row["implementation"]: row for row in json.loads(path.read_text())}


def assert_measured(row: dict) -> None:
    assert row["status"] == "ok" and row["structure"] == "transformer"
    assert row["cells_per_second"] > 0 and 0 < row["mfu"] < 1 and np.isfinite(row["loss"])
    if sys.platform == "linux":
        assert 10**8 < row["peak_bytes"] < 10**10
    timing = row["step_seconds"]
    assert timing["p20"] <= timing["median"] <= timing["p80"]


@pytest.fixture
def import_benchmark(monkeypatch):
    """Import a module of benchmarks/ the way its scripts do."""
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    return __import__


def test_throughput_on_synthetic_cells(tmp_path):
    path = tmp_path / "out.json"
    how = ["--precision", "fp32", "--deepspeed", "zero0", "--json", path]
    process = run(BENCHMARKS / "throughput.py", *TINY, *SYNTHETIC, *how)
    row = rows_of(process, path)["scbench"]
    assert_measured(row)
    parts = sum(row[f"{part}_seconds"]["median"] for part in ("forward", "backward", "optimizer"))
    assert parts == pytest.approx(row["step_seconds"]["median"], rel=0.5)  # medians of parts need not add up
    assert row["tokens_per_second"] == pytest.approx(21 * row["cells_per_second"])
    assert row["settings"]["genes"] == 20 and row["settings"]["precision"] == "fp32"
    assert "8 d^2" in process.stdout
    with open(path.with_suffix(".csv"), newline="") as file:
        lines = list(csv.DictReader(file))
    assert float(next(line["value"] for line in lines if line["metric"] == "cells_per_second")) == row["cells_per_second"]
    assert all(line["revision"] and line["torch"] and line["processor"] and line["threads"] == "1" for line in lines)


def test_rivals_on_a_store(small_store, tmp_path):
    """Its cells differ in length: the padded implementations must mask their pads to agree with the packed one."""
    path = tmp_path / "out.json"
    process = run(BENCHMARKS / "rivals.py", *TINY, "--store", small_store, "--json", path)
    rows = rows_of(process, path)
    assert list(rows) == ["reference", "plain_sdpa", "scbench"]
    for row in rows.values():
        assert_measured(row)
        assert row["loss"] == pytest.approx(rows["reference"]["loss"], rel=2e-2)
        assert row["settings"]["store"] == str(small_store)
    assert [row["settings"]["precision"] for row in rows.values()] == ["fp32", "bf16", "bf16"]
    assert "x reference" in process.stdout


def test_what_computes_something_else_gets_no_number(tmp_path):
    path = tmp_path / "out.json"
    process = run("-c", PLANTED, BENCHMARKS, *TINY, *SYNTHETIC, "--implementations", "plain_sdpa", "--json", path)
    wrong = rows_of(process, path)["plain_sdpa"]
    assert wrong["status"] in process.stdout
    assert wrong["status"].startswith("failed: loss") and "in fp32" in wrong["status"]
    assert wrong["cells_per_second"] is None and wrong["mfu"] is None and wrong["peak_bytes"] is None


def test_a_wrong_gradient_is_a_failure(import_benchmark):
    check = import_benchmark("check")
    right = check.Result(loss=1.0, gradient_norm=3.0)
    assert check.failure("plain_sdpa", "fp32", right, right) is None
    assert "gradient norm" in check.failure("plain_sdpa", "fp32", check.Result(1.0, 2.9), right)
    assert "loss" in check.failure("plain_sdpa", "bf16", check.Result(float("nan"), 3.0), right)


def test_synthetic_cells_look_like_a_census(import_benchmark):
    cells, options = import_benchmark("cells"), import_benchmark("options")
    vocabulary, [batch] = cells.load_batches(options.Options(genes=512), 1)
    assert vocabulary.size == 60_697
    assert (batch.cell_offsets.diff() == 513).all()
    assert (batch.genes[batch.cell_offsets[:-1].long()] == vocabulary.cls).all()
    assert len(batch.masked) / (32 * 512) == pytest.approx(0.4, abs=0.02)
    _, [again] = cells.load_batches(options.Options(genes=512), 1)
    assert torch.equal(batch.genes, again.genes) and torch.equal(batch.values, again.values)
    raw = [cells.raw_cell(options.Options(), 60_694, sample) for sample in range(64)]
    counts = np.concatenate([c for _, c in raw])
    assert 0.6 < (counts == 1).mean() < 0.75 and 0.005 < (counts > 10).mean() < 0.06
    assert 1000 < np.median([len(g) for g, _ in raw]) < 2000
    assert all((np.diff(g) > 0).all() for g, _ in raw)


def test_flops_are_those_that_torch_counts(import_benchmark):
    """Dense forward and backward of the plain model: every matrix product, the attention's included."""
    flops, dense_batch, plain = map(import_benchmark, ("flops", "dense_batch", "plain"))
    width, layers, cells, length, n_masked = 64, 2, 3, 65, 40
    rng = np.random.default_rng(0)
    genes = torch.from_numpy(rng.integers(0, 100, (cells, length)))
    masked = torch.from_numpy(np.sort(rng.choice(cells * length, n_masked, replace=False)))
    batch = dense_batch.DenseBatch(genes, torch.rand(cells, length), torch.rand(cells, length), genes < 0, masked,
                                   masked // length, torch.rand(n_masked))
    model = plain.PlainModel(100, width, layers, 4, 0.0)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, 0, 0.05)
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as forward:
        loss = model(batch, False)
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as backward:
        loss.backward()
    # Every masked gene has its own query here, so queries = masked genes.
    sizes, shape = (np.full(cells, length), n_masked, n_masked), {"width": width, "layers": layers}
    encoder, heads = flops.forward_flops(*sizes, **shape)
    counted = {name.split(".")[-1]: sum(operations.values()) for name, operations in forward.get_flop_counts().items()}
    assert counted["encoder"] == encoder
    assert counted["regression_head"] + counted["mvc_head"] == pytest.approx(heads, rel=0.01)  # torch counts no dot product
    value_mlp = counted["PlainModel"] - counted["encoder"] - counted["regression_head"] - counted["mvc_head"]
    whole = forward.get_total_flops() + backward.get_total_flops() - 3 * value_mlp
    assert flops.step_flops(*sizes, **shape) == pytest.approx(whole, rel=0.03)


def test_the_goal_costs_what_is_stated(import_benchmark):
    """A cell of 513 tokens, 6 layers x 256, heads at 205 masked genes: about 12.5 GFLOP."""
    flops = import_benchmark("flops")
    cost = flops.step_flops(np.array([513]), 205, 205, width=256, layers=6)
    assert cost == pytest.approx(12.5e9, rel=0.01)


def test_bad_options_are_one_sentence():
    process = run(BENCHMARKS / "throughput.py", "--genes", "400", "--vocabulary-size", "300")
    assert process.returncode == 2
    assert process.stderr.strip().count("\n") == 0 and "--genes 400" in process.stderr
