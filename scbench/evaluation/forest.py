"""A forest plot of a table: a point and its 95 % interval a row, data set by data set."""

from pathlib import Path
from typing import NamedTuple

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from scbench.evaluation.plots import COLOURS, save

TITLES = {
    "accuracy": "accuracy", "macro_f1": "macro-F1", "pearson_control": "Pearson correlation of the change, against control",
    "mse": "mean squared error", "deviance_explained": "Poisson deviance explained",
}
# what asks nothing of a cell but its depth: drawn as a line through its data set too
FLOORS = ("majority class", "no change", "depth-scaled gene mean")
STYLES = {  # marker, colour and filling of a kind of row; models take the other colours in turn
    "model": ("o", None, True), "baseline": ("s", "#555555", False), "ceiling": ("D", COLOURS[2], False),
}
MODEL_COLOURS = tuple(colour for colour in COLOURS[:-1] if colour != COLOURS[2])
EVERYTHING = "all"  # the stratum of a perturbation table that holds all the others
MOST_LINES = 60  # about so many one above the other; past them there is another column


class Group(NamedTuple):
    """What stands together: the rows of one data set."""

    name: str
    metric: str
    rows: list[dict]


def forest_plot(rows: list[dict], metric: str | None, path: Path, title: str) -> None:
    """Write a PNG with a line for each row that has the metric; nothing if there is none.

    Parameters
    ----------
    rows
        Rows of a table, with dataset, model, probe, kind and the metric, its `_low` and `_high` where there is an interval.
        Differences between models and parts of a data set (`stratum`) are not drawn.
    metric
        The field that is drawn; None: the one that each row's field "metric" names. Each metric has its own axis.
    path, title
        Of the picture.
    """
    groups = _groups(rows, metric)
    if not groups:
        return
    columns = _columns(groups)
    lines = max(map(_height, columns))
    figure = Figure(figsize=(7 * len(columns), 1.6 + 0.24 * lines), layout="constrained")
    names = list(dict.fromkeys(row["model"] for group in groups for row in group.rows if row["kind"] == "model"))
    colours = {name: MODEL_COLOURS[number % len(MODEL_COLOURS)] for number, name in enumerate(names)}
    first: dict[str, Axes] = {}
    for axes, column in zip(figure.subplots(1, len(columns), squeeze=False)[0], columns, strict=True):
        axes.sharex(first.setdefault(column[0].metric, axes))  # so that columns of a metric can be compared
        _draw(axes, column, colours)
        axes.set_ylim(lines - 1, -1)  # and lines are as far apart in all
    shown = {row["kind"] for group in groups for row in group.rows}
    handles = [_handle(name, "model", colour) for name, colour in colours.items()]
    handles += [_handle(kind, kind) for kind in ("baseline", "ceiling") if kind in shown]
    figure.legend(handles=handles, loc="outside lower center", ncols=4, frameon=False, fontsize=8)
    figure.suptitle(title)
    save(figure, path)


def of_whole_set(row: dict) -> bool:
    """Whether a row is of a model, a baseline or a ceiling on all of a data set: no difference, and no part of it."""
    return row.get("kind") in STYLES and row.get("stratum") in (None, EVERYTHING)


def _groups(rows: list[dict], metric: str | None) -> list[Group]:
    """The rows that are drawn, by data set and metric."""
    found: dict[tuple, Group] = {}
    for row in rows:
        field = metric or row["metric"]
        if of_whole_set(row) and row.get(field) is not None:
            key = field, row["task"], row["dataset"]
            found.setdefault(key, Group(row["dataset"], field, [])).rows.append(row)
    return list(found.values())


def _height(groups: list[Group]) -> int:
    """Lines that groups take: their rows, a heading and a gap each."""
    return sum(len(group.rows) + 2 for group in groups)


def _columns(groups: list[Group]) -> list[list[Group]]:
    """Groups one above the other: for each metric as few columns as will do, about equally long."""
    columns: list[list[Group]] = []
    for metric in dict.fromkeys(group.metric for group in groups):
        same = [group for group in groups if group.metric == metric]
        share = _height(same) / -(-_height(same) // MOST_LINES)
        columns.append([])
        for group in same:
            if _height(columns[-1]) >= share:
                columns.append([])
            columns[-1].append(group)
    return columns


def _draw(axes: Axes, groups: list[Group], colours: dict[str, str]) -> None:
    """The groups of one metric, from the top down."""
    ticks, line = [], 0
    for group in groups:
        axes.text(0, line, f" {group.name}", transform=axes.get_yaxis_transform(), va="center", fontsize=9)
        top, line = line, line + 1
        for row in group.rows:
            _point(axes, row, group.metric, line, colours.get(row["model"]))
            ticks.append((line, row["model"] if row["probe"] == "none" else f"{row['model']}, {row['probe']}"))
            line += 1
        floor = next((row[group.metric] for row in group.rows if row["model"] in FLOORS), None)
        if floor is not None:
            axes.plot([floor, floor], [top + 0.5, line - 0.5], color="#999999", linestyle=":", linewidth=1, zorder=1)
        line += 1
    axes.set_yticks([place for place, _ in ticks], [name for _, name in ticks], fontsize=7)
    axes.set_xlabel(TITLES.get(groups[0].metric, groups[0].metric))
    axes.margins(x=0.05)
    axes.grid(alpha=0.3, axis="x")
    axes.spines[["top", "right"]].set_visible(False)


def _point(axes: Axes, row: dict, metric: str, line: int, colour: str | None) -> None:
    """One row; without a bar where it has no interval."""
    marker, own, filled = STYLES[row["kind"]]
    colour = own or colour
    value, low, high = row[metric], row.get(f"{metric}_low"), row.get(f"{metric}_high")
    bars = None if low is None else [[max(0.0, value - low)], [max(0.0, high - value)]]
    axes.errorbar(value, line, xerr=bars, color=colour, marker=marker, markersize=5, capsize=2, linewidth=1.2,
                  markerfacecolor=colour if filled else "white", zorder=3 if filled else 2)


def _handle(name: str, kind: str, colour: str | None = None) -> Line2D:
    marker, own, filled = STYLES[kind]
    colour = own or colour
    return Line2D([], [], color=colour, marker=marker, linestyle="none", markersize=5,
                  markerfacecolor=colour if filled else "white", label=name)
