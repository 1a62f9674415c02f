"""prepare beside plain ways: all write the same cells, and a builder that loses one gets no number."""

import json
import sys
from pathlib import Path

import numpy as np
import pytest

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"


@pytest.fixture
def benchmark(monkeypatch):
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    monkeypatch.delitem(sys.modules, "prepare", raising=False)
    return __import__("prepare")


def test_the_script(benchmark, cells_file, tmp_path, capsys):
    output = tmp_path / "out.json"
    few = ["--cells", "500", "--rounds", "1", "--workers", "1", "--matrices", "csc"]
    benchmark.main([str(cells_file), *few, "--json", str(output)])
    rows = {row["builder"]: row for row in json.loads(output.read_text())}
    assert list(rows) == ["reference", "plain_rows", "plain_vectorised", "scbench"]
    for row in rows.values():
        assert row["status"] == "ok" and row["settings"]["cells"] == 600
        assert row["cells_per_second"]["median"] > 0 and 10**8 < row["peak_bytes"] < 10**10
        assert 50 < row["bytes_per_cell"] < 5000
    assert output.with_suffix(".csv").is_file() and "x reference" in capsys.readouterr().out


def test_a_lost_cell_is_a_failure(benchmark):
    hashes = np.array([3, 5, 5, 8], dtype=np.uint64)
    assert benchmark.failure(np.array([3, 5, 8], dtype=np.uint64), hashes) is None  # the copy may be gone
    assert benchmark.failure(hashes[:-1], hashes) == "failed: 1 cells differ from those of the reference"
