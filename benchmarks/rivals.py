"""scbench's training step beside the reference's and beside a good plain PyTorch one: the ratios that matter.

    python benchmarks/rivals.py --genes 512 --json rivals.json     # 513 tokens a cell, 6 layers x 256, batch 32

reference       the reference's model and loop as they are (reference.py), fp32, its only mode
plain_sdpa      the best plain PyTorch: padded SDPA, bf16 autocast, fused AdamW (plain.py)
plain_compiled  the same through torch.compile (ask for it: compiling takes long)
scbench         ours, bf16

All get the same batches and start from the same weights. First, without dropout, loss and gradient norm of the first
batch must agree with the reference's (in fp32 to 1e-4, in bf16 to 2e-2): who fails gets no number. Then rounds: in each,
every implementation trains on the same batch, one after the other, so that a busy machine is unfair to all alike.
"""

import sys
from dataclasses import dataclass
from typing import Literal

import machine
import memory
import tyro
from cells import load_batches
from check import TOLERANCE, check_all
from flops import FORMULA, step_flops
from implementations import DROPOUT, PRECISION, TrainingStep, build, initial_weights
from options import Options
from record import percentiles, print_table, write

from scbench.data.batch import CellBatch
from scbench.errors import UserError

Name = Literal["reference", "plain_sdpa", "plain_compiled", "scbench"]


@dataclass(frozen=True, kw_only=True)
class RivalsOptions(Options):
    """Time training steps side by side; --steps are rounds."""

    implementations: tuple[Name, ...] = ("reference", "plain_sdpa", "scbench")
    """Which ones."""


def measure(options: RivalsOptions) -> list[dict]:
    """A row an implementation."""
    names = list(dict.fromkeys(options.implementations))
    vocabulary, batches = load_batches(options, options.warmup + options.steps)
    weights = initial_weights(options, vocabulary)
    verdicts = check_all(names, weights, options, vocabulary, batches[0])
    passed = [name for name in names if verdicts[name][1] is None]
    device = machine.device()
    peak = machine.matrix_peak(device)
    steps = {name: build(name, weights, options, vocabulary, precision=PRECISION[name], dropout=DROPOUT, device=device)
             for name in passed}
    seconds = _rounds(steps, batches, options.warmup)
    peak = max(peak, machine.matrix_peak(device))
    steps.clear()
    rows = []
    for name in names:
        result, wrong = verdicts[name]
        row = {
            "implementation": name, "structure": "transformer", "status": wrong or "ok", "cells_per_second": None, "mfu": None,
            "peak_bytes": None, "loss": result.loss,
            "settings": {**options.settings(), "precision": PRECISION[name], "dropout": DROPOUT, "tolerance": TOLERANCE,
                         "peak_shape": peak.shape, "peak_bytes": "of a process that runs only this, Python and torch included",
                         "loss": "of the first batch, without dropout"},
        }
        if wrong is None:
            timed = list(zip(seconds[name], batches[options.warmup :], strict=True))
            row["cells_per_second"] = percentiles([batch.n_cells / s for s, batch in timed])["median"]
            row["mfu"] = percentiles([_needed(batch, options) / s for s, batch in timed])["median"] / peak.flops_per_second
            row["peak_bytes"] = memory.measure(name, options)
            row["step_seconds"] = percentiles(seconds[name])
            row["peak_flops_per_second"] = peak.flops_per_second
        rows.append(row)
    return rows


def _rounds(steps: dict[str, TrainingStep], batches: list[CellBatch], warmup: int) -> dict[str, list[float]]:
    """Seconds of each implementation's step on each batch after the first `warmup`."""
    device = machine.device()
    seconds = {name: [] for name in steps}
    for number, batch in enumerate(batches):
        for name, step in steps.items():
            prepared = step.prepare(batch)
            start = machine.clock(device)
            step.forward_backward(prepared)
            step.update()
            if number >= warmup:
                seconds[name].append(machine.clock(device) - start)
    return seconds


def _needed(batch: CellBatch, options: Options) -> int:
    return step_flops(batch.cell_offsets.diff().numpy(), len(batch.masked), len(batch.query_genes),
                      width=options.width, layers=options.layers)


def report(rows: list[dict]) -> None:
    """Print the formula, the table and the failures."""
    print(FORMULA)
    speed = {row["implementation"]: row["cells_per_second"] for row in rows if row["status"] == "ok"}
    lines = []
    for row in rows:
        if row["status"] != "ok":
            lines.append([row["implementation"], row["settings"]["precision"], "failed", *["-"] * (4 + len(speed))])
            continue
        timing, peak = row["step_seconds"], row["peak_bytes"]
        lines.append([
            row["implementation"], row["settings"]["precision"], f"{row['cells_per_second']:,.2f}", f"{row['mfu']:.1%}",
            f"{timing['median']:.3f} ({timing['p20']:.3f}-{timing['p80']:.3f})",
            "not known" if peak is None else f"{peak / 1e9:.2f} GB", f"{row['loss']:.5f}",
            *(f"{row['cells_per_second'] / other:.2f}" for other in speed.values()),
        ])
    columns = ["", "precision", "cells/s", "MFU", "step s (p20-p80)", "peak memory", "loss", *(f"x {name}" for name in speed)]
    print_table(columns, lines)
    for row in rows:
        if row["status"] != "ok":
            print(f"{row['implementation']}: {row['status']}")


def main(arguments: list[str] | None = None) -> None:
    """Measure, print, write."""
    options = tyro.cli(RivalsOptions, args=arguments, description=__doc__)
    rows = measure(options)
    report(rows)
    if options.json is not None:
        write(options.json, rows, machine.describe())


if __name__ == "__main__":
    try:
        main()
    except UserError as error:
        print(f"rivals.py: {error}", file=sys.stderr)
        raise SystemExit(2) from None
