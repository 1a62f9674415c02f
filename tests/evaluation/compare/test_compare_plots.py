"""Pictures of a comparison: every row is named, no name covers another, baselines are lines."""

import itertools

import pytest
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.text import Annotation, Text

from scbench.evaluation.compare import plots


@pytest.fixture
def figures(monkeypatch):
    """The figures that were saved."""
    saved, save = [], plots.save
    monkeypatch.setattr(plots, "save", lambda figure, path: (saved.append(figure), save(figure, path)))
    return saved


def row(name: str, flops: float | None, loss: float, half: float | None = None, structure: str = "linear") -> dict:
    low, high = (None, None) if half is None else (loss - half, loss + half)
    return {"row": name, "kind": "baseline" if flops is None else "model", "structure": structure, "pooling": "avg",
            "training_flops_per_cell": flops, "mvc_loss": loss, "mvc_loss_low": low, "mvc_loss_high": high}


def test_quality_names_rows_that_lie_together_apart(figures, tmp_path):
    rows = [row(f"a-long-name-{i}", 1e6 * (1 + i / 100), 0.4 + i / 1000, 0.05) for i in range(9)]
    rows += [row("far", 5e8, 0.2, structure="mamba"), row("gene mean", None, 0.5)]
    plots.plot_quality(rows, "mvc_loss", tmp_path / "quality.png")
    assert (tmp_path / "quality.png").read_bytes()[:4] == b"\x89PNG"
    axes = figures[0].axes[0]
    names = [child for child in axes.get_children() if isinstance(child, Annotation)]
    assert {name.get_text() for name in names} == {one["row"] for one in rows[:-1]}
    renderer = FigureCanvasAgg(figures[0]).get_renderer()
    boxes = [Text.get_window_extent(name, renderer) for name in names]
    assert not any(one.overlaps(other) for one, other in itertools.combinations(boxes, 2))
    assert [text.get_text() for text in axes.get_legend().get_texts()] == ["gene mean"]
    assert axes.get_xscale() == "log"


def test_effects_have_a_panel_a_metric_and_a_line_a_setting(figures, tmp_path):
    effects = [
        {"factor": "mvc", "level": "on", "instead_of": "off", "setting": setting, "metric": metric, "difference": 0.1,
         "difference_low": low, "difference_high": None if low is None else 0.3}
        for metric in ("regression_loss", "knn_accuracy")
        for setting, low in [("preprocess bin", -0.1), ("all settings", None)]
    ]
    plots.plot_effects(effects, tmp_path / "effects.png")
    assert [axes.get_title() for axes in figures[0].axes] == ["regression loss", "k-NN accuracy"]
    labels = [label.get_text() for label in figures[0].axes[0].get_yticklabels()]
    assert labels == ["mvc off → on | preprocess bin", "mvc off → on | all settings"]
