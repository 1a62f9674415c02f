"""The forest plot draws the rows of a table: what stands on the axes is read back."""

import numpy as np
import pytest
from matplotlib.collections import LineCollection

from scbench.evaluation import forest
from scbench.evaluation.plots import COLOURS
from scbench.evaluation.report import Column, Table


@pytest.fixture
def figures(monkeypatch):
    """The figures that were saved."""
    saved, save = [], forest.save
    monkeypatch.setattr(forest, "save", lambda figure, path: (saved.append(figure), save(figure, path)))
    return saved


def row(dataset: str, model: str, probe: str, kind: str, value: float | None, half: float | None = 0.02, **more) -> dict:
    low, high = (None, None) if half is None else (value - half, value + half)
    return {"task": "classification", "dataset": dataset, "model": model, "probe": probe, "kind": kind,
            "accuracy": value, "accuracy_low": low, "accuracy_high": high, **more}


def rows_of(dataset: str, shift: float = 0.0) -> list[dict]:
    return [
        row(dataset, "ours", "k-NN", "model", 0.8 + shift), row(dataset, "theirs", "k-NN", "model", 0.75 + shift),
        row(dataset, "PCA", "k-NN", "baseline", 0.82 + shift, None), row(dataset, "majority class", "none", "baseline", 0.4),
    ]


def drawn(axes) -> dict[str, tuple]:
    """Of each line by its tick's label: place of the point, ends of the bar, marker, colour and filling."""
    names = {tick: label.get_text() for tick, label in zip(axes.get_yticks(), axes.get_yticklabels(), strict=True)}
    points = [line for line in axes.lines if line.get_marker() in "osD"]
    bars = {segment[0][1]: (segment[0][0], segment[1][0])
            for one in axes.collections if isinstance(one, LineCollection) for segment in one.get_segments()}
    found = {}
    for line in points:
        (value,), (place,) = line.get_xdata(), line.get_ydata()
        found[place, names[place]] = (value, bars.get(place), line.get_marker(), line.get_color(), line.get_markerfacecolor())
    return found


def test_points_and_bars_equal_the_rows(figures, tmp_path):
    rows = [*rows_of("first"), *rows_of("second", 0.1),
            row("first", "ours − PCA", "k-NN", "difference", -0.02),
            row("first", "ours", "k-NN", "model", 0.1, stratum="1 seen"),
            row("first", "nothing", "k-NN", "model", None, None)]
    forest.forest_plot(rows, "accuracy", tmp_path / "forest.png", "A title")
    assert (tmp_path / "forest.png").read_bytes()[:4] == b"\x89PNG"
    (axes,) = figures[0].axes
    found = drawn(axes)
    assert len(found) == 8
    for (place, name), (value, bar, marker, _, filling) in found.items():
        wanted = next(one for one in rows[4 * (place > 5):] if name in (one["model"], f"{one['model']}, {one['probe']}"))
        assert value == wanted["accuracy"]
        np.testing.assert_allclose(bar or (0, 0), (wanted["accuracy_low"] or 0, wanted["accuracy_high"] or 0))
        assert (marker, filling != "white") == (("o", True) if wanted["kind"] == "model" else ("s", False))
    models = {name: colour for (_, name), (*_, colour, _) in found.items() if name in ("ours, k-NN", "theirs, k-NN")}
    assert list(models.values()) == list(COLOURS[:2])  # the same in both data sets
    assert [text.get_text().strip() for text in axes.texts] == ["first", "second"]
    assert axes.get_ylim()[0] > axes.get_ylim()[1]  # the first row is on top
    floors = [line for line in axes.lines if line.get_linestyle() == ":"]
    assert [set(line.get_xdata()) for line in floors] == [{0.4}, {0.4}]
    assert [text.get_text() for text in figures[0].legends[0].get_texts()] == ["ours", "theirs", "baseline"]


def test_each_metric_has_an_axis_of_its_own_and_long_plots_have_columns(figures, tmp_path):
    rows = [one for number in range(12) for one in rows_of(f"set {number}")]
    rows = [{**one, "metric": "accuracy"} for one in rows]
    rows += [{"task": "perturbation", "dataset": "screen", "model": "ours", "probe": "ridge", "kind": "model", "metric": "mse",
              "mse": 3.0}, {"task": "counts", "dataset": "gone", "kind": None, "metric": None}]
    forest.forest_plot(rows, None, tmp_path / "forest.png", "A title")
    axes = figures[0].axes
    assert [one.get_xlabel() for one in axes] == ["accuracy", "accuracy", "mean squared error"]
    assert sum(len(drawn(one)) for one in axes) == 49
    assert all(len(drawn(one)) <= forest.MOST_LINES for one in axes)
    assert axes[0].get_xlim() == axes[1].get_xlim() != axes[2].get_xlim()
    assert len({one.get_ylim() for one in axes}) == 1


def test_without_rows_to_draw_there_is_no_picture(tmp_path):
    forest.forest_plot([row("first", "ours", "k-NN", "model", None, None)], "accuracy", tmp_path / "forest.png", "A title")
    assert list(tmp_path.iterdir()) == []


def test_tables_write_it_beside_their_files(tmp_path):
    table = Table("A title", rows_of("first"), [Column("model", ("model",))], [], {}, metric="accuracy")
    table.write(tmp_path / "out")
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["forest.png", "results.csv", "results.json",
                                                                          "results.md"]
    assert table.record()["metric"] == "accuracy"
