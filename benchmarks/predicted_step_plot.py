"""A picture of predicted_step.py's rows."""

from pathlib import Path

from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, NullLocator

from scbench.evaluation.plots import COLOURS, save


def plot(rows: list[dict], path: Path) -> None:
    """Cells a second, a bar from the low to the high prediction; a panel a batch size, a colour a GPU."""
    names = ("structure", "gpu", "batch_cells")
    structures, gpus, batches = (list(dict.fromkeys(row[name] for row in rows)) for name in names)
    figure = Figure(figsize=(1 + 5 * len(batches), 1.9 + 0.5 * len(structures)), layout="constrained")
    figure.suptitle("Training steps in bf16 on one GPU: predicted, not measured")
    thickness = 0.8 / len(gpus)
    ends = min(row["cells_per_second_low"] for row in rows) / 1.2, max(row["cells_per_second_high"] for row in rows) * 1.2
    for axes, cells in zip(figure.subplots(1, len(batches), sharey=True, squeeze=False)[0], batches, strict=True):
        for number, gpu in enumerate(gpus):
            here = [row for row in rows if (row["gpu"], row["batch_cells"]) == (gpu, cells)]
            places = [structures.index(row["structure"]) + thickness * (number - (len(gpus) - 1) / 2) for row in here]
            low = [row["cells_per_second_low"] for row in here]
            lengths = [row["cells_per_second_high"] - start for row, start in zip(here, low, strict=True)]
            axes.barh(places, lengths, 0.85 * thickness, left=low, color=COLOURS[number], label=gpu.upper())
        axes.set(title=f"{cells} cells a step", xlabel="cells a second, low to high bound", xscale="log",
                 yticks=range(len(structures)), yticklabels=structures, xlim=ends)
        axes.set_ylim(len(structures) - 0.5, -0.5)
        axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axes.xaxis.set_major_formatter("{x:,.0f}")
        axes.xaxis.set_minor_locator(NullLocator())
        axes.tick_params(axis="x", rotation=45)
        axes.grid(axis="x", alpha=0.3)
    handles, labels = axes.get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=len(labels), frameon=False)
    save(figure, path)
