"""Pictures of a comparison: quality versus cost, and what each option does."""

from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.text import Text

from scbench.config import STRUCTURES
from scbench.evaluation.compare.effects import ALL_SETTINGS, METRICS
from scbench.evaluation.plots import COLOURS, save

MARKERS = {"avg": "o", "cls": "^", "own": "s", None: "D"}
BASELINE_STYLES = ("--", ":", "-.")


def plot_quality(rows: list[dict], metric: str, path: Path) -> None:
    """One point a row: `metric` against the training FLOPs of a cell, intervals as bars, baselines as horizontal lines."""
    figure = Figure(figsize=(9, 6), layout="constrained")
    axes = figure.subplots()
    points = [row for row in rows if row["kind"] == "model" and row[metric] is not None]
    for row in points:
        bars = None
        if row[f"{metric}_low"] is not None:
            bars = [[row[metric] - row[f"{metric}_low"]], [row[f"{metric}_high"] - row[metric]]]
        colour = COLOURS[STRUCTURES.index(row["structure"])]
        axes.errorbar(row["training_flops_per_cell"], row[metric], yerr=bars, color=colour, marker=MARKERS[row["pooling"]],
                      markersize=7, capsize=3, linewidth=1.2, zorder=3)
    baselines = [row for row in rows if row["kind"] == "baseline" and row[metric] is not None]
    for number, row in enumerate(baselines):
        axes.axhline(row[metric], color="#777777", linestyle=BASELINE_STYLES[number % 3], linewidth=1, label=row["row"])
    axes.set(xscale="log", xlabel="training FLOPs a cell (analytic)", ylabel=f"{METRICS[metric][0]} on the test split",
             title=f"{METRICS[metric][0]} versus cost")
    axes.margins(x=0.25, y=0.1)
    axes.set_ylim(bottom=max(0, axes.get_ylim()[0]))
    axes.grid(alpha=0.3, which="major")
    if baselines:
        axes.legend(frameon=False, fontsize=8, title="baselines", loc="upper left", bbox_to_anchor=(1.0, 1.0))
    _label(figure, axes, [(row["training_flops_per_cell"], row[metric], row["row"]) for row in points])
    save(figure, path)


def _label(figure: Figure, axes: Axes, points: list[tuple[float, float, str]]) -> None:
    """Name each point beside it, where the name covers neither another name nor a point."""
    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    renderer = canvas.get_renderer()
    axes.set(xlim=axes.get_xlim(), ylim=axes.get_ylim())  # names must not move the axes
    pixels = [axes.transData.transform(point[:2]) for point in points]
    taken = []
    places = [(side, sign * rise) for rise in range(0, 120, 10) for sign in ((1, -1) if rise else (1,)) for side in (1, -1)]
    for x, y, name in sorted(points, key=lambda point: point[1]):
        for side, rise in places:
            text = axes.annotate(
                name, (x, y), xytext=(9 * side, rise), textcoords="offset points", fontsize=8, va="center",
                ha="left" if side > 0 else "right", zorder=4,
                arrowprops={"arrowstyle": "-", "color": "#AAAAAA", "linewidth": 0.6} if rise else None,
            )
            text.update_positions(renderer)
            box = Text.get_window_extent(text, renderer).padded(1)  # an Annotation's own would hold its line too
            free = not any(box.overlaps(other) for other in taken) and not any(box.contains(*pixel) for pixel in pixels)
            if free or (side, rise) == places[-1]:
                break
            text.remove()
        taken.append(box)


def plot_effects(effects: list[dict], path: Path) -> None:
    """One line a setting: each option's paired difference with its interval, a panel a metric."""
    metrics = [metric for metric in METRICS if any(row["metric"] == metric for row in effects)]
    changes = list(dict.fromkeys((row["factor"], row["instead_of"], row["level"]) for row in effects))
    keys = list(dict.fromkeys((row["factor"], row["instead_of"], row["level"], row["setting"]) for row in effects))
    keys.sort(key=lambda key: (changes.index(key[:3]), key[3] == ALL_SETTINGS))
    factors = list(dict.fromkeys(key[0] for key in keys))
    figure = Figure(figsize=(5 + 3 * len(metrics), 1.5 + 0.24 * len(keys)), layout="constrained")
    panels = figure.subplots(1, len(metrics), sharey=True, squeeze=False)[0]
    for axes, metric in zip(panels, metrics, strict=True):
        for row in (row for row in effects if row["metric"] == metric):
            place = keys.index((row["factor"], row["instead_of"], row["level"], row["setting"]))
            bars = None
            if row["difference_low"] is not None:
                bars = [[row["difference"] - row["difference_low"]], [row["difference_high"] - row["difference"]]]
            overall = row["setting"] == ALL_SETTINGS
            axes.errorbar(row["difference"], place, xerr=bars, color=COLOURS[factors.index(row["factor"]) % len(COLOURS)],
                          marker="D" if overall else "o", markersize=7 if overall else 4, capsize=2, linewidth=1)
        axes.axvline(0, color="#555555", linewidth=1)
        name, sign = METRICS[metric]
        axes.set(title=name, xlabel={-1: "difference (left: better)", 1: "difference (right: better)", 0: "difference"}[sign])
        axes.locator_params(axis="x", nbins=5)
        axes.grid(alpha=0.3, axis="x")
    labels = [f"{factor} {first} → {level} | {setting}" for factor, first, level, setting in keys]
    panels[0].set_yticks(range(len(keys)), labels, fontsize=7)
    panels[0].set_ylim(len(keys) - 0.5, -0.5)
    save(figure, path)
