"""The script that trains through both kinds of kernels, on a model of its smallest size."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[2] / "benchmarks" / "triton_steps.py"


@pytest.mark.full
def test_the_two_curves_are_one(small_store, tmp_path):
    pytest.importorskip("triton", reason="Triton is not installed")
    words = [small_store, "--structure", "mamba", "--steps", 2, "--tokens", 9, "--width", 16, "--layers", 1,
             "--json", tmp_path / "rows.json"]
    done = subprocess.run([sys.executable, SCRIPT, *map(str, words)], capture_output=True, text=True,
                          env={**os.environ, "OMP_NUM_THREADS": "1"})
    assert done.returncode == 0, done.stderr[-3000:]
    assert "mamba: largest relative difference" in done.stdout
    rows = json.loads((tmp_path / "rows.json").read_text())
    assert [row["step"] for row in rows] == [1, 2]
    for row in rows:
        assert row["difference"] < 1e-5
        assert row["mvc_loss_triton"] == pytest.approx(row["mvc_loss_torch"], rel=1e-5)
