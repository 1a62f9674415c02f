"""Pictures of what precision.py measured."""

from pathlib import Path

import numpy as np
from matplotlib.figure import Figure

from scbench.evaluation.plots import COLOURS, save

STYLES = {"fp32": (COLOURS[0], "-"), "bf16": (COLOURS[5], "--")}


def plot_precision(rows: list[dict], folder: Path) -> None:
    """STRUCTURE.png: validation losses, differences between the precisions against the spread of seeds, memory."""
    folder.mkdir(parents=True, exist_ok=True)
    for whole in rows:
        if whole["precision"] == "difference" and whole["status"] == "ok":
            runs = [row for row in rows if row["structure"] == whole["structure"] and row["precision"] in STYLES]
            _plot(whole, runs, folder / f"{whole['structure']}.png")


def _plot(whole: dict, runs: list[dict], path: Path) -> None:
    curves = {name: np.array([list(row["validation_loss"].values()) for row in runs if row["precision"] == name])
              for name in STYLES}
    steps = [int(step) for step in whole["spread"]]
    figure = Figure(figsize=(14, 4.2), layout="constrained")
    losses, differences, memory = figure.subplots(1, 3)
    for name, (colour, line) in STYLES.items():
        mean, spread = curves[name].mean(0), curves[name].std(0, ddof=1)
        losses.plot(steps, mean, line, color=colour, marker=".", label=f"{name}, mean of {len(curves[name])} seeds")
        losses.fill_between(steps, mean - spread, mean + spread, color=colour, alpha=0.2, linewidth=0)
    losses.set(title="validation loss ± a standard deviation", ylabel="mean squared error", yscale="log")
    spread = np.array(list(whole["spread"].values()))
    each = curves["bf16"] - curves["fp32"]
    differences.fill_between(steps, -spread, spread, color=COLOURS[0], alpha=0.15, linewidth=0, label="± spread of fp32 seeds")
    for number, one in enumerate(each):
        differences.plot(steps, one, color="#999999", linewidth=0.8, label="one seed" if number == 0 else None)
    differences.plot(steps, list(whole["mean_difference"].values()), color=COLOURS[5], marker=".", label="mean")
    low, high = whole["end"]["difference_low"], whole["end"]["difference_high"]
    differences.errorbar(steps[-1], (low + high) / 2, yerr=(high - low) / 2, color=COLOURS[5], capsize=4)
    differences.axvline(whole["settings"]["warmup_steps"], color="#BBBBBB", linewidth=1, linestyle=":")
    limit = 1.15 * max(spread[1:].max(), np.abs(each)[:, 1:].max())
    differences.set(title=f"bf16 less fp32: {whole['verdict']}", ylabel="difference of losses", ylim=(-limit, limit))
    for row in runs:
        colour, line = STYLES[row["precision"]]
        known = [(int(step), taken / 1e6) for step, taken in row["peak_bytes"].items() if taken is not None]
        if known:
            memory.plot(*zip(*known, strict=True), line, color=colour, linewidth=1,
                        label=row["precision"] if row["seed"] == 0 else None)
    memory.set(title="most memory held so far", ylabel="MB", ylim=(0, None))
    for axes in (losses, differences, memory):
        axes.set(xlabel="step")
        axes.grid(alpha=0.3)
        if axes.get_legend_handles_labels()[0]:
            axes.legend(frameon=False, fontsize="small")
    settings = whole["settings"]
    figure.suptitle(f"{whole['structure']}, {settings['layers']} layers of {settings['width']}, "
                    f"{settings['max_genes']} genes, {settings['cells']:,} cells, {settings['batch_cells']} a step")
    save(figure, path)
