"""Pictures of the kernels' numbers, from the JSON files that kernels.py and traffic.py wrote.

    python benchmarks/kernel_plots.py --timings kernels.json --traffic traffic.json --output plots

kernels_time.png        how many times as fast as eager PyTorch each op is, with its 20th and 80th percentile
kernels_traffic.png     bytes moved, required, and moved by eager PyTorch
kernels_predicted.png   predicted times on an A100 and an H100, if the timings have any
"""

import json
import sys
from dataclasses import dataclass
from pathlib import Path

import tyro
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, NullLocator
from roofline import GPUS

from scbench.errors import UserError
from scbench.evaluation.plots import COLOURS, save

DIRECTIONS = ("forward", "backward")
MARKERS = {"scbench": "o", "compiled": "^"}


@dataclass(frozen=True, kw_only=True)
class PlotOptions:
    """Draw what was measured."""

    output: Path
    """Folder for the pictures."""
    timings: Path | None = None
    """What kernels.py --json wrote."""
    traffic: Path | None = None
    """What traffic.py --json wrote."""

    def __post_init__(self) -> None:
        if self.timings is None and self.traffic is None:
            raise UserError("There is nothing to draw: give --timings, --traffic or both.")


def _panels(rows: list[dict], title: str, xlabel: str) -> tuple[Figure, list[tuple[str, str, object, list[str]]]]:
    """A figure with a panel a direction and dtype, and what each shows: (direction, dtype, axes, ops from top to bottom)."""
    ops, dtypes = (list(dict.fromkeys(row[name] for row in rows)) for name in ("op", "dtype"))
    figure = Figure(figsize=(5.5 * len(DIRECTIONS), (1 + 0.34 * len(ops)) * len(dtypes) + 0.8), layout="constrained")
    figure.suptitle(title)
    panels = []
    for line, dtype in zip(figure.subplots(len(dtypes), 2, sharex=True, sharey=True, squeeze=False), dtypes, strict=True):
        for axes, direction in zip(line, DIRECTIONS, strict=True):
            axes.set(title=f"{direction}, {dtype}", xscale="log", yticks=range(len(ops)), yticklabels=ops)
            axes.set_ylim(len(ops) - 0.4, -0.6)
            axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
            axes.xaxis.set_major_formatter("{x:g}")
            axes.xaxis.set_minor_locator(NullLocator())
            axes.grid(axis="x", alpha=0.3)
            panels.append((direction, dtype, axes, ops))
    for axes in line:
        axes.set_xlabel(xlabel)
    return figure, panels


def _legend(figure: Figure, panels: list) -> None:
    """One for all panels, below them; a name once."""
    found = {}
    for *_, axes, _ in panels:
        found |= dict(zip(*reversed(axes.get_legend_handles_labels()), strict=True))
    figure.legend(found.values(), found.keys(), loc="outside lower center", ncols=len(found), frameon=False)


def plot_times(rows: list[dict], path: Path) -> None:
    """Eager PyTorch's median over each other implementation's, bars from its 80th to its 20th percentile."""
    eager = {(r["op"], r["dtype"], r["width"], r["direction"]): r["seconds"] for r in rows if r["implementation"] == "eager"}
    settings = rows[0]["settings"]
    width = rows[0]["width"]
    rows = [row for row in rows if row["width"] == width]
    title = (f"Time of eager PyTorch over each op's on this {settings['device'].upper()} "
             f"({settings['cells']} cells of {settings['tokens']} tokens, width {width})")
    figure, panels = _panels(rows, title, "times as fast as eager PyTorch (20th to 80th percentile)")
    for direction, dtype, axes, ops in panels:
        axes.axvline(1, color="#777777", linewidth=1)
        for number, (name, marker) in enumerate(MARKERS.items()):
            wanted = (name, direction, dtype)
            for row in (row for row in rows if (row["implementation"], row["direction"], row["dtype"]) == wanted):
                base, seconds = eager.get((row["op"], dtype, width, direction)), row["seconds"]
                if not base or not seconds:  # it failed, or there is no rival
                    continue
                ratio, low, high = (base["median"] / seconds[part] for part in ("median", "p80", "p20"))
                axes.errorbar(ratio, ops.index(row["op"]) + 0.2 * number, xerr=[[ratio - low], [high - ratio]], fmt=marker,
                              color=COLOURS[number], capsize=3, markersize=6, label=name)
    _legend(figure, panels)
    save(figure, path)


def _bars(panels: list, kinds: dict[str, str], values: dict[tuple[str, str, str], dict], scale: float) -> None:
    """Bars beside each other, a kind each: its key in `values` and its name."""
    thickness = 0.8 / len(kinds)
    for direction, dtype, axes, ops in panels:
        for number, (key, name) in enumerate(kinds.items()):
            places = [place + thickness * (number - (len(kinds) - 1) / 2) for place in range(len(ops))]
            lengths = [(values.get((op, direction, dtype)) or {}).get(key) or 0 for op in ops]
            axes.barh(places, [length * scale for length in lengths], 0.9 * thickness, color=COLOURS[number], label=name)


def plot_traffic(rows: list[dict], path: Path) -> None:
    """What traffic.py counted."""
    shape = rows[0]
    title = f"Memory traffic ({shape['cells']} cells of {shape['tokens']} tokens, width {shape['width']}), by the meter's rule"
    figure, panels = _panels(rows, title, "MB")
    kinds = {"bytes_required": "required", "bytes_moved": "scbench, in Triton", "bytes_eager": "eager PyTorch"}
    _bars(panels, kinds, {(r["op"], r["direction"], r["dtype"]): r for r in rows}, 1e-6)
    _legend(figure, panels)
    save(figure, path)


def plot_predicted(rows: list[dict], path: Path) -> None:
    """Predicted times of scbench's ops and of eager PyTorch's; a panel's bars are GPUs and implementations."""
    kinds = {f"{gpu} {name}": f"{gpu.upper()}, {name}" for gpu in GPUS for name in ("scbench", "eager")}
    values = {}
    for row in rows:
        if row["implementation"] in ("scbench", "eager"):
            here = values.setdefault((row["op"], row["direction"], row["dtype"]), {})
            here |= {f"{gpu} {row['implementation']}": row[f"predicted_{gpu}_seconds"] for gpu in GPUS}
    title = "Predicted times, not measured: bytes and FLOPs against ceilings, plus launches"
    figure, panels = _panels(rows, title, "predicted us")
    _bars(panels, kinds, values, 1e6)
    _legend(figure, panels)
    save(figure, path)


def draw(output: Path, timings: list[dict] | None, traffic: list[dict] | None) -> list[Path]:
    """The pictures that the rows allow, in the folder `output`, which is made."""
    output.mkdir(parents=True, exist_ok=True)
    pictures = []
    if timings:
        pictures.append((plot_times, timings, "kernels_time.png"))
        if any(row[f"predicted_{gpu}_seconds"] for row in timings for gpu in GPUS):
            pictures.append((plot_predicted, timings, "kernels_predicted.png"))
    if traffic:
        pictures.append((plot_traffic, traffic, "kernels_traffic.png"))
    for plot, rows, name in pictures:
        plot(rows, output / name)
    return [output / name for *_, name in pictures]


def main(arguments: list[str] | None = None) -> None:
    """Read, draw, say what was drawn."""
    options = tyro.cli(PlotOptions, args=arguments, description=__doc__)
    files = [path and json.loads(path.read_text(encoding="utf-8")) for path in (options.timings, options.traffic)]
    for path in draw(options.output, *files):
        print(path)


if __name__ == "__main__":
    try:
        main()
    except UserError as error:
        print(f"kernel_plots.py: {error}", file=sys.stderr)
        raise SystemExit(2) from None
