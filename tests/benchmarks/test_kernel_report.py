"""The compile report sees registers, spills, shared memory and instructions; timings come after correctness."""

import csv
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")
HERE = Path(__file__).parent
BENCHMARKS = HERE.parents[1] / "benchmarks"
LIMITS = {"sm_80": 163 * 1024, "sm_90": 227 * 1024, "sm_100": 227 * 1024, "gfx942": 64 * 1024}


def run(*arguments, **environment) -> subprocess.CompletedProcess:
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": f"{BENCHMARKS}{os.pathsep}{HERE}", **environment}
    environment.pop("TRITON_INTERPRET", None)
    command = [sys.executable, *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=1800, env=environment)


LAUNCHES = {
    "spills": "spilling_kernel[(1,)](x, y, N=32768 if target == 'gfx942' else 16384, num_warps=1)",
    "fits": "spilling_kernel[(1,)](x, y, N=4096, num_warps=4)",
    "product": "product_kernel[(1,)](h, h, y, B=64)",
    "narrow": "stride_kernel[(1,)](x, y, STRIDE=8, N=512)",
}


@pytest.fixture(scope="module")
def tiny() -> dict[str, dict[str, dict]]:
    """The row of each tiny kernel, a target."""
    calls = ", ".join(f"{name!r}: lambda: {launch}" for name, launch in LAUNCHES.items())
    script = f"""
import json, torch
from compile_report import rows_of
from tiny_kernels import *
x, y = torch.randn(128, 128), torch.empty(128, 128)
h = x.bfloat16()
calls, rows = {{{calls}}}, {{}}
for name, call in calls.items():
    rows[name] = {{}}
    for target in {list(LIMITS)}:
        rows[name][target] = rows_of(call, target)
print(json.dumps(rows))
"""
    process = run("-c", script)
    assert process.returncode == 0, process.stderr[-3000:]
    return {name: {target: row for target, [row] in rows.items()} for name, rows in json.loads(process.stdout).items()}


def test_a_spill_is_reported(tiny):
    for target, row in tiny["spills"].items():
        assert row["kernel"] == "spilling_kernel" and row["target"] == target and row["shared_limit"] == LIMITS[target]
        assert row["spills"] > 100 and row["warps"] == 1 and row["tile"]["N"] >= 16384, row
        assert row["registers"] >= 64, row


def test_a_kernel_that_fits_does_not_spill(tiny):
    for row in tiny["fits"].values():
        assert row["spills"] == 0 and 16 <= row["registers"] < 128 and row["shared_bytes"] < 1024
        assert row["tensor_core"] is None and not row["dot"] and row["wide_loads"] == row["loads"] > 0


def test_matrix_instructions_are_seen(tiny):
    names = {target: row["tensor_core"] for target, row in tiny["product"].items()}
    assert names == {"sm_80": "mma.sync", "sm_90": "wgmma.mma_async", "sm_100": "tcgen05.mma", "gfx942": "v_mfma"}
    for row in tiny["product"].values():
        assert row["dot"] == "bf16" and 0 < row["shared_bytes"] <= row["shared_limit"] and row["wide_loads"]
        assert row["flop_per_byte"] == pytest.approx(2 * 64**3 / (64 * 64 * (2 + 2 + 4)))


def test_narrow_loads_are_seen(tiny):
    assert tiny["narrow"]["sm_90"]["wide_loads"] == 0 < tiny["narrow"]["sm_90"]["loads"]


def check(row: dict) -> None:
    """What every real kernel must have: no spills, shared memory that fits, matrix instructions for products of bf16."""
    assert row["spills"] == 0, row
    assert row["shared_bytes"] <= row["shared_limit"] == LIMITS[row["target"]], row
    assert row["registers"] > 0 and row["tile"], row
    assert row["tensor_core"] or "bf16" not in (row["dot"] or ""), row


def test_the_report_of_one_op(tmp_path):
    path = tmp_path / "report.json"
    which = ["--ops", "dropout", "--widths", "256", "--dtypes", "bf16", "--targets", "sm_90", "gfx942", "--batch", "2"]
    process = run(BENCHMARKS / "kernels.py", "--compile-report", path, *which)
    assert process.returncode == 0, process.stderr[-3000:]
    rows = json.loads(path.read_text())
    assert {row["target"] for row in rows} == {"sm_90", "gfx942"}
    for row in rows:
        check(row)
        assert (row["op"], row["dtype"], row["width"]) == ("dropout", "bf16", 256) and row["wide_loads"]
    assert "registers" in process.stdout
    with open(path.with_suffix(".csv"), newline="") as file:
        lines = list(csv.DictReader(file))
    assert {line["kernel"] for line in lines} == {row["kernel"] for row in rows} and all(line["triton"] for line in lines)


@pytest.mark.full
def test_every_kernel_fits_every_target(tmp_path):
    path = tmp_path / "report.json"
    process = run(BENCHMARKS / "kernels.py", "--compile-report", path)
    assert process.returncode == 0, process.stderr[-3000:]
    rows = json.loads(path.read_text())
    for row in rows:
        check(row)
    for op in {row["op"] for row in rows}:
        combinations = {(r["target"], r["dtype"], r["width"]) for r in rows if r["op"] == op}
        assert len(combinations) == 4 * 2 * 2, (op, combinations)


def test_timings_after_correctness(tmp_path):
    """On the CPU path, with predictions from a traffic file."""
    counted = {"op": "add_norm", "dtype": "fp32", "width": 256, "cells": 2, "tokens": 17, "bytes_moved": 3.35e12 * 0.6 * 1e-6,
               "bytes_eager": 10**9, "launches": 2, "eager_launches": 3}
    traffic, path = tmp_path / "traffic.json", tmp_path / "kernels.json"
    traffic.write_text(json.dumps([{**counted, "direction": "forward"}]))
    process = run(BENCHMARKS / "kernels.py", "--ops", "add_norm", "--dtypes", "fp32", "--batch", "2", "--tokens", "17",
                  "--steps", "2", "--traffic", traffic, "--json", path)
    assert process.returncode == 0, process.stderr[-3000:]
    rows = {(row["implementation"], row["direction"]): row for row in json.loads(path.read_text())}
    assert len(rows) == 4
    for row in rows.values():
        assert row["status"] == "ok" and 0 < row["seconds"]["p20"] <= row["seconds"]["median"] <= row["seconds"]["p80"]
    predicted = rows["scbench", "forward"]["predicted_h100_seconds"]
    assert predicted == pytest.approx(1e-6 + 2 * 5e-6)  # 1 µs of memory, two launches
    assert rows["scbench", "backward"]["predicted_h100_seconds"] is None
    assert "Predicted" in process.stdout


def test_what_computes_something_else_gets_no_time(tmp_path):
    """A rival whose gradient alone is wrong."""
    path = tmp_path / "kernels.json"
    script = f"""
import sys
sys.path.insert(0, {str(BENCHMARKS)!r})
import eager, torch
right = eager.causal_conv
eager.causal_conv = lambda x, **others: right(x, **others) + (x - x.detach()).sum() * 1e-2
import kernels
which = ["--ops", "causal_conv", "--dtypes", "fp32", "--batch", "2", "--tokens", "9", "--steps", "1"]
kernels.main([*which, "--json", {str(path)!r}])
"""
    process = run("-c", script)
    assert process.returncode == 0, process.stderr[-3000:]
    rows = [row for row in json.loads(path.read_text()) if row["implementation"] == "scbench"]
    assert rows and all(row["seconds"] is None and row["status"].startswith("failed: gradient of x") for row in rows)
    assert "failed: gradient of x" in process.stdout
