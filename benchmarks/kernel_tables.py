"""The tables of docs/kernels.md, from a folder with traffic.json (made by traffic.py), compile.json (by kernels.py
--compile-report) and steps_STRUCTURE.json (by triton_steps.py).

    python benchmarks/kernel_tables.py docs/results/kernels
"""

import json
import sys
from itertools import groupby
from pathlib import Path

DTYPES = ("fp32", "bf16")


def table(columns: list[str], lines: list[list[str]]) -> list[str]:
    """A table in Markdown, line by line."""
    return ["| " + " | ".join(cells) + " |" for cells in (columns, ["---"] * len(columns), *lines)]


def traffic_table(rows: list[dict]) -> list[str]:
    """One line an op and direction: fp32 / bf16 in every cell."""
    lines = []
    for (op, direction), found in groupby(sorted(rows, key=_order), lambda row: (row["op"], row["direction"])):
        by_dtype = {row["dtype"]: row for row in found}
        pair = [by_dtype[dtype] for dtype in DTYPES]
        lines.append([
            op, direction,
            " / ".join(f"{row['bytes_required'] / 1e6:,.1f}" for row in pair),
            " / ".join(f"{row['bytes_moved'] / row['bytes_required']:.3f}" for row in pair),
            " / ".join(f"{row['bytes_moved'] / row['bytes_eager']:.3f}" for row in pair),
            " / ".join(str(row["launches"]) for row in pair), " / ".join(str(row["eager_launches"]) for row in pair),
        ])  # fmt: skip
    return table(["op", "direction", "MB required", "moved / required", "moved / eager", "launches", "of eager"], lines)


def _order(row: dict) -> tuple:
    return row["op"], row["direction"] == "backward"


def compile_table(rows: list[dict]) -> list[str]:
    """One line a kernel, over all targets and widths; two numbers are fp32 / bf16."""
    lines = []
    for (op, kernel), found in groupby(sorted(rows, key=lambda r: (r["op"], r["kernel"])), lambda r: (r["op"], r["kernel"])):
        found = list(found)
        half = [row for row in found if row["dtype"] == "bf16"]
        cores = sorted({row["tensor_core"] for row in half if row["dot"] == "bf16" and row["tensor_core"]})
        hopper = [row for row in half if row["target"] == "sm_90" and row["width"] == 256]
        lines.append([
            op, kernel.strip("_").removesuffix("_kernel").replace("_", " "),
            " / ".join(str(max(row["registers"] for row in found if row["dtype"] == dtype)) for dtype in DTYPES),
            str(sum(row["spills"] for row in found)),
            " / ".join(f"{max(row['shared_bytes'] for row in found if row['dtype'] == d) / 1024:.1f}" for d in DTYPES),
            ", ".join(sorted({str(row["warps"]) for row in found})), ", ".join(cores) or "-",
            ", ".join(f"{row['wide_loads']} of {row['loads']}" for row in hopper),
            ", ".join(str(row["flop_per_byte"]) for row in hopper),
        ])  # fmt: skip
    return table(["op", "kernel", "registers", "spills", "KiB shared", "warps", "tensor cores (bf16)", "16-byte loads",
                  "FLOP / byte"], lines)


def steps_table(runs: list[list[dict]]) -> list[str]:
    """One line a structure: the losses of the first and the last step, by PyTorch, and how far Triton's are off."""
    lines = []
    for rows in runs:
        first, last = rows[0], rows[-1]
        losses = [f"{first[name]:.4f} → {last[name]:.4f}" for name in ("regression_loss_torch", "mvc_loss_torch")]
        lines.append([first["structure"], str(last["step"]), *losses, f"{max(row['difference'] for row in rows):.1e}"])
    return table(["structure", "steps", "regression loss", "MVC loss", "largest relative difference"], lines)


def main(folder: Path) -> None:
    """Print all three."""
    traffic, compiled, *steps = (json.loads(path.read_text(encoding="utf-8")) for path in (
        folder / "traffic.json", folder / "compile.json", *sorted(folder.glob("steps_*.json"))
    ))
    print("\n".join([*traffic_table(traffic), "", *compile_table(compiled), "", *steps_table(steps)]))


if __name__ == "__main__":
    if len(sys.argv) != 2:
        raise SystemExit(__doc__)
    main(Path(sys.argv[1]))
