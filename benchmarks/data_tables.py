"""The tables of docs/data.md, from what randomness.py, scale.py, prepare.py and loader.py wrote.

    python benchmarks/data_tables.py docs/results
"""

import json
import sys
from pathlib import Path

import loader_tables
from kernel_tables import table

DISKS = {"shuffled": "one store", "parts": "eight parts, merged", "sorted": "not shuffled at all"}


def randomness_table(rows: list[dict]) -> list[str]:
    """One line an order on the disk and a way to draw batches: entropy against a true shuffle, and cells that meet again."""
    lines = []
    for row in rows:
        if row["drawn_by"] == "scbench" and row["lanes"] == 2:
            continue  # between 1 and 8 in every respect; the CSV has it
        how = row["drawn_by"] if row["drawn_by"] != "true" else "a true shuffle"
        if row["lanes"] is not None:
            how = f"scbench, {row['lanes']} lane{'s' * (row['lanes'] > 1)}, extents of {row['extent_megabytes']:g} MB"
        lines.append([DISKS[row["disk"]], how, f"{row['entropy_ratio']:.3f}", f"{row['chi_square_z']:,.1f}",
                      f"{row['repeated_pairs']:.2f}"])
    return table(["cells on the disk", "batches drawn by", "entropy / true shuffle's", "z", "pairs again / chance"], lines)


def scale_table(rows: list[dict]) -> list[str]:
    """One line a size of store."""
    lines = []
    for row in rows:
        opened, first, peak = (row[name]["median"] for name in ("open_seconds", "first_batch_seconds", "peak_bytes"))
        lines.append([f"{row['cells']:,}", f"{row['files']:,}", f"{row['manifest_bytes'] / 1e6:.1f}", f"{opened:.3f}",
                      f"{first:.2f}", f"{peak / 1e6:,.0f}"])
    return table(["cells", "files", "manifest, MB", "open, s", "first batch, s (opening included)", "peak MB"], lines)


def prepare_table(rows: list[dict]) -> list[str]:
    """One line a builder and kind of matrix; ratios to the reference's way on the same matrix."""
    base = {row["matrix"]: row["cells_per_second"]["median"] for row in rows if row["builder"] == "reference"}
    lines = [
        [row["builder"], row["matrix"], str(row["workers"]), f"{row['cells_per_second']['median']:,.0f}",
         f"{row['cells_per_second']['median'] / base[row['matrix']]:.2f}", f"{row['peak_bytes'] / 1e6:,.0f}",
         f"{row['bytes_per_cell']:,.0f}"]
        for row in rows if row["status"] == "ok"
    ]
    return table(["builder", "matrix", "workers", "cells/s", "× reference", "peak MB", "bytes a cell"], lines)


def main(results: Path) -> None:
    """Print all."""

    def rows(name: str) -> list[dict]:
        return json.loads((results / name).read_text(encoding="utf-8"))

    loader = rows("loader/loader.json")
    parts = [
        loader_tables.ratios_table(loader), loader_tables.training_table(loader), loader_tables.reading_table(loader),
        loader_tables.settings_list(loader), randomness_table(rows("randomness/datasets.json")),
        scale_table(rows("scale/scale.json")), prepare_table(rows("prepare/prepare.json")),
    ]
    print("\n\n".join("\n".join(part) for part in parts))


if __name__ == "__main__":
    if len(sys.argv) != 2:
        raise SystemExit(__doc__)
    main(Path(sys.argv[1]))
