"""Throughput of scbench itself, structure by structure: cells/s, tokens/s, MFU, where the time goes, peak memory.

    python benchmarks/throughput.py --json out.json --plots plots   # all structures, 513 tokens, 6 layers x 256, batch 32
    python benchmarks/throughput.py --structures linear --widths 256 512 --layers 6 12 --store STORE
    deepspeed --num_accelerators 2 --no_local_rank benchmarks/throughput.py --tasks training --deepspeed zero1 zero3

training: the step of `scbench pretrain` (DeepSpeed engine, dropout, clipping). With --store its loader runs too, and `wait` is
the share of a step spent waiting for it; synthetic batches are made beforehand. embedding: what `scbench embed` does with
cells in memory (drawing, packing, forward), one draw a cell; one process only. First loss and gradient, or embeddings, of
four cells must agree with plain PyTorch's. Then the timed steps, and as many again in which the device is waited for after
each part, for the shares. Machines are shared: compare numbers of one run only.
"""

import contextlib
import itertools
import math
import os
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Literal

import machine
import numpy as np
import speed_plots
import torch
import tyro
from cells import batches_to_embed, cells_to_embed, load_batches, open_loader, synthetic_batch, vocabulary_of
from check import check_model
from collectives import CollectiveClock
from flops import formula, forward_flops, step_flops
from implementations import DROPOUT
from options import Options, Sweep
from ours import ScbenchStep
from record import percentiles, print_table, write

from scbench.data.batch import CellBatch
from scbench.data.cells import content_hash
from scbench.data.vocabulary import Vocabulary
from scbench.errors import UserError
from scbench.evaluation.embed import encode
from scbench.models.model import ExpressionModel
from scbench.training import engine as engines
from scbench.training.allocator import keep_freed_memory
from scbench.training.engine import dist
from scbench.training.on_device import Moment, Windows

CHECKED_CELLS, EMBEDDED_BATCHES = 4, 8
PARTS = ("data", "forward", "backward", "optimizer", "communication")
IDENTITY = ("implementation", "structure", "task", "status")


@dataclass(frozen=True, kw_only=True)
class ThroughputOptions(Sweep):
    """Time scbench's training steps and embeddings."""

    precisions: tuple[Literal["bf16", "fp32"], ...] = ("bf16",)
    """As in pretrain."""
    deepspeed: tuple[str, ...] = ("zero1",)
    """As in pretrain: zero0 … zero3, or DeepSpeed JSON files (training only)."""


class Clock:
    """Adds up the seconds spent in a function."""

    def __init__(self, device: torch.device):
        self.seconds, self._device = 0.0, device

    def around(self, function):
        """The function, timed."""
        def timed(*args, **kwargs):
            start = machine.clock(self._device)
            result = function(*args, **kwargs)
            self.seconds += machine.clock(self._device) - start
            return result
        return timed


@contextlib.contextmanager
def windows(options: Options, vocabulary: Vocabulary, rank: int, world: int) -> Iterator[Iterator[list[CellBatch]]]:
    """A rank's windows, without end: the loader's, or synthetic ones again and again."""
    if options.store is not None:
        with open_loader(options, vocabulary, rank, world) as loader:
            yield loader
        return
    numbers = range(options.warmup + options.steps)
    yield itertools.cycle([[synthetic_batch(options, vocabulary, number, rank, world)] for number in numbers])


def train(options: Options, vocabulary: Vocabulary, precision: str, deepspeed: str, rank: int, world: int) -> dict:
    """What training steps take."""
    machine.forget_peak()
    config = options.training(precision=precision, deepspeed=deepspeed, dropout=DROPOUT)
    shape = config.model(vocabulary.size)
    step = ScbenchStep(ExpressionModel(shape, vocabulary, options.seed), config)
    device = step.engine.device
    with windows(options, vocabulary, rank, world) as source:
        source = Windows(source, device)
        for _ in range(options.warmup):
            step.forward_backward(next(source)[1])
            step.update()
        timed, waits, moments = [], [], [Moment(device)]
        for _ in range(options.steps):
            start = time.perf_counter()
            window, on_device = next(source)
            waits.append(time.perf_counter() - start)
            step.forward_backward(on_device)
            step.update()
            source.fetch()
            moments.append(Moment(device))
            timed.append(window[0])
        moments[-1].wait()
        loss = float(step.losses.sum())  # of all ranks
        peak_bytes = machine.peak_bytes()
        parts = split(step, source, options.steps, device)
    step.engine.destroy()
    if not math.isfinite(loss):
        raise UserError(f"the loss is {loss} after {options.warmup + options.steps} steps: there is nothing to time.")
    work = torch.tensor([[batch.n_cells, int(batch.lengths.sum()),
                          step_flops(shape, batch.lengths.numpy(), len(batch.masked), len(batch.query_genes))]
                         for batch in timed], dtype=torch.float64)
    dist.all_reduce(work)
    seconds = [after.seconds_since(before) for before, after in itertools.pairwise(moments)]
    return {**rates(work.numpy(), seconds), "loss": loss, "peak_bytes": largest(peak_bytes),
            "wait_share": sum(waits) / sum(seconds), **parts}


def split(step: ScbenchStep, source: Windows, steps: int, device: torch.device) -> dict[str, dict[str, float]]:
    """Seconds of each part of further steps. Communication is part of backward and optimizer."""
    seconds: dict[str, list[float]] = {part: [] for part in PARTS}
    module = step.engine.module
    forward, module.forward = module.forward, (clock := Clock(device)).around(module.forward)
    with CollectiveClock(device) as communication:
        for _ in range(steps):
            clock.seconds = communication.seconds = 0.0
            moments = [machine.clock(device)]
            _, on_device = next(source)
            moments.append(machine.clock(device))
            step.forward_backward(on_device)
            moments.append(machine.clock(device))
            step.update()
            moments.append(machine.clock(device))
            data, both, optimizer = np.diff(moments).tolist()
            values = (data, clock.seconds, both - clock.seconds, optimizer, communication.seconds)
            for part, value in zip(PARTS, values, strict=True):
                seconds[part].append(value)
    module.forward = forward
    return {f"{part}_seconds": percentiles(values) for part, values in seconds.items()}


def embed(options: Options, vocabulary: Vocabulary, precision: str) -> dict:
    """What embedding EMBEDDED_BATCHES batches takes; a step is a round over all of them."""
    machine.forget_peak()
    device, shape = machine.device(), options.model(vocabulary.size)
    keep_freed_memory()
    model = ExpressionModel(shape, vocabulary, options.seed).to(device, torch.bfloat16 if precision == "bf16" else None)
    cells = cells_to_embed(options, vocabulary, EMBEDDED_BATCHES)
    hashes = content_hash(cells.genes, cells.counts, cells.offsets)
    model.encode = (clock := Clock(device)).around(model.encode)
    seconds, data, forward = [], [], []
    for number in range(options.warmup + options.steps):
        clock.seconds = 0.0
        start = machine.clock(device)
        encode(model, cells, hashes, draws=1, batch_cells=options.batch_cells)
        if number >= options.warmup:
            seconds.append(machine.clock(device) - start)
            forward.append(clock.seconds)
            data.append(seconds[-1] - clock.seconds)
    tokens = np.minimum(np.diff(cells.offsets), options.genes) + 1
    work = np.array([[len(tokens), tokens.sum(), forward_flops(shape, tokens, 0, 0)[0]]] * options.steps, dtype=float)
    return {**rates(work, seconds), "loss": None, "peak_bytes": machine.peak_bytes(), "wait_share": sum(data) / sum(seconds),
            "data_seconds": percentiles(data), "forward_seconds": percentiles(forward)}


def rates(work: np.ndarray, seconds: list[float]) -> dict:
    """Medians over steps of cells, tokens and FLOPs a second; `work` [steps, 3] counts them, of all ranks."""
    cells, tokens, flops = np.median(work / np.array(seconds)[:, None], axis=0).tolist()
    return {"cells_per_second": cells, "tokens_per_second": tokens, "flops_per_second": flops,
            "step_seconds": percentiles(seconds)}


def largest(peak_bytes: int | None) -> int | None:
    """The largest of all ranks' peaks."""
    shared = torch.tensor([peak_bytes or 0], device=engines.device())
    dist.all_reduce(shared, dist.ReduceOp.MAX)
    return int(shared) or None


def joint_peak() -> tuple[float, tuple[int, int, int]]:
    """The best matrix rate of all ranks together, all at once, and the shape (of rank 0)."""
    dist.barrier()
    peak = machine.matrix_peak(engines.device())
    total = torch.tensor([peak.flops_per_second], dtype=torch.float64, device=engines.device())
    dist.all_reduce(total)
    return float(total), peak.shape


def measure(options: ThroughputOptions) -> list[dict]:
    """A row a case; UserError for what cannot be timed."""
    rank, world = engines.start_process_group()
    tasks = [task for task in options.tasks if task == "training" or world == 1]
    peak = joint_peak()
    rows = []
    for case, task, precision in itertools.product(options.cases(), tasks, dict.fromkeys(options.precisions)):
        vocabulary = vocabulary_of(case)
        few = replace(case, batch_cells=min(CHECKED_CELLS, case.batch_cells))
        [batch] = load_batches(few, 1)[1] if task == "training" else batches_to_embed(few, vocabulary, 1)
        wrong = check_model(task, precision, case, vocabulary, batch)
        for deepspeed in dict.fromkeys(options.deepspeed) if task == "training" else (None,):
            row = {"implementation": "scbench", "structure": case.structure, "task": task, "status": wrong or "ok",
                   "cells_per_second": None, "mfu": None, "peak_bytes": None, "loss": None,
                   "settings": {**case.settings(), "precision": precision, "deepspeed": deepspeed, "ranks": world,
                                "dropout": DROPOUT if task == "training" else 0.0}}
            if wrong is None and task == "training":
                row |= train(case, vocabulary, precision, deepspeed, rank, world)
            elif wrong is None:
                row |= embed(case, vocabulary, precision)
            rows.append(row)
    set_peak(rows, max(peak, joint_peak()))
    return rows


def set_peak(rows: list[dict], peak: tuple[float, tuple[int, int, int]]) -> None:
    """Now that the machine's rate is known: MFU."""
    for row in rows:
        row["settings"] |= {"peak_flops_per_second": peak[0], "peak_shape": peak[1]}
        if row["status"] == "ok":
            row["mfu"] = row["flops_per_second"] / peak[0]


def report(rows: list[dict]) -> None:
    """Print the formula, the peak, the table and the failures."""
    print(formula([row["structure"] for row in rows]))
    settings = rows[0]["settings"]
    print(f"Peak here: {settings['peak_flops_per_second'] / 1e9:,.0f} GFLOP/s bf16, ranks: {settings['ranks']} "
          f"({' x '.join(map(str, settings['peak_shape']))})")
    lines = []
    for row in rows:
        s = row["settings"]
        name = [row["structure"], row["task"], s["precision"], s["deepspeed"] or "-",
                f"{s['layers']}x{s['width']}", str(s["genes"]), str(s["batch_cells"])]
        if row["status"] != "ok":
            lines.append([*name, "failed", *["-"] * (5 + len(PARTS))])
            continue
        timing = row["step_seconds"]
        parts = [row.get(f"{part}_seconds") for part in PARTS]
        whole = sum(part["median"] for part in parts[:4] if part)
        lines.append([
            *name, f"{row['cells_per_second']:,.2f}", f"{row['tokens_per_second']:,.0f}", f"{row['mfu']:.1%}",
            f"{timing['median']:.3f} ({timing['p20']:.3f}-{timing['p80']:.3f})", f"{row['wait_share']:.1%}",
            *("-" if part is None else f"{part['median'] / whole:.1%}" for part in parts),
            "not known" if row["peak_bytes"] is None else f"{row['peak_bytes'] / 1e9:.2f} GB",
        ])
    print_table(["structure", "task", "precision", "zero", "model", "genes", "batch", "cells/s", "tokens/s", "MFU",
                 "step s (p20-p80)", "wait", *PARTS, "peak memory"], lines)
    for row in rows:
        if row["status"] != "ok":
            print(f"{row['structure']}, {row['task']}: {row['status']}")


def main(arguments: list[str] | None = None) -> None:
    """Measure, print, write."""
    options = tyro.cli(ThroughputOptions, args=arguments, description=__doc__)
    rows = measure(options)
    if dist.get_rank() == 0:
        report(rows)
        if options.json is not None:
            write(options.json, rows, machine.describe(), IDENTITY)
        if options.plots is not None:
            speed_plots.plot_throughput(rows, options.plots)
    if dist.get_world_size() > 1:
        dist.barrier()
        sys.stdout.flush()
        os._exit(0)  # as scbench.cli.run: gloo's threads and Python's shutdown do not go together


if __name__ == "__main__":
    try:
        main()
    except UserError as error:
        print(f"throughput.py: {error}", file=sys.stderr)
        raise SystemExit(2) from None
