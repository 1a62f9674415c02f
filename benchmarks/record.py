"""What a benchmark leaves behind: rows as JSON, the same as a long CSV, a table to read."""

import csv
import json
from pathlib import Path

import numpy as np

IDENTITY = ("implementation", "structure", "status")


def percentiles(seconds: list[float]) -> dict[str, float]:
    """Median, 20th and 80th percentile."""
    p20, median, p80 = np.percentile(seconds, [20, 50, 80]).tolist()
    return {"median": median, "p20": p20, "p80": p80}


def write(path: Path, rows: list[dict], machine: dict, identity: tuple[str, ...] = IDENTITY) -> None:
    """`path` gets the rows as a JSON list; the CSV beside it one line for each number, with the machine in every line.

    `identity` names what tells rows apart; every line of the CSV has it.
    """
    path.write_text(json.dumps(rows, indent=2) + "\n", encoding="utf-8")
    with open(path.with_suffix(".csv"), "w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow([*identity, "metric", "value", "settings", *machine])
        for row in rows:
            for metric, value in _numbers(row, identity):
                writer.writerow([*(row[name] for name in identity), metric, value, json.dumps(row.get("settings", {})),
                                 *machine.values()])


def _numbers(row: dict, identity: tuple[str, ...]) -> list[tuple[str, float | int | str | None]]:
    """(metric, value) pairs; nested ones are joined by a dot."""
    pairs = []
    for name, value in row.items():
        if name in (*identity, "settings"):
            continue
        pairs += [(f"{name}.{part}", v) for part, v in value.items()] if isinstance(value, dict) else [(name, value)]
    return pairs


def print_table(columns: list[str], lines: list[list[str]]) -> None:
    """A small table, the first column to the left, numbers to the right; never folded, whatever the terminal."""
    widths = [max(map(len, column)) for column in zip(columns, *lines, strict=True)]
    for line in [columns, ["-" * width for width in widths], *lines]:
        others = [cell.rjust(width) for cell, width in zip(line[1:], widths[1:], strict=True)]
        print("  ".join([line[0].ljust(widths[0]), *others]))
