"""A picture of loader.py's rows: training-ready cells/s of each loader, by cores and state of the cache.

    python benchmarks/loader_plots.py loader.json
"""

import json
import sys
from pathlib import Path

from matplotlib.figure import Figure

from scbench.evaluation.plots import COLOURS, save


def draw(rows: list[dict], path: Path) -> None:
    """Bars beside each other, a number of cores and a state of the cache each; their whiskers reach over all rounds."""
    rows = [row for row in rows if row["stage"] == "training" and row["status"] == "ok"]
    if not rows:
        return
    names = list(dict.fromkeys(_name(row) for row in rows))
    kinds = sorted({(row["cache"] != "warm", row["cores"]) for row in rows})
    figure = Figure(figsize=(8, 1.2 + 0.25 * len(names) * len(kinds)), layout="constrained")
    axes = figure.subplots()
    thickness = 0.8 / len(kinds)
    for number, (cold, cores) in enumerate(kinds):
        here = [row for row in rows if (row["cache"] != "warm", row["cores"]) == (cold, cores)]
        places = [names.index(_name(row)) + thickness * (number - (len(kinds) - 1) / 2) for row in here]
        speeds = [row["cells_per_second"] for row in here]
        spreads = [row["cells_per_second_spread"] for row in here]
        whiskers = [[speed - spread["least"] for speed, spread in zip(speeds, spreads, strict=True)],
                    [spread["most"] - speed for speed, spread in zip(speeds, spreads, strict=True)]]
        axes.barh(places, speeds, 0.9 * thickness, xerr=whiskers, color=COLOURS[number], error_kw={"linewidth": 1},
                  label=f"{cores} core{'s' * (cores > 1)}, {'cold' if cold else 'warm'}")
    settings = rows[0]["settings"]
    axes.set(xscale="log", yticks=range(len(names)), yticklabels=names, xlabel="training-ready cells a second",
             title=f"{settings['cells']:,} cells of {settings['median_genes']:,.0f} genes, {settings['max_genes']} shown")
    axes.set_ylim(len(names) - 0.5, -0.5)
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
