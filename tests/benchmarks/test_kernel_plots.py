"""The kernels' pictures show the numbers of the files, and say which are predicted."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
SHAPE = {"width": 32, "cells": 2, "tokens": 17}

# What a figure holds, instead of the figure.
LOOK = """
import json, sys, kernel_plots
def look(figure, path):
    axes = {a.get_title(): a for a in figure.axes}
    print(json.dumps({
        "title": figure.get_suptitle(), "file": path.name, "panels": list(axes),
        "points": {t: [c.lines[0].get_xydata().tolist() for c in a.containers if hasattr(c, "lines")]
                   for t, a in axes.items()},
        "bars": {t: {c.get_label(): [p.get_width() for p in c] for c in a.containers if hasattr(c, "patches")}
                 for t, a in axes.items()},
    }))
kernel_plots.save = look
kernel_plots.main(sys.argv[1:])
"""


def run(*arguments) -> subprocess.CompletedProcess:
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(BENCHMARKS)}
    return subprocess.run([sys.executable, *map(str, arguments)], capture_output=True, text=True, timeout=300, env=environment)


@pytest.fixture
def files(tmp_path):
    """Timings and traffic of two ops, of which one failed; eager takes 8 ms, ours 2 (1 to 4) forward and 4 backward."""
    timings, traffic = [], []
    for op in ("dropout", "mvc"):
        for direction, ours in (("forward", 2e-3), ("backward", 4e-3)):
            for name, median in (("scbench", ours), ("eager", 8e-3)):
                seconds = {"median": median, "p20": median / 2, "p80": 2 * median}
                failed = op == "mvc" and name == "scbench"
                timings.append({
                    "op": op, "direction": direction, "dtype": "fp32", "width": 32, "implementation": name,
                    "status": "failed" if failed else "ok", "seconds": None if failed else seconds,
                    "predicted_a100_seconds": median / 100, "predicted_h100_seconds": None,
                    "settings": {**SHAPE, "device": "cpu"},
                })
            bytes_ = {"bytes_required": 10**6, "bytes_moved": 2 * 10**6, "bytes_eager": 5 * 10**6}
            traffic.append({"op": op, "direction": direction, "dtype": "fp32", **bytes_, **SHAPE})
    paths = tmp_path / "kernels.json", tmp_path / "traffic.json"
    for path, rows in zip(paths, (timings, traffic), strict=True):
        path.write_text(json.dumps(rows))
    return ["--timings", paths[0], "--traffic", paths[1], "--output", tmp_path / "plots"]


def test_each_number_has_its_place(files):
    process = run("-c", LOOK, *files)
    assert process.returncode == 0, process.stderr[-3000:]
    looks = [json.loads(line) for line in process.stdout.splitlines() if line.startswith("{")]
    time, predicted, traffic = looks
    assert time["panels"] == ["forward, fp32", "backward, fp32"] and "CPU" in time["title"]
    assert time["points"] == {"forward, fp32": [[[4.0, 0.0]]], "backward, fp32": [[[2.0, 0.0]]]}  # what failed has no point
    assert "Predicted" in predicted["title"] and "not measured" in predicted["title"]
    assert predicted["bars"]["forward, fp32"]["A100, scbench"] == pytest.approx([20, 20])
    assert predicted["bars"]["backward, fp32"]["A100, eager"] == pytest.approx([80, 80])
    assert traffic["bars"]["forward, fp32"] == {"required": [1, 1], "scbench, in Triton": [2, 2], "eager PyTorch": [5, 5]}


def test_pictures_are_written(files):
    process = run(BENCHMARKS / "kernel_plots.py", *files)
    assert process.returncode == 0, process.stderr[-3000:]
    pictures = sorted(files[-1].iterdir())
    assert [x.name for x in pictures] == ["kernels_predicted.png", "kernels_time.png", "kernels_traffic.png"]
    assert all(x.read_bytes().startswith(b"\x89PNG") for x in pictures)


def test_nothing_to_draw_is_one_sentence(tmp_path):
    process = run(BENCHMARKS / "kernel_plots.py", "--output", tmp_path)
    assert process.returncode == 2 and process.stderr.strip().count("\n") == 0 and "--timings" in process.stderr
