"""A picture of loader.py's rows: training-ready cells/s of each loader, by cores and state of the cache.

    python benchmarks/loader_plots.py loader.json
"""

import json
import sys
from pathlib import Path

from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, NullLocator

from scbench.evaluation.plots import COLOURS, save

MARKERS = {False: "o", True: "^"}  # cold or not


def draw(rows: list[dict], path: Path) -> None:
    """A point a loader, number of cores and state of the cache, at the median; its bar reaches over all rounds."""
    rows = [row for row in rows if row["stage"] == "training" and row["status"] == "ok"]
    if not rows:
        return
    names = list(dict.fromkeys(_name(row) for row in rows))
    all_cores = sorted({row["cores"] for row in rows})
    kinds = sorted({(row["cache"] != "warm", row["cores"]) for row in rows})
    figure = Figure(figsize=(8, 1.6 + 0.42 * len(names)), layout="constrained")
    axes = figure.subplots()
    for number, (cold, cores) in enumerate(kinds):
        here = [row for row in rows if (row["cache"] != "warm", row["cores"]) == (cold, cores)]
        speeds = [row["cells_per_second"] for row in here]
        spreads = [row["cells_per_second_spread"] for row in here]
        bars = [[speed - spread["least"] for speed, spread in zip(speeds, spreads, strict=True)],
                [spread["most"] - speed for speed, spread in zip(speeds, spreads, strict=True)]]
        places = [names.index(_name(row)) + 0.15 * (number - (len(kinds) - 1) / 2) for row in here]
        colour = COLOURS[all_cores.index(cores) % len(COLOURS)]
        axes.errorbar(speeds, places, xerr=bars, fmt=MARKERS[cold], color=colour, capsize=3, markersize=6,
                      label=f"{cores} core{'s' * (cores > 1)}, {'cold' if cold else 'warm'}")
    settings = rows[0]["settings"]
    axes.set(xscale="log", yticks=range(len(names)), yticklabels=names, xlabel="training-ready cells a second",
             title=f"{settings['cells']:,} cells of {settings['median_genes']:,.0f} genes, {settings['max_genes']} shown")
    axes.set_ylim(len(names) - 0.5, -0.5)
    axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes.xaxis.set_major_formatter("{x:,.0f}")
    axes.xaxis.set_minor_locator(NullLocator())
    axes.grid(axis="x", alpha=0.3)
    figure.legend(loc="outside lower center", ncols=len(kinds), frameon=False)
    save(figure, path)


def _name(row: dict) -> str:
    return f"{row['loader']}, {row['sampler']}" if row["loader"] in ("scbench", "memmap") else row["loader"]


if __name__ == "__main__":
    if len(sys.argv) != 2:
        raise SystemExit(__doc__)
    source = Path(sys.argv[1])
    draw(json.loads(source.read_text(encoding="utf-8")), source.with_suffix(".png"))
