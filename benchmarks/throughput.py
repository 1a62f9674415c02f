"""Throughput of scbench's own training step: cells/s, tokens/s, MFU, where the time goes, peak memory.

    python benchmarks/throughput.py --genes 512                    # 513 tokens a cell, 6 layers x 256, batch 32, bf16
    python benchmarks/throughput.py --store STORE --precision fp32 --json out.json

The step is the one of `scbench pretrain` (DeepSpeed engine, dropout, clipping); its batches are made beforehand, so the
loader is not part of it. Machines are shared: compare numbers of one run only.
"""

import math
import sys
from dataclasses import dataclass
from typing import Literal

import machine
import tyro
from cells import load_batches
from flops import FORMULA, step_flops
from implementations import DROPOUT
from options import Options
from ours import ScbenchStep
from record import percentiles, print_table, write

from scbench.errors import UserError
from scbench.models.model import ExpressionModel


@dataclass(frozen=True, kw_only=True)
class ThroughputOptions(Options):
    """Time scbench's training step."""

    precision: Literal["bf16", "fp32"] = "bf16"
    """As in pretrain."""
    deepspeed: str = "zero1"
    """As in pretrain: zero0 … zero3, or a DeepSpeed JSON file."""


class ForwardClock:
    """Adds up the seconds spent in a model's forward."""

    def __init__(self, model, device):
        self.seconds = 0.0
        self._device = device
        model.register_forward_pre_hook(self._start)
        model.register_forward_hook(self._stop)

    def _start(self, *_):
        self._since = machine.clock(self._device)

    def _stop(self, *_):
        self.seconds += machine.clock(self._device) - self._since


def measure(options: ThroughputOptions) -> dict:
    """The row of one configuration."""
    device = machine.device()
    vocabulary, batches = load_batches(options, options.warmup + options.steps)
    config = options.training(precision=options.precision, deepspeed=options.deepspeed, dropout=DROPOUT)
    model = ExpressionModel(config.model(vocabulary.size), vocabulary, options.seed)
    step = ScbenchStep(model, config)
    peak = machine.matrix_peak(device)
    forward_clock = ForwardClock(model, device)
    seconds: dict[str, list[float]] = {"step": [], "forward": [], "backward": [], "optimizer": []}
    rates = {"cells": [], "tokens": [], "flops": []}
    for number, batch in enumerate(batches):
        window = step.prepare(batch)
        forward_clock.seconds = 0.0
        start = machine.clock(device)
        loss = step.forward_backward(window)
        middle = machine.clock(device)
        step.update()
        end = machine.clock(device)
        if number < options.warmup:
            continue
        forward = forward_clock.seconds
        for part, value in zip(seconds, (end - start, forward, middle - start - forward, end - middle), strict=True):
            seconds[part].append(value)
        needed = step_flops(batch.cell_offsets.diff().numpy(), len(batch.masked), len(batch.query_genes),
                            width=options.width, layers=options.layers)
        for rate, amount in zip(rates, (batch.n_cells, len(batch.genes), needed), strict=True):
            rates[rate].append(amount / (end - start))
    peak = max(peak, machine.matrix_peak(device))
    if not math.isfinite(loss):
        raise UserError(f"the loss is {loss} after {len(batches)} steps: there is nothing to time.")
    medians = {name: percentiles(values)["median"] for name, values in rates.items()}
    return {
        "implementation": "scbench", "structure": "transformer", "status": "ok",
        "cells_per_second": medians["cells"], "tokens_per_second": medians["tokens"],
        "mfu": medians["flops"] / peak.flops_per_second, "peak_bytes": machine.peak_bytes(), "loss": loss,
        **{f"{part}_seconds": percentiles(values) for part, values in seconds.items()},
        "peak_flops_per_second": peak.flops_per_second,
        "settings": {**options.settings(), "dropout": DROPOUT, "peak_shape": peak.shape},
    }


def main(arguments: list[str] | None = None) -> None:
    """Measure, print, write."""
    options = tyro.cli(ThroughputOptions, args=arguments, description=__doc__)
    row = measure(options)
    print(FORMULA)
    rows, inner, columns = row["settings"]["peak_shape"]
    print(f"Peak here: {row['peak_flops_per_second'] / 1e9:,.0f} GFLOP/s bf16 ({rows} x {inner} x {columns})")
    timing = row["step_seconds"]
    parts = ["forward", "backward", "optimizer"]
    shares = [row[f"{part}_seconds"]["median"] / timing["median"] for part in parts]
    memory = "not known" if row["peak_bytes"] is None else f"{row['peak_bytes'] / 1e9:.2f} GB"
    print_table(["precision", "cells/s", "tokens/s", "MFU", "step s (p20-p80)", *parts, "peak memory"], [[
        options.precision, f"{row['cells_per_second']:,.2f}", f"{row['tokens_per_second']:,.0f}", f"{row['mfu']:.1%}",
        f"{timing['median']:.3f} ({timing['p20']:.3f}-{timing['p80']:.3f})", *(f"{share:.0%}" for share in shares), memory,
    ]])
    if options.json is not None:
        write(options.json, [row], machine.describe())


if __name__ == "__main__":
    try:
        main()
    except UserError as error:
        print(f"throughput.py: {error}", file=sys.stderr)
        raise SystemExit(2) from None
