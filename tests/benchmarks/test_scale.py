"""Sparse stores are stores: opening and reading find nothing wrong, and the script measures them in fresh processes."""

import json
import sys
from pathlib import Path

import numpy as np
import pytest

from scbench import Store
from scbench.errors import UserError

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"


@pytest.fixture
def scale(monkeypatch):
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    monkeypatch.delitem(sys.modules, "scale", raising=False)
    return __import__("scale")


def test_a_sparse_store_is_whole_and_takes_no_room(scale, monkeypatch, tmp_path):
    monkeypatch.setattr(scale, "SHARD_CELLS", 10_000)
    scale.make_store(tmp_path / "store", 21_000, 300)
    store = Store.open(tmp_path / "store")
    store.check_files()
    split = store.split("train")
    assert split.n_cells == 18_900 and len(split.shards) == 3 and len(split.extent_sizes) > 2
    assert sum(len(split.read_extent(extent).offsets) - 1 for extent in range(len(split.extent_sizes))) == split.n_cells
    assert 250 < np.median(np.diff(split.read_extent(0).offsets)) < 350
    files = [file for file in (tmp_path / "store").rglob("*") if file.is_file()]
    assert sum(file.stat().st_blocks * 512 for file in files) < sum(file.stat().st_size for file in files) / 4
    with open(tmp_path / "store" / "shard-00000" / "genes" / "c" / "0", "r+b") as damaged:
        damaged.write(b"\1")
    with pytest.raises(UserError, match="damaged"):
        split.read_extent(0)


def test_the_script(scale, tmp_path, capsys):
    output = tmp_path / "out.json"
    scale.main(["--cells", "500", "2000", "--genes", "30", "--batch-cells", "16", "--batches", "3", "--rounds", "1",
                "--folder", str(tmp_path), "--json", str(output)])
    rows = json.loads(output.read_text())
    assert [row["cells"] for row in rows] == [500, 2000]
    for row in rows:
        assert 0 < row["open_seconds"]["median"] < row["first_batch_seconds"]["median"] < 60
        assert 10**8 < row["peak_bytes"]["median"] < 10**10 and row["files"] > 10
    assert output.with_suffix(".csv").is_file() and "first batch s" in capsys.readouterr().out
    assert not list(tmp_path.glob("scale-*"))
