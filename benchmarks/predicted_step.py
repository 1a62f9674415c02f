"""What a bf16 training step of each structure takes on a GPU that nobody has measured: predicted, not measured.

    python benchmarks/predicted_step.py --json predicted.json --plots plots     # A100 and H100; 32, 128 and 512 cells a step
    python benchmarks/predicted_step.py --structures mamba --batch-cells 512 --gpus h100

step_work.py counts a step's operations: bytes, FLOPs, launches. roofline.py has the ceilings. Two bounds:

low     nothing overlaps: each operation takes its bytes or its FLOPs, whichever is longer, and 5 us a launch; and the device
        waits for the host, which issues one step after the other
high    everything overlaps: all bytes or all FLOPs of the step, whichever is longer; launches and host are hidden

Host: the processor's time for the same step on this CPU, with few and narrow tensors, the least of several; what it computes
is not subtracted. (On a GPU the host runs ahead of the device, so less than all of it is waited for.)

Left out: communication between GPUs and the copy of the batch to the device, which has a stream of its own; tiles that a
cell of 513 tokens does not fill and the exponentials of attention; further launches of operations that torch makes in several
(sorts, a convolution's layouts); the caches of large GPUs, which would keep what an operation leaves for the next.
"""

import sys
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from time import process_time
from typing import Literal

import machine
import tyro
from cells import load_batches
from options import Options, Structure
from ours import ScbenchStep
from predicted_step_plot import plot
from record import print_table, write
from roofline import FORMULA, GPUS, predict
from step_work import DEEPSPEED, DROPOUT, Operation, model_work, read_ratios, update_work

from scbench.config import STRUCTURES
from scbench.errors import UserError
from scbench.models.model import ExpressionModel

TRAFFIC = Path(__file__).parents[1] / "docs/results/kernels/traffic.json"
STATUS = "predicted, not measured"
IDENTITY = ("implementation", "structure", "status", "gpu", "batch_cells")
PARTS = ("memory", "products", "launches", "host")
HOST_WIDTH, HOST_GENES, HOST_CELLS, HOST_VOCABULARY, HOST_STEPS = 16, 8, 2, 64, 20
NAMED = 8  # operations that take longest


@dataclass(frozen=True, kw_only=True)
class PredictedOptions:
    """Predict training steps."""

    structures: tuple[Structure, ...] = STRUCTURES
    """Which encoders."""
    gpus: tuple[Literal["a100", "h100"], ...] = tuple(GPUS)
    """Which GPUs, one each."""
    batch_cells: tuple[int, ...] = (32, 128, 512)
    """Cells a step."""
    genes: int = 512
    """Genes a cell; with <cls> one token more."""
    width: int = 256
    """Width of the model."""
    layers: int = 6
    """Encoder layers."""
    heads: int = 8
    """Attention heads (transformer only)."""
    vocabulary_size: int = 60_697
    """Tokens of the vocabulary."""
    traffic: Path = TRAFFIC
    """What traffic.py wrote for all ops in bf16."""
    json: Path | None = None
    """File for the rows; a long CSV is written beside it."""
    plots: Path | None = None
    """Folder for a picture of the rows."""

    def __post_init__(self) -> None:
        if self.json is not None and self.json.suffix == ".csv":
            raise UserError(f"--json {self.json} would be overwritten by the CSV beside it: name it .json.")

    def case(self, structure: str, batch_cells: int) -> Options:
        """One step."""
        return Options(structure=structure, batch_cells=batch_cells, genes=self.genes, width=self.width, layers=self.layers,
                       heads=self.heads, vocabulary_size=self.vocabulary_size)


def host_seconds(structure: str, layers: int) -> float:
    """What it takes to issue a step: the least of several with hardly anything to compute."""
    options = Options(structure=structure, width=HOST_WIDTH, layers=layers, genes=HOST_GENES, batch_cells=HOST_CELLS,
                      vocabulary_size=HOST_VOCABULARY)
    vocabulary, [batch] = load_batches(options, 1)
    step = ScbenchStep(ExpressionModel(options.model(vocabulary.size, dropout=DROPOUT), vocabulary),
                       options.training(precision="bf16", deepspeed=DEEPSPEED, dropout=DROPOUT))
    seconds = []
    for _ in range(HOST_STEPS):
        start = process_time()
        step.forward_backward([batch])
        step.update()
        seconds.append(process_time() - start)
    step.engine.destroy()
    return min(seconds)


def bounds(gpu: str, operations: list[Operation], host: float) -> dict:
    """Seconds of a step: `seconds_lower`, everything overlapped; `seconds_upper`, nothing, and its parts."""
    parts, each = Counter(dict.fromkeys(PARTS, 0.0)), Counter()
    for name, moved, flops, launches, precision in operations:
        memory, products, launching = (predict(gpu, precision, **{"moved": 0, "flops": 0, "launches": 0} | work)
                                       for work in ({"moved": moved}, {"flops": flops}, {"launches": launches}))
        parts["memory" if memory >= products else "products"] += max(memory, products)
        parts["launches"] += launching
        each[name] += max(memory, products) + launching
    parts["host"] = host
    arithmetic = sum(predict(gpu, precision, moved=0, flops=sum(x.flops for x in operations if x.precision == precision),
                             launches=0) for precision in ("bf16", "fp32"))
    memory = predict(gpu, "bf16", moved=sum(x.moved for x in operations), flops=0, launches=0)
    return {
        "seconds_lower": max(memory, arithmetic), "seconds_upper": sum(parts.values()), "seconds_of": dict(parts),
        "bound_low": max(parts, key=parts.get), "bound_high": "memory" if memory >= arithmetic else "products",
        "longest_seconds": dict(each.most_common(NAMED)),
    }


def predicted(options: PredictedOptions) -> list[dict]:
    """A row a structure, batch and GPU."""
    ratios, rows = read_ratios(options.traffic), []
    for structure in dict.fromkeys(options.structures):
        update = None
        for cells in dict.fromkeys(options.batch_cells):
            case = options.case(structure, cells)
            if update is None:
                update, host = update_work(case), host_seconds(structure, options.layers)
            operations = model_work(case, ratios) + [x._replace(name=f"update: {x.name}") for x in update]
            for gpu in dict.fromkeys(options.gpus):
                found = bounds(gpu, operations, host)
                rows.append({
                    "implementation": "scbench", "structure": structure, "status": STATUS, "gpu": gpu, "batch_cells": cells,
                    "cells_per_second_low": cells / found["seconds_upper"],
                    "cells_per_second_high": cells / found["seconds_lower"], **found,
                    "bytes": sum(x.moved for x in operations), "flops": sum(x.flops for x in operations),
                    "launches": sum(x.launches for x in operations), "host_seconds": host,
                    "settings": {"genes": options.genes, "width": options.width, "layers": options.layers,
                                 "heads": options.heads, "vocabulary_size": options.vocabulary_size, "precision": "bf16",
                                 "deepspeed": DEEPSPEED, "dropout": DROPOUT, "ranks": 1},
                })
        print(f"{structure}: counted", file=sys.stderr, flush=True)
    return rows


def report(rows: list[dict]) -> None:
    """Print the ceilings and the table."""
    print(FORMULA)
    print("Predicted, not measured. low: nothing overlaps, and the host's time is added; high: everything overlaps.")
    lines = []
    for row in rows:
        lines.append([
            row["structure"], row["gpu"].upper(), str(row["batch_cells"]),
            f"{row['cells_per_second_low']:,.0f} - {row['cells_per_second_high']:,.0f}",
            f"{row['bound_low']}, {row['bound_high']}", *(f"{row['seconds_of'][part] * 1e3:.1f}" for part in PARTS),
            f"{row['seconds_upper'] * 1e3:.1f}", f"{row['seconds_lower'] * 1e3:.1f}", f"{row['bytes'] / 1e9:.1f}",
            f"{row['flops'] / 1e12:.2f}", str(row["launches"]),
        ])
    print_table(["structure", "gpu", "cells", "cells/s low - high", "bound by", *(f"{part} ms" for part in PARTS), "sum ms",
                 "overlapped ms", "GB", "TFLOP", "launches"], lines)
    for row in rows:
        longest = ", ".join(f"{name} {seconds * 1e3:.1f}" for name, seconds in row["longest_seconds"].items())
        print(f"{row['structure']}, {row['gpu'].upper()}, {row['batch_cells']} cells: the longest operations, ms: {longest}")


def main(arguments: list[str] | None = None) -> None:
    """Predict, print, write, draw."""
    options = tyro.cli(PredictedOptions, args=arguments, description=__doc__)
    rows = predicted(options)
    report(rows)
    if options.json is not None:
        write(options.json, rows, machine.describe(), IDENTITY)
    if options.plots is not None:
        options.plots.mkdir(parents=True, exist_ok=True)
        plot(rows, options.plots / "predicted.png")


if __name__ == "__main__":
    try:
        main()
    except UserError as error:
        print(f"predicted_step.py: {error}", file=sys.stderr)
        raise SystemExit(2) from None
