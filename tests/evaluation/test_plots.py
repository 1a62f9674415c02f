"""Pictures: they are drawn for one label, many labels, missing labels and few cells, and the loss curve shows its points."""

import json

import numpy as np
import pytest
from matplotlib.image import imread

from scbench.evaluation import plots


@pytest.mark.parametrize(("cells", "labels"), [(60, 3), (7, 1), (130, 60)])
def test_embedding_plot(tmp_path, cells, labels):
    generator = np.random.default_rng(0)
    names = np.array([None if i % 11 == 0 else f"type {i % labels}" for i in range(cells)], dtype=object)
    path = tmp_path / "plots" / "map.png"
    plots.plot_embedding(generator.normal(size=(cells, 4)), names, generator.normal(size=cells), "A map", path)
    picture = imread(path)
    assert picture.shape[:2] == (750, 1950)
    assert picture[..., :3].std() > 0.05  # not blank


def test_large_sets_are_thinned(tmp_path, monkeypatch):
    monkeypatch.setattr(plots, "MOST_CELLS", 20)
    seen = []
    monkeypatch.setattr(plots, "_by_label", lambda axes, points, labels: seen.append(len(points)))
    plots.plot_embedding(np.random.default_rng(0).normal(size=(50, 3)), np.array(["a"] * 50, dtype=object), np.ones(50), "t",
                         tmp_path / "map.png")
    assert seen == [20]


def test_loss_curve(tmp_path, monkeypatch):
    lines = [{"step": 1, "loss": 3.0}, {"step": 2, "loss": 2.0}, {"step": 2, "validation_loss": 2.5}]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    figures = []
    save = plots.save
    monkeypatch.setattr(plots, "save", lambda figure, path: (figures.append(figure), save(figure, path)))
    plots.plot_loss(tmp_path / "metrics.jsonl", tmp_path / "loss.png")
    drawn = {line.get_label(): line.get_xydata().tolist() for line in figures[0].axes[0].lines}
    assert drawn == {"training": [[1, 3], [2, 2]], "validation": [[2, 2.5]]}
    assert (tmp_path / "loss.png").read_bytes()[:4] == b"\x89PNG"
