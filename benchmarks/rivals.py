"""scbench beside the reference's model and loop and good plain PyTorch, structure by structure: the ratios that matter.

    python benchmarks/rivals.py --json rivals.json --plots plots    # 513 tokens a cell, 6 layers x 256, batch 32
    python benchmarks/rivals.py --tasks embedding --store STORE     # cells of all lengths

reference       the reference's model and loop as they are (reference.py), fp32, its only mode
plain_padded    plain PyTorch (plain.py): padded to the longest cell, SDPA, bf16 autocast, fused AdamW
plain_bucketed  the same, a batch's cells in several rectangles of similar lengths
plain_matmul    the same with attention as two matrix products and a softmax (structures with attention)
plain_compiled  plain_padded through torch.compile (ask for it: compiling takes long)
scbench         ours, bf16

All get the same batches; scbench and the plain ones start from the same weights. First, without dropout, loss and gradient
norm of the first batch (or its embeddings) must agree with what check.py says is right, in fp32 and in the precision
that is timed: who fails gets no number. Then rounds: in each, every implementation works on the same batch, one after the
other, so that a busy machine is unfair to all alike. Ratios are of the seconds in one round. The reference's convolutions take
no odd number of tokens: for cnn and cnn_sorted all get one gene less where --genes is even.
"""

import os
import sys
from dataclasses import dataclass, replace

import machine
import memory
import numpy as np
import speed_plots
import tyro
from cells import batches_to_embed, load_batches, vocabulary_of
from check import EMBEDDING_TOLERANCE, TOLERANCE, check_all
from flops import formula, forward_flops, step_flops
from implementations import DROPOUT, Implementation, Name, build, initial_weights, precision_of
from options import Options, Sweep, Task
from record import percentiles, print_table, write

from scbench.config import ModelConfig
from scbench.data.batch import CellBatch
from scbench.errors import UserError

IDENTITY = ("implementation", "structure", "task", "status")


@dataclass(frozen=True, kw_only=True)
class RivalsOptions(Sweep):
    """Time implementations side by side; --steps are rounds."""

    implementations: tuple[Name, ...] = ("reference", "plain_padded", "plain_bucketed", "plain_matmul", "scbench")
    """Which ones."""


def measure(names: list[str], task: Task, options: Options) -> list[dict]:
    """A row an implementation of one case; peaks and ratios come later."""
    vocabulary = vocabulary_of(options)
    number = options.warmup + options.steps
    if task == "embedding":
        batches = batches_to_embed(options, vocabulary, number)
    else:
        batches = load_batches(options, number)[1]
    verdicts = check_all(names, task, options, vocabulary, batches[0])
    steps = {}
    for name in names:
        if verdicts[name][1] is None:
            weights = initial_weights(options, vocabulary, "aaai2025" if name == "reference" else "default")
            steps[name] = build(name, task, weights, options, vocabulary, precision=precision_of(name), dropout=DROPOUT,
                                device=machine.device())
    seconds = _rounds(steps, task, batches, options.warmup)
    steps.clear()
    config = options.model(vocabulary.size)
    work = np.array([_work(batch, config, task) for batch in batches[options.warmup :]], dtype=float)
    rows = []
    for name in names:
        result, wrong = verdicts[name]
        training = task == "training"
        row = {
            "implementation": name, "structure": options.structure, "task": task, "status": wrong or "ok",
            "cells_per_second": None, "mfu": None, "peak_bytes": None, "loss": result.loss,
            "settings": {**options.settings(), "precision": precision_of(name), "dropout": DROPOUT if training else 0.0,
                         "tolerance": TOLERANCE if training else EMBEDDING_TOLERANCE,
                         "peak_bytes": "of a process that runs only this, Python and torch included",
                         "loss": "of the first batch, without dropout"},
        }
        if wrong is None:
            row |= _speeds(work, np.array(seconds[name]), task) | {"peak_bytes": memory.measure(name, task, options)}
            if "scbench" in seconds:
                ratios = [theirs / ours for theirs, ours in zip(seconds[name], seconds["scbench"], strict=True)]
                row["scbench_ratio"] = percentiles(ratios)
        rows.append(row)
    return rows


def _speeds(work: np.ndarray, seconds: np.ndarray, task: Task) -> dict:
    """Cells, tokens and FLOPs a second of `work` [rounds, 3]: medians over training steps; embedded batches differ in length,
    so of all of them together."""
    both = work.sum(0) / seconds.sum() if task == "embedding" else np.median(work / seconds[:, None], axis=0)
    cells, tokens, flops = both.tolist()
    return {"cells_per_second": cells, "tokens_per_second": tokens, "flops_per_second": flops,
            "step_seconds": percentiles(seconds.tolist())}


def _rounds(steps: dict[str, Implementation], task: Task, batches: list[CellBatch], warmup: int) -> dict[str, list[float]]:
    """Seconds of each implementation on each batch after the first `warmup`."""
    device = machine.device()
    seconds = {name: [] for name in steps}
    for number, batch in enumerate(batches):
        for name, step in steps.items():
            prepared = step.prepare(batch)
            start = machine.clock(device)
            if task == "embedding":
                step.embed(prepared)
            else:
                step.forward_backward(prepared)
                step.update()
            if number >= warmup:
                seconds[name].append(machine.clock(device) - start)
    return seconds


def _work(batch: CellBatch, config: ModelConfig, task: Task) -> tuple[int, int, int]:
    """Cells, tokens and needed FLOPs of a batch."""
    lengths = batch.lengths.numpy()
    if task == "embedding":
        flops = forward_flops(config, lengths, 0, 0)[0]
    else:
        flops = step_flops(config, lengths, len(batch.masked), len(batch.query_genes))
    return batch.n_cells, int(lengths.sum()), flops


def case_for_all(case: Options) -> Options:
    """The case that the reference can take too."""
    if case.structure.startswith("cnn") and case.genes % 2 == 0:
        return replace(case, genes=case.genes - 1)
    return case


def measure_all(options: RivalsOptions) -> list[dict]:
    """Every case, structure by structure."""
    names = list(dict.fromkeys(options.implementations))
    device = machine.device()
    peak = machine.matrix_peak(device)
    rows = [row for case in options.cases() for task in dict.fromkeys(options.tasks)
            for row in measure(names, task, case_for_all(case))]
    peak = max(peak, machine.matrix_peak(device))
    for row in rows:
        row["settings"] |= {"peak_flops_per_second": peak.flops_per_second, "peak_shape": peak.shape}
        if row["status"] == "ok":
            row["mfu"] = row["flops_per_second"] / peak.flops_per_second
    return rows


def report(rows: list[dict]) -> None:
    """Print the formula, the peak, the table, and who has no number and why."""
    print(formula([row["structure"] for row in rows]))
    settings = rows[0]["settings"]
    shape = " x ".join(map(str, settings["peak_shape"]))
    print(f"Peak here: {settings['peak_flops_per_second'] / 1e9:,.0f} GFLOP/s bf16 ({shape})")
    lines = []
    for row in rows:
        s = row["settings"]
        name = [row["structure"], row["task"], row["implementation"], s["precision"], f"{s['layers']}x{s['width']}",
                str(s["genes"]), str(s["batch_cells"])]
        if row["status"] != "ok":
            lines.append([*name, row["status"].partition(":")[0], *["-"] * 5])
            continue
        timing, peak, ratio = row["step_seconds"], row["peak_bytes"], row.get("scbench_ratio")
        lines.append([
            *name, f"{row['cells_per_second']:,.2f}", f"{row['mfu']:.1%}",
            f"{timing['median']:.3f} ({timing['p20']:.3f}-{timing['p80']:.3f})",
            "not known" if peak is None else f"{peak / 1e9:.2f} GB", "-" if row["loss"] is None else f"{row['loss']:.5f}",
            "-" if ratio is None else f"{ratio['median']:.2f} ({ratio['p20']:.2f}-{ratio['p80']:.2f})",
        ])
    print_table(["structure", "task", "implementation", "precision", "model", "genes", "batch", "cells/s", "MFU",
                 "step s (p20-p80)", "peak memory", "loss", "scbench is x as fast"], lines)
    for row in rows:
        if row["status"] != "ok":
            print(f"{row['structure']}, {row['task']}, {row['implementation']}: {row['status']}")


def main(arguments: list[str] | None = None) -> None:
    """Measure, print, write."""
    options = tyro.cli(RivalsOptions, args=arguments, description=__doc__)
    rows = measure_all(options)
    report(rows)
    if options.json is not None:
        write(options.json, rows, machine.describe(), IDENTITY)
    if options.plots is not None:
        speed_plots.plot_rivals(rows, options.plots)


if __name__ == "__main__":
    for name in ("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "LRU_CACHE_CAPACITY"):  # of this process; read at the first product
        os.environ[name] = "1024"  # in turns, all of them together have more shapes than scbench's limit for one
    try:
        main()
    except UserError as error:
        print(f"rivals.py: {error}", file=sys.stderr)
        raise SystemExit(2) from None
