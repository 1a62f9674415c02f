"""The demo in a few steps: everything is where its summary says, on scanpy's cells and on one's own."""

import json
import sys

import anndata
import numpy as np
import pytest

from scbench.config import DemoConfig
from scbench.data.store import Store
from scbench.errors import UserError
from scbench.evaluation.demo import cells as demo_cells
from scbench.evaluation.demo import demo
from scbench.evaluation.demo.demo import run_demo
from scbench.models.model import ExpressionModel


def test_scanpys_cells_are_counts():
    scanpy = pytest.importorskip("scanpy")
    cells = demo_cells.pbmcs()
    assert cells.shape == (700, 765)
    assert cells.X.dtype == np.int32
    original = scanpy.datasets.pbmc68k_reduced()
    dense = np.expm1(original.raw.X.toarray().astype(np.float64)) * original.obs["n_counts"].to_numpy()[:, None] / 1e4
    assert np.abs(cells.X.toarray() - dense).max() < 0.1
    assert cells.obs["bulk_labels"].tolist() == original.obs["bulk_labels"].tolist()


def test_demo_on_scanpys_cells(tmp_path, capsys):
    pytest.importorskip("scanpy")
    result = run_demo(DemoConfig(output=tmp_path / "demo", steps=4))
    output = tmp_path / "demo"
    assert {path.name for path in output.iterdir()} == {
        "README.md", "cells.h5ad", "store", "run", "embedded.h5ad", "benchmark", "plots",
    }
    assert {path.name for path in (output / "plots").iterdir()} == {"loss.png", "embedding.png", "pca.png"}
    model = ExpressionModel.from_pretrained(output / "run" / "model")
    assert anndata.read_h5ad(output / "embedded.h5ad").obsm["X_scbench"].shape == (700, model.config.width)
    record = json.loads((output / "benchmark" / "results.json").read_text())
    assert result["benchmark"]["rows"] == record["rows"]
    store = Store.open(output / "store")
    seen = store.split("train").n_cells + store.split("validation").n_cells
    assert record["cells"]["overlapping"] == seen  # the benchmark is on the test split, all of it
    assert record["cells"]["used"] + record["cells"]["in_small_classes"] == store.split("test").n_cells
    assert {row["overlap"] for row in record["rows"]} == {"unseen"}
    shown = capsys.readouterr().out
    for words in ("majority class", "What is where", "What to try next", str(output)):
        assert words in shown
    assert "majority class" in (output / "README.md").read_text()


def test_demo_on_ones_own_file(tmp_path, planted_cells, monkeypatch, capsys):
    monkeypatch.setattr(demo_cells, "MOST_CELLS", 240)
    cells = planted_cells(300)
    cells.write_h5ad(tmp_path / "mine.h5ad")
    result = run_demo(DemoConfig(input=tmp_path / "mine.h5ad", label="type", output=tmp_path / "demo", steps=2, json=True))
    assert capsys.readouterr().out == ""
    kept = anndata.read_h5ad(tmp_path / "demo" / "cells.h5ad")
    assert kept.n_obs == 240
    np.testing.assert_array_equal(kept.X.toarray(), cells[kept.obs_names].X.toarray())
    assert kept.obs["type"].tolist() == cells[kept.obs_names].obs["type"].tolist()
    assert result["benchmark"]["cells"]["total"] == 240
    assert result["benchmark"]["cells"]["classes"].keys() == {"alpha", "beta", "gamma"}


def test_demo_refuses_before_it_makes_anything(tmp_path, planted_cells, monkeypatch):
    cells = planted_cells(40)
    cells.write_h5ad(tmp_path / "mine.h5ad")
    for options, message in [
        ({"input": tmp_path / "mine.h5ad"}, "--label is missing"),
        ({"label": "type"}, "--label goes with your own file"),
        ({"input": tmp_path / "mine.h5ad", "label": "typ"}, "no column 'typ' in obs"),
        ({"input": tmp_path / "mine.h5ad", "label": "type"}, "fewer than two classes of 25 cells in 'type'"),
        ({"input": tmp_path / "none.h5ad", "label": "type"}, "there is no file"),
    ]:
        with pytest.raises(UserError, match=message):
            run_demo(DemoConfig(output=tmp_path / "demo", **options))
        assert not (tmp_path / "demo").exists()
    with pytest.raises(UserError, match="--steps is 0"):
        DemoConfig(steps=0)
    with monkeypatch.context() as patch:
        patch.setitem(sys.modules, "scanpy", None)
        with pytest.raises(UserError, match=r"scbench\[demo\]"):
            run_demo(DemoConfig(output=tmp_path / "demo"))
    (tmp_path / "demo").mkdir()
    (tmp_path / "demo" / "mine").write_text("")
    with pytest.raises(UserError, match="exists already"):
        run_demo(DemoConfig(output=tmp_path / "demo"))
    assert (tmp_path / "demo" / "mine").exists()


def test_a_demo_that_fails_leaves_nothing(tmp_path, planted_cells, monkeypatch):
    planted_cells(300).write_h5ad(tmp_path / "mine.h5ad")

    def fail(*args, **options):
        raise UserError("the disk is full.")

    monkeypatch.setattr(demo, "pretrain", fail)
    with pytest.raises(UserError, match="disk"):
        run_demo(DemoConfig(input=tmp_path / "mine.h5ad", label="type", output=tmp_path / "demo", steps=2))
    assert [path.name for path in tmp_path.iterdir()] == ["mine.h5ad"]
