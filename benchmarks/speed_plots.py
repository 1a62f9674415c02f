"""Pictures of what throughput.py, rivals.py and step_profile.py measured."""

from pathlib import Path

from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, NullFormatter, NullLocator, PercentFormatter

from scbench.evaluation.plots import COLOURS, save

AXES = {"width": "width", "layers": "layers", "genes": "genes a cell", "batch_cells": "cells a step"}
SHARES = ("data", "forward", "backward", "optimizer")


def plot_throughput(rows: list[dict], folder: Path) -> None:
    """parts.png: the shares of a step. by_AXIS.png for every axis with several values: cells/s and MFU along it."""
    folder.mkdir(parents=True, exist_ok=True)
    rows = [row for row in rows if row["status"] == "ok"]
    if rows:
        _plot_parts(rows, folder / "parts.png")
    for axis, name in AXES.items():
        if len({row["settings"][axis] for row in rows}) > 1:
            _plot_axis(rows, axis, name, folder / f"by_{axis}.png")


def _plot_parts(rows: list[dict], path: Path) -> None:
    cells = [row["cells_per_second"] * row["step_seconds"]["median"] for row in rows]  # a step, or a round
    bars = {part: [1000 * row.get(f"{part}_seconds", {"median": 0.0})["median"] / number
                   for row, number in zip(rows, cells, strict=True)] for part in SHARES}
    shared = [row["settings"] for row in rows]
    _plot_stacked([_label(row, shared) for row in rows], bars, "Where the time goes", "milliseconds a cell", path)


def plot_profile(rows: list[dict], folder: Path) -> None:
    """profile.png: what a training step consists of, in shares of it."""
    folder.mkdir(parents=True, exist_ok=True)
    bars = {part: [100 * row["seconds_of"][part] / sum(row["seconds_of"].values()) for row in rows]
            for part in rows[0]["seconds_of"]}
    shared = [row["settings"] for row in rows]
    _plot_stacked([_label(row, shared) for row in rows], bars, "What a training step consists of",
                  "% of the step", folder / "profile.png")


def _plot_stacked(labels: list[str], bars: dict[str, list[float]], title: str, unit: str, path: Path) -> None:
    """A bar a label, of the parts that `bars` names."""
    figure = Figure(figsize=(9, 1.2 + 0.3 * len(labels)), layout="constrained")
    axes = figure.subplots()
    left = [0.0] * len(labels)
    for number, (part, lengths) in enumerate(bars.items()):
        axes.barh(range(len(labels)), lengths, left=left, color=COLOURS[number], label=part)
        left = [a + b for a, b in zip(left, lengths, strict=True)]
    axes.set(yticks=range(len(labels)), yticklabels=labels, title=title, xlabel=unit)
    axes.invert_yaxis()
    axes.legend(loc="center left", bbox_to_anchor=(1.0, 0.5), frameon=False)
    save(figure, path)


def _label(row: dict, shared: list[dict]) -> str:
    """The structure, the task, and what differs among the rows."""
    names = [name for name in (*AXES, "precision", "deepspeed") if len({s[name] for s in shared if s[name]}) > 1]
    what = [row[name] for name in ("structure", "task") if name in row]
    return ", ".join([*what, *(f"{name} {row['settings'][name]}" for name in names)])


def _plot_axis(rows: list[dict], axis: str, name: str, path: Path) -> None:
    """One line for each structure, task and setting of everything else."""
    lines: dict[str, list[tuple[float, float, float]]] = {}
    shared = [{**row["settings"], axis: None} for row in rows]
    for row in rows:
        point = (row["settings"][axis], row["cells_per_second"], row["mfu"])
        lines.setdefault(_label({**row, "settings": {**row["settings"], axis: None}}, shared), []).append(point)
    figure = Figure(figsize=(11, 4.5), layout="constrained")
    values = sorted({row["settings"][axis] for row in rows})
    for axes, index, title in zip(figure.subplots(1, 2), (1, 2), ("cells a second", "MFU"), strict=True):
        for number, (label, points) in enumerate(lines.items()):
            points = sorted(points)
            style = {"color": COLOURS[number % len(COLOURS)], "marker": "osX^Dv"[number // len(COLOURS) % 6]}
            axes.plot([point[0] for point in points], [point[index] for point in points], label=label, **style)
        axes.set(xlabel=name, ylabel=title, xscale="log")
        axes.set_xticks(values, labels=[f"{value:,}" for value in values], minor=False)
        axes.xaxis.set_minor_locator(NullLocator())
        axes.grid(alpha=0.3)
        if title == "MFU":
            axes.set_ylim(bottom=0)
            axes.yaxis.set_major_formatter(PercentFormatter(1, decimals=0))
        else:
            axes.set_yscale("log")
            axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
            axes.yaxis.set_major_formatter("{x:g}")
            axes.yaxis.set_minor_formatter(NullFormatter())
    axes.legend(loc="center left", bbox_to_anchor=(1.0, 0.5), frameon=False, fontsize="small")
    save(figure, path)


def plot_rivals(rows: list[dict], folder: Path) -> None:
    """ratios.png: how many times as fast as each rival scbench is, with the rounds' 20th to 80th percentile."""
    folder.mkdir(parents=True, exist_ok=True)
    cases = list(dict.fromkeys((row["structure"], row["task"]) for row in rows))
    names = list(dict.fromkeys(row["implementation"] for row in rows if row["implementation"] != "scbench"))
    figure = Figure(figsize=(9, 1.4 + 0.4 * len(cases)), layout="constrained")
    axes = figure.subplots()
    axes.axvline(1, color="#777777", linewidth=1)
    for number, name in enumerate(names):
        found = [(place, row["scbench_ratio"]) for place, case in enumerate(cases) for row in rows
                 if (row["structure"], row["task"]) == case and row["implementation"] == name and row.get("scbench_ratio")]
        if found:
            middle = [ratio["median"] for _, ratio in found]
            below = [ratio["median"] - ratio["p20"] for _, ratio in found]
            spread = [below, [ratio["p80"] - ratio["median"] for _, ratio in found]]
            axes.errorbar(middle, [place + 0.12 * number for place, _ in found], xerr=spread, fmt="osX^Dv"[number],
                          color=COLOURS[number], capsize=3, label=name)
    axes.set(yticks=range(len(cases)), yticklabels=[", ".join(case) for case in cases], xscale="log",
             xlabel="scbench's cells/s over the rival's", title="scbench and its rivals")
    axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 3, 5)))
    axes.xaxis.set_major_formatter("{x:g}")
    axes.xaxis.set_minor_formatter(NullFormatter())
    axes.invert_yaxis()
    axes.grid(axis="x", alpha=0.3)
    axes.legend(loc="center left", bbox_to_anchor=(1.0, 0.5), frameon=False)
    save(figure, folder / "ratios.png")
