"""What a training step on a CPU spends its time on, operation by operation, as torch's profiler sees it.

    python benchmarks/step_profile.py --json profile.json --plots plots   # all structures, 513 tokens, 6 layers x 256

The step of `scbench pretrain` (DeepSpeed engine, dropout, clipping) on synthetic cells. Every operation's own time goes to

    products     matrix products, convolutions, attention and the scan, in forward and backward, our own C included
    passes       all else that the model does: norms, GELU, dropout, embedding, losses, additions, copies
    parameters   gradients on their way to the optimizer: DeepSpeed's copies, norm, clipping, and AdamW
    between      no operation: Python

`of peak` is the FLOPs that the step needs over products' time and the machine's matrix rate: what is left to gain there. The
profiler itself costs time, mostly in `between`; throughput.py has the steps without it. Numbers are medians over the steps.
"""

import sys
from collections import Counter
from dataclasses import dataclass
from itertools import islice
from statistics import median
from typing import Literal

import machine
import torch
import tyro
from cells import synthetic_batch, vocabulary_of
from flops import formula, step_flops
from implementations import DEEPSPEED, DROPOUT
from options import Options, Sweep
from ours import ScbenchStep
from record import percentiles, print_table, write
from speed_plots import plot_profile
from torch.autograd.profiler_util import FunctionEvent
from torch.profiler import ProfilerActivity, profile, record_function, schedule

from scbench.errors import UserError
from scbench.models.model import ExpressionModel

PRODUCTS = {
    "aten::mm", "aten::addmm", "aten::bmm", "aten::baddbmm", "mkldnn::_linear_pointwise", "aten::mkldnn_convolution",
    "aten::convolution_backward", "CpuSelfAttention", "CpuAttention", "CpuConvolutionPool", "CpuSelectiveScan",
}  # fmt: skip
FORWARD, NODE, LEAF = "forward", "autograd::engine::evaluate_function: ", "torch::autograd::AccumulateGrad"
STEP = "step"
PARTS = ("products", "passes", "parameters", "between")
NAMED = 8  # operations
# Bytes that the process has touched and keeps. The profiler's own small blocks split freed large ones, so that without this
# every step would ask the system for pages anew: a quarter of a step, of which a run without the profiler has nothing.
RESERVE = 2_000_000_000


@dataclass(frozen=True, kw_only=True)
class ProfileOptions(Sweep):
    """Profile scbench's training steps on a CPU."""

    tasks: tuple[Literal["training"], ...] = ("training",)
    """Training steps only."""


def part_of(event: FunctionEvent) -> str:
    """Where an operation's own time belongs."""
    if event.name in (STEP, FORWARD):
        return "between"
    name, model = event.name.removesuffix("Backward"), False
    while event is not None and not model:
        model = event.name == FORWARD or (event.name.startswith(NODE) and LEAF not in event.name)
        event = event.cpu_parent
    if not model:
        return "parameters"
    return "products" if name in PRODUCTS else "passes"


def measure(options: Options) -> dict:
    """Seconds a step of each part, and of the longest operations."""
    vocabulary = vocabulary_of(options)
    config = options.training(precision="bf16", deepspeed=DEEPSPEED, dropout=DROPOUT)
    shape = config.model(vocabulary.size)
    step = ScbenchStep(ExpressionModel(shape, vocabulary, options.seed), config)
    batch = synthetic_batch(options, vocabulary, 0)
    window, module = step.prepare(batch), step.engine.module
    torch.ones(RESERVE, dtype=torch.uint8)
    module.forward = record_function(FORWARD)(module.forward)
    with profile(activities=[ProfilerActivity.CPU], schedule=schedule(wait=0, warmup=options.warmup, active=options.steps),
                 acc_events=True) as profiler:
        for _ in range(options.warmup + options.steps):
            with record_function(STEP):
                step.forward_backward(window)
                step.update()
            profiler.step()
    step.engine.destroy()
    steps = [step_of(event) for event in profiler.events() if event.name == STEP]
    needed = step_flops(shape, batch.lengths.numpy(), len(batch.masked), len(batch.query_genes))
    return {"needed_flops": needed, "step_seconds": percentiles([sum(parts.values()) for parts, _ in steps]),
            "seconds_of": medians([parts for parts, _ in steps]),
            "longest_seconds": dict(islice(medians([operations for _, operations in steps]).items(), NAMED))}


def step_of(step: FunctionEvent) -> tuple[dict[str, float], dict[str, float]]:
    """Own seconds of a step's parts, and of its operations by name."""
    parts, operations = dict.fromkeys(PARTS, 0.0), Counter()
    events = [step]
    while events:
        event = events.pop()
        events += event.cpu_children
        seconds = event.self_cpu_time_total / 1e6
        parts[part_of(event)] += seconds
        operations[event.name] += seconds
    return parts, operations


def medians(steps: list[dict[str, float]]) -> dict[str, float]:
    """Of each name over the steps, the largest first."""
    found = {name: median(values.get(name, 0.0) for values in steps) for name in set().union(*steps)}
    return dict(sorted(found.items(), key=lambda item: -item[1]))


def profiles(options: ProfileOptions) -> list[dict]:
    """A row a case."""
    if torch.cuda.is_available():
        raise UserError("this profile is of a CPU's steps: hide the GPU with CUDA_VISIBLE_DEVICES=.")
    peak = machine.matrix_peak(machine.device())
    rows = []
    for case in options.cases():
        rows.append({"implementation": "scbench", "structure": case.structure, "status": "ok", **measure(case), "settings": {
            **case.settings(), "precision": "bf16", "deepspeed": DEEPSPEED, "ranks": 1, "dropout": DROPOUT}})
        print(f"{case.structure}: profiled", file=sys.stderr, flush=True)
    peak = max(peak, machine.matrix_peak(machine.device()))
    for row in rows:
        row["settings"] |= {"peak_flops_per_second": peak.flops_per_second, "peak_shape": peak.shape}
        row["products_of_peak"] = row["needed_flops"] / row["seconds_of"]["products"] / peak.flops_per_second
    return rows


def report(rows: list[dict]) -> None:
    """Print the formula and the table."""
    print(formula([row["structure"] for row in rows]))
    lines = []
    for row in rows:
        whole = sum(row["seconds_of"].values())
        lines.append([row["structure"], f"{1e3 * row['step_seconds']['median']:.0f}",
                      *(f"{row['seconds_of'][part] / whole:.1%}" for part in PARTS), f"{row['products_of_peak']:.1%}"])
    print_table(["structure", "step ms", *PARTS, "of peak"], lines)
    for row in rows:
        longest = ", ".join(f"{name} {1e3 * seconds:.1f}" for name, seconds in row["longest_seconds"].items())
        print(f"{row['structure']}: the longest operations, ms: {longest}")


def main(arguments: list[str] | None = None) -> None:
    """Profile, print, write, draw."""
    options = tyro.cli(ProfileOptions, args=arguments, description=__doc__)
    rows = profiles(options)
    report(rows)
    if options.json is not None:
        write(options.json, rows, machine.describe())
    if options.plots is not None:
        plot_profile(rows, options.plots)


if __name__ == "__main__":
    try:
        main()
    except UserError as error:
        print(f"step_profile.py: {error}", file=sys.stderr)
        raise SystemExit(2) from None
