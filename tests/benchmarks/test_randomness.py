"""Mixing is measured right: known entropies, pairs and extents, and the script runs from files to rows, CSV and plot."""

import csv
import itertools
import json
import sys
from pathlib import Path

import anndata
import numpy as np
import pytest

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"


@pytest.fixture
def randomness(monkeypatch):
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    monkeypatch.delitem(sys.modules, "randomness", raising=False)
    return __import__("randomness")


def test_entropy_and_chi_square_of_known_batches(randomness):
    labels = np.repeat([0, 1, 2, 3], 8)
    apart = randomness.mixing(randomness.batch_numbers(np.arange(32), 8), labels)
    assert np.array_equal(apart.entropies, np.zeros(4)) and apart.chi_square == pytest.approx(32 * 3)
    even = randomness.mixing(randomness.batch_numbers(np.arange(32).reshape(4, 8).T.ravel(), 8), labels)
    assert np.allclose(even.entropies, 2) and even.chi_square == pytest.approx(0)


def test_cells_left_over_are_in_no_batch(randomness):
    assert np.array_equal(randomness.batch_numbers(np.array([4, 3, 2, 1, 0]), 2), [-1, 1, 1, 0, 0])


def test_pairs_that_meet_again(randomness):
    rng = np.random.default_rng(0)
    one = randomness.batch_numbers(rng.permutation(6400), 64)
    other = randomness.batch_numbers(rng.permutation(6400), 64)
    assert randomness.repeated_pairs(one, one) == pytest.approx(6399 / 63)
    assert randomness.repeated_pairs(one, other) == pytest.approx(1, abs=0.03)


def test_every_order_has_each_cell_once_an_epoch(randomness):
    sizes = np.array([64, 128, 64, 37])
    orders = (randomness.scbench_epochs(sizes, 2, 0), randomness.block_epochs(293, 16, 3, 0), randomness.true_epochs(293, 0))
    for epochs in orders:
        one, other = itertools.islice(epochs, 2)
        assert np.array_equal(np.sort(one), np.arange(293)) and np.array_equal(np.sort(other), np.arange(293))
        assert not np.array_equal(one, other)


def test_extents_are_those_of_a_store(randomness, small_store):
    from scbench import Store

    store = Store.open(small_store)
    disk = randomness.read_disk(_renamed(store))
    assert np.array_equal(disk.extent_sizes(8), store.split("train").extent_sizes)
    assert disk.extent_sizes(1e-4).max() == 64


def _renamed(store):
    """The store, as if its source were called 0000.h5ad."""
    class Renamed:
        def split(self, name):
            split = store.split(name)
            cells = split.cells
            split.cells = lambda columns: cells(columns).assign(source="0000.h5ad")
            return split

    return Renamed()


def test_the_script(randomness, make_cells, tmp_path, capsys):
    cells = make_cells(240)
    for donor in sorted(set(cells.obs["donor"])):
        cells.obs.loc[cells.obs["donor"] == donor, "batch"] = donor
    file = tmp_path / "cells.h5ad"
    anndata.AnnData(cells.X, obs=cells.obs, var=cells.var).write_h5ad(file)
    output, plot = tmp_path / "out.json", tmp_path / "out.png"
    randomness.main([
        str(file), "--label", "batch", "--cells", "700", "--parts", "3", "--batch-cells", "16", "--lanes", "1", "8",
        "--extent-megabytes", "0.005", "--json", str(output), "--plot", str(plot),
    ])
    rows = json.loads(output.read_text())
    found = {(row["disk"], row["drawn_by"], row["lanes"]): row for row in rows}
    assert rows[0]["drawn_by"] == "true" and rows[0]["settings"]["labels"] == 6
    assert found["shuffled", "scbench", 8]["entropy_ratio"] > 0.98
    assert abs(found["shuffled", "scbench", 8]["chi_square_z"]) < 4
    assert found["sorted", "scbench", 1]["entropy_ratio"] < 0.5 < found["sorted", "scbench", 8]["entropy_ratio"]
    assert found["sorted", "scbench", 1]["same_extent_share"] > 0.9
    assert found["sorted", "scbench", 1]["chi_square_z"] > 10
    with open(output.with_suffix(".csv"), newline="") as lines:
        assert {"entropy_ratio", "repeated_pairs"} <= {line["metric"] for line in csv.DictReader(lines)}
    assert plot.stat().st_size > 10_000
    assert "one extent" in capsys.readouterr().out
