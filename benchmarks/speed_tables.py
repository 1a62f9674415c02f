"""The tables of docs/performance.md, from several runs of rivals.py, throughput.py and step_profile.py, and from
predicted_step.py and precision.py; and the README's sentence.

    python benchmarks/speed_tables.py docs/results/throughput

FOLDER has the runs, `predicted/` in it and `precision/` beside it the others. A number is the median over the runs, and behind
it the lowest and the highest; a ratio is taken inside each run first.
"""

import json
import sys
from itertools import chain
from pathlib import Path
from statistics import median

from kernel_tables import table

Rows = list[dict]


def read_runs(folder: Path, name: str) -> list[Rows]:
    """The rows of NAME_1.json, NAME_2.json, … that have numbers, run by run."""
    files = sorted(folder.glob(f"{name}_[0-9].json"))
    return [[row for row in read(file) if row["status"] == "ok"] for file in files]


def spread(values: list[float], form: str) -> str:
    """Median (lowest to highest), or the only one."""
    if len(values) == 1:
        return f"{values[0]:{form}}"
    return f"{median(values):{form}} ({min(values):{form}} to {max(values):{form}})"


def of(run: Rows, structure: str, implementation: str) -> dict | None:
    """The row of an implementation, or None."""
    return next((row for row in run if (row["structure"], row["implementation"]) == (structure, implementation)), None)


def best_plain(runs: list[Rows], structure: str) -> str:
    """The plain implementation that scbench is least ahead of, by the median over the runs."""
    ratios: dict[str, list[float]] = {}
    for row in chain.from_iterable(runs):
        if row["structure"] == structure and row["implementation"].startswith("plain"):
            ratios.setdefault(row["implementation"], []).append(row["scbench_ratio"]["median"])
    return min(ratios, key=lambda name: median(ratios[name]))


def ratio(runs: list[Rows], structure: str, implementation: str) -> str:
    """How many times as fast scbench is; "-" where there is no such implementation."""
    rows = [of(run, structure, implementation) for run in runs]
    return "-" if None in rows else spread([row["scbench_ratio"]["median"] for row in rows], ".2f")


def memory(runs: list[Rows], structure: str, implementation: str) -> str:
    """Peak memory in GB."""
    rows = [of(run, structure, implementation) for run in runs]
    return "-" if None in rows else f"{median(row['peak_bytes'] for row in rows) / 1e9:.2f}"


def structures_of(runs: list[Rows]) -> list[str]:
    """In the order of the run."""
    return list(dict.fromkeys(row["structure"] for row in runs[0]))


def training_table(runs: list[Rows]) -> list[str]:
    """One line a structure."""
    lines = []
    for structure in structures_of(runs):
        ours, best = [of(run, structure, "scbench") for run in runs], best_plain(runs, structure)
        lines.append([
            structure, spread([row["cells_per_second"] for row in ours], ".1f"), spread([row["mfu"] for row in ours], ".1%"),
            ratio(runs, structure, "reference"), ratio(runs, structure, best), best.removeprefix("plain_"),
            *(memory(runs, structure, name) for name in ("scbench", best, "reference")),
        ])  # fmt: skip
    return table(["structure", "cells/s", "MFU", "× reference", "× best plain", "which", "peak GB", "best plain's",
                  "reference's"], lines)


def embedding_table(stores: dict[str, list[Rows]]) -> list[str]:
    """One line a store and structure."""
    lines = []
    for store, runs in stores.items():
        for structure in structures_of(runs):
            best = best_plain(runs, structure)
            lines.append([
                store, structure, spread([of(run, structure, "scbench")["cells_per_second"] for run in runs], ".0f"),
                ratio(runs, structure, "plain_bucketed"), ratio(runs, structure, best), best.removeprefix("plain_"),
            ])  # fmt: skip
    return table(["store", "structure", "cells/s", "× bucketed", "× best plain", "which"], lines)


def parts_table(runs: list[Rows]) -> list[str]:
    """One line a structure and task: where the time of a step goes."""
    lines = []
    for structure in structures_of(runs):
        for task in ("training", "embedding"):
            rows = [row for run in runs for row in run if (row["structure"], row["task"]) == (structure, task)]
            if rows:
                parts = ("data", "forward", "backward", "optimizer")
                lines.append([
                    structure, task, spread([row["cells_per_second"] for row in rows], ".1f"),
                    f"{median(row['tokens_per_second'] for row in rows):,.0f}", f"{median(row['mfu'] for row in rows):.1%}",
                    *(share(rows, part) for part in parts), spread([row["wait_share"] for row in rows], ".1%"),
                ])  # fmt: skip
    return table(["structure", "task", "cells/s", "tokens/s", "MFU", "data", "forward", "backward", "optimizer",
                  "waited for data"], lines)


def share(rows: Rows, part: str) -> str:
    """Of a part in the sum of all parts."""
    if f"{part}_seconds" not in rows[0]:
        return "-"
    shares = []
    for row in rows:
        whole = sum(row[name]["median"] for name in row if name.endswith("_seconds") and name not in
                    ("step_seconds", "communication_seconds"))
        shares.append(row[f"{part}_seconds"]["median"] / whole)
    return f"{median(shares):.1%}"


def ranks_table(runs: list[Rows]) -> list[str]:
    """One line a structure and ZeRO stage, of all ranks together."""
    lines = []
    for first in runs[0]:
        key = first["structure"], first["settings"]["deepspeed"]
        rows = [row for run in runs for row in run if (row["structure"], row["settings"]["deepspeed"]) == key]
        lines.append([
            *key, str(first["settings"]["ranks"]), spread([row["cells_per_second"] for row in rows], ".1f"),
            *(share(rows, part) for part in ("forward", "backward", "optimizer", "communication")),
        ])  # fmt: skip
    return table(["structure", "ZeRO", "ranks", "cells/s", "forward", "backward", "optimizer", "communication in them"], lines)


def goals_table(training: list[Rows], embedding: dict[str, list[Rows]], parts: list[Rows]) -> list[str]:
    """One line a goal: what was aimed at, what the runs gave, and whether their median reaches it."""
    lines = []

    def line(what: str, goal: float, values: list[float], form: str, largest: bool = False) -> None:
        reached = median(values) <= goal if largest else median(values) >= goal
        aim = f"{'≤' if largest else '≥'} {goal:{form}}"
        lines.append([what, aim, spread(values, form), "met" if reached else "**missed**"])

    def values(structure: str, implementation: str) -> list[float]:
        return [row["scbench_ratio"]["median"] for run in training if (row := of(run, structure, implementation))]

    for structure in structures_of(training):
        main_one = structure == "transformer"
        if values(structure, "reference"):
            line(f"training, {structure}, × reference", 15 if main_one else 5, values(structure, "reference"), ".1f")
        best = best_plain(training, structure)
        line(f"training, {structure}, × best plain", 2 if main_one else 1.5, values(structure, best), ".2f")
    ours, theirs = ([of(run, "transformer", name) for run in training] for name in ("scbench", "reference"))
    line("training, transformer, MFU", 0.2, [row["mfu"] for row in ours], ".1%")
    line("training, transformer, peak memory / the reference's", 1 / 3,
         [a["peak_bytes"] / b["peak_bytes"] for a, b in zip(ours, theirs, strict=True)], ".2f", largest=True)
    for store, runs in embedding.items():
        for structure in structures_of(runs):
            ratios = [of(run, structure, "plain_bucketed")["scbench_ratio"]["median"] for run in runs]
            line(f"embedding, {store}, {structure}, × bucketed plain", 1.5, ratios, ".2f")
    waits = {structure: [of(run, structure, "scbench")["wait_share"] for run in parts] for structure in structures_of(parts)}
    line("training from a store, transformer, waiting for data", 0.02, waits["transformer"], ".1%", largest=True)
    longest = max(waits, key=lambda structure: median(waits[structure]))
    line(f"training from a store, {longest} (the most of all), waiting for data", 0.1, waits[longest], ".1%", largest=True)
    return table(["goal", "aimed at", "measured", ""], lines)


def peaks_line(names: dict[str, list[Rows]]) -> str:
    """The matrix rate that MFU is of, as each run found it."""
    peaks = [run[0]["settings"]["peak_flops_per_second"] / 1e9 for runs in names.values() for run in runs]
    return f"bf16 matrix rate, GFLOP/s: {spread(peaks, ',.0f')} over {len(peaks)} runs"


def predicted_table(rows: Rows) -> list[str]:
    """One line a structure and GPU, at the most cells a step that predicted_step.py took."""
    most = max(row["batch_cells"] for row in rows)
    lines = [
        [
            row["structure"], row["gpu"].upper(), f"{row['cells_per_second_low']:,.0f} to {row['cells_per_second_high']:,.0f}",
            *(f"{1e3 * row['seconds_of'][part]:.1f}" for part in ("memory", "products", "launches", "host")),
            f"{row['bound_low']}, {row['bound_high']}",
        ]
        for row in rows if row["batch_cells"] == most
    ]
    return table(["structure", "GPU", "cells/s, predicted", "ms: memory", "products", "launches", "host",
                  "bound by (low, high)"], lines)


def profile_table(runs: list[Rows]) -> list[str]:
    """One line a structure: what a training step consists of."""
    lines = []
    for structure in structures_of(runs):
        rows = [of(run, structure, "scbench") for run in runs]
        parts = ("products", "passes", "parameters", "between")
        lines.append([
            structure, f"{median(1e3 * row['step_seconds']['median'] for row in rows):,.0f}",
            *(f"{median(row['seconds_of'][part] / sum(row['seconds_of'].values()) for row in rows):.0%}" for part in parts),
            spread([row["products_of_peak"] for row in rows], ".0%"),
        ])  # fmt: skip
    return table(["structure", "step, ms", "products", "passes", "parameters", "between", "products' rate"], lines)


def precision_table(rows: Rows) -> list[str]:
    """One line a structure: validation losses of bf16 beside fp32's, and how runs' memory grew."""
    lines = []
    for row in rows:
        if row["precision"] == "difference":
            end, runs = row["end"], [x for x in rows if x["structure"] == row["structure"] and x["seed"] is not None]
            growth = [x["growth_bytes"] / 1e6 for x in runs]
            most = max(max(x["peak_bytes"].values()) for x in runs) / 1e9
            lines.append([
                row["structure"], f"{end['fp32']:.4f}", f"{end['difference']:+.4f} ({end['difference_low']:+.4f} to "
                f"{end['difference_high']:+.4f})", f"{end['spread']:.4f}",
                f"{abs(row['largest_difference_in_spreads']):.2f} (step {row['largest_difference_step']})", row["verdict"],
                f"{min(growth):.0f} to {max(growth):.0f} MB of {most:.1f} GB",
            ])  # fmt: skip
    return table(["structure", "fp32's loss", "bf16's less fp32's", "spread of seeds", "largest difference, in spreads",
                  "verdict", "memory grew by"], lines)


def sentence(training: list[Rows]) -> str:
    """What the README says of speed."""
    best, reference = (ratio(training, "transformer", name) for name in (best_plain(training, "transformer"), "reference"))
    return (f"On two CPU cores a transformer trains {best} times as fast as the best plain PyTorch and {reference} times as "
            f"fast as the reference (medians of {len(training)} runs, lowest and highest)")


def read(file: Path) -> Rows:
    """The rows of one run."""
    return json.loads(file.read_text(encoding="utf-8"))


def main(folder: Path) -> None:
    """Print all."""
    prefix = "embedding_"
    stores = sorted({file.stem.removeprefix(prefix)[:-2] for file in folder.glob(f"{prefix}*_[0-9].json")})
    embedding = {store: read_runs(folder, prefix + store) for store in stores}
    training, parts, ranks = (read_runs(folder, name) for name in ("training", "parts", "ranks"))
    tables = [
        goals_table(training, embedding, parts), training_table(training), embedding_table(embedding), parts_table(parts),
        ranks_table(ranks), profile_table(read_runs(folder, "profile")),
        precision_table(read(folder.parent / "precision" / "precision.json")),
        predicted_table(read(folder / "predicted" / "predicted.json")),
    ]
    lines = [sentence(training), peaks_line({"training": training, "parts": parts, **embedding})]
    print("\n\n".join([*lines, *("\n".join(lines) for lines in tables)]))


if __name__ == "__main__":
    if len(sys.argv) != 2:
        raise SystemExit(__doc__)
    main(Path(sys.argv[1]))
