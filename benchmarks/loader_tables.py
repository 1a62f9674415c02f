"""The tables of loaders in the documentation, from what loader.py --json wrote.

    python benchmarks/loader_tables.py docs/results/loader/loader.json
"""

import json
import sys
from pathlib import Path

from kernel_tables import table

# What scbench's loader is held to: (what, stage and cache and cores of both, ours, theirs, the least ratio).
GOALS = (
    ("training-ready cells, native sampler", "training", 1, ("scbench", "native"), "training", "reference", 20),
    ("training-ready cells, NumPy sampler", "training", 1, ("scbench", "numpy"), "training", "reference", 10),
    ("training-ready cells, native sampler", "training", 2, ("scbench", "native"), "training", "annbatch", 1.5),
    ("training-ready cells, native sampler", "training", 2, ("scbench", "native"), "training", "scdataset", 5),
    ("training-ready cells, native sampler", "training", 2, ("scbench", "native"), "training", "anndata", 5),
    ("bytes of blocks, read and shuffled", "shuffled", 1, ("scbench", None), "extents", "memmap", 0.6),
)
READ = {"rows": "raw cells, copied in shuffled order", "shuffled": "blocks, their cells located in shuffled order",
        "extents": "blocks"}


def training_table(rows: list[dict]) -> list[str]:
    """One line a loader, sampler, state of the cache and number of cores."""
    lines = []
    for row in rows:
        if row["stage"] != "training":
            continue
        name = [row["loader"], row["sampler"] or "its own"]
        if row["status"] != "ok":
            lines.append([*name, row["status"], *["-"] * 7])
            continue
        spread = row["cells_per_second_spread"]
        lines.append([
            *name, row["cache"], str(row["cores"]), f"{row['cells_per_second']:,.0f}",
            f"{spread['least']:,.0f} to {spread['most']:,.0f}", f"{row['tokens_per_second'] / 1e6:.2f}",
            f"{row['first_batch_seconds']:.2f}", f"{row['peak_bytes'] / 1e6:,.0f} ({row['idle_bytes'] / 1e6:,.0f})",
            f"{row['disk_bytes_per_cell']:,.0f}",
        ])  # fmt: skip
    return table(["loader", "sampler", "cache", "cores", "cells/s", "least to most", "million tokens/s", "first batch, s",
                  "peak MB (before opening)", "bytes a cell on disk"], lines)


def reading_table(rows: list[dict]) -> list[str]:
    """One line a loader and number of cores: raw cells copied in shuffled order, and whole blocks."""
    lines = []
    for row in rows:
        if row["stage"] != "training" and row["status"] == "ok":
            lines.append([row["loader"], READ[row["stage"]], str(row["cores"]), f"{row['cells_per_second']:,.0f}",
                          f"{row['bytes_per_second'] / 1e6:,.0f}"])
    return table(["loader", "what", "cores", "cells/s", "MB/s in memory"], lines)


def ratios_table(rows: list[dict]) -> list[str]:
    """One line a goal that both sides were measured for."""
    lines = []
    for what, stage, cores, (name, sampler), other_stage, other, goal in GOALS:
        rate = "cells_per_second" if stage == "training" else "bytes_per_second"
        ours = _rates(rows, name, stage, cores, rate, sampler)
        theirs = _rates(rows, other, other_stage, cores, rate)
        if ours and theirs:
            ratio = ours[0] / theirs[0]
            lines.append([what, f"{cores} core{'s' * (cores > 1)}", other, f"{ratio:.2f}", f"{goal:g}",
                          "yes" if ratio >= goal else "no"])
    return table(["what", "on", "against", "ratio", "goal", "met"], lines)


def _rates(rows: list[dict], name: str, stage: str, cores: int, rate: str, sampler: str | None = None) -> list[float]:
    return [row[rate] for row in rows if (row["loader"], row["stage"], row["cache"], row["cores"], row["status"])
            == (name, stage, "warm", cores, "ok") and sampler in (None, row["sampler"])]


def settings_list(rows: list[dict]) -> list[str]:
    """What each loader read, and the settings that it was fastest with."""
    found = []
    for row in rows:
        tried = row.get("tried")
        if row["stage"] == "training" and row["cache"] == "warm" and tried:
            best = max(tried, key=lambda trial: trial["cells_per_second"])
            words = ", ".join(f"{name} {value}" for name, value in best.items() if name != "cells_per_second")
            on = f"{row['cores']} core{'s' * (row['cores'] > 1)}"
            found.append(f"- {row['loader']}, {on}: {words} (the fastest of {len(tried)} settings)")
    return found


def main(path: Path) -> None:
    """Print all."""
    rows = json.loads(path.read_text(encoding="utf-8"))
    parts = [ratios_table(rows), training_table(rows), reading_table(rows), settings_list(rows)]
    print("\n\n".join("\n".join(part) for part in parts))


if __name__ == "__main__":
    if len(sys.argv) != 2:
        raise SystemExit(__doc__)
    main(Path(sys.argv[1]))
