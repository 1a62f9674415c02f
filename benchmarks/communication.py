"""What the ranks of a run send each other in a step, counted call by call, beside what `scbench plan` predicts; and the time.

    python benchmarks/communication.py [--json docs/results/communication/communication.json] [--worlds 1 2 4]

A transformer, its micro-batch a rank the same at every stage and number of ranks, two micro-steps. Counted is every collective
that reaches torch.distributed between the start of forward and the end of the optimizer's step, so DeepSpeed's own norms and
flags too. One over a tensor of n bytes counts what a ring sends from each of W ranks: 2 (W - 1) / W n for an all-reduce,
(W - 1) / W n for a gather, a scatter, a reduce or a broadcast. The seconds are a CPU's and gloo's, over the loopback: compare
stages, not numbers of ranks where there are more of them than cores.
"""

import argparse
import dataclasses
import json
import os
import statistics
import sys
import time
from collections import Counter
from pathlib import Path

import machine
import record
import torch
from plan_check import in_ranks
from plan_worker import Case, synthetic_batch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from scbench.data.vocabulary import Vocabulary
from scbench.models.model import ExpressionModel
from scbench.training import engine as engines
from scbench.training.deepspeed_settings import read_deepspeed_config
from scbench.training.engine import dist
from scbench.training.plan_time import communicated_bytes
from scbench.training.pretrain import backward

STEPS, FIRST = 8, 3  # the first ones make buffers
MICRO_STEPS = 2
# which argument holds the whole tensor, if it isn't the first
WHOLE = {"_reduce_scatter_base_": 1, "reduce_scatter_": 1, "reduce_scatter_tensor_coalesced_": 1}


class Sent(TorchDispatchMode):
    """Calls of collectives, and the bytes of each kind that a rank sends."""

    def __init__(self, world: int) -> None:
        super().__init__()
        self.world, self.on = world, False
        self.calls, self.bytes = Counter(), Counter()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if self.on and function.namespace == "c10d":
            name = function.overloadpacket.__name__
            tensors = [x for x in tree_leaves(args[WHOLE.get(name, 0)]) if isinstance(x, torch.Tensor)]
            whole = sum(x.numel() * x.element_size() for x in tensors)
            self.calls[name] += 1
            self.bytes[name] += (2 if "allreduce" in name else 1) * (self.world - 1) / self.world * whole
        return function(*args, **(kwargs or {}))


def cases(worlds: list[int], width: int, vocabulary_size: int) -> list[Case]:
    """Every stage, precision and number of ranks."""
    shape = {"width": width, "layers": 4, "vocabulary_size": vocabulary_size, "cells": 4, "genes": 127}
    return [Case(structure="transformer", **shape, stage=stage, precision=precision, world=world, micro_steps=MICRO_STEPS)
            for world in worlds for precision in ("bf16", "fp32") for stage in range(4)]


def measure(case: Case) -> dict:
    """The counts of one step, and its median seconds; of this rank."""
    config, batch = case.config(), synthetic_batch(case)
    vocabulary = Vocabulary.build(f"gene-{i:06d}" for i in range(case.vocabulary_size - 3))
    model = ExpressionModel(config.model(case.vocabulary_size), vocabulary)
    parameters = sum(p.numel() for p in model.parameters())
    settings, _ = read_deepspeed_config(config, case.micro_steps)
    engine = engines.make_engine(model, config, settings)
    engine.train()
    engines.set_learning_rate(engine, 1e-4)
    denominator = batch.denominator * case.world * case.micro_steps
    seconds, sent = [], Sent(case.world)
    with sent:
        for step in range(STEPS):
            sent.on = step >= FIRST
            start = time.perf_counter()
            backward(engine, [batch] * case.micro_steps, denominator)
            engine.step()
            seconds.append(time.perf_counter() - start)
    engine.destroy()
    counted = STEPS - FIRST
    return {"parameters": parameters, "seconds": statistics.median(seconds[FIRST:]),
            "calls": {name: calls / counted for name, calls in sent.calls.items()},
            "bytes": {name: round(sent.bytes[name] / counted) for name in sent.bytes}}


def work(task: Path, out: Path) -> None:
    """One rank."""
    torch.set_num_threads(1)
    rank, _ = engines.start_process_group()
    rows = [measure(Case(**fields)) for fields in json.loads(task.read_text())]
    if rank == 0:
        out.write_text(json.dumps(rows))
    dist.barrier()
    os._exit(0)  # as scbench.cli.run: gloo's threads and Python's shutdown do not go together


def row_of(case: Case, found: dict) -> dict:
    """One row of the table."""
    predicted = communicated_bytes(found["parameters"], case.precision, case.stage, case.world, case.micro_steps)
    return {"stage": case.stage, "precision": case.precision, "world": case.world, "parameters": found["parameters"],
            "sent_bytes": sum(found["bytes"].values()), "predicted_bytes": round(predicted), "calls": found["calls"],
            "bytes": found["bytes"], "seconds": found["seconds"], "settings": dataclasses.asdict(case)}


def table(rows: list[dict]) -> str:
    """The table of docs/training.md: one line a stage, precision and number of ranks."""
    columns = ["stage", "precision", "ranks", "sent by a rank, MB", "predicted, MB", "calls", "seconds"]
    lines = [["---"] * len(columns)]
    for row in rows:
        sent, predicted = (f"{row[name] / 1e6:.2f}" for name in ("sent_bytes", "predicted_bytes"))
        lines.append([f"zero{row['stage']}", row["precision"], str(row["world"]), sent, predicted,
                      f"{sum(row['calls'].values()):.0f}", f"{row['seconds']:.3f}"])
    return "\n".join(f"| {' | '.join(line)} |" for line in [columns, *lines])


def main() -> None:
    """Count, print, write."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--json", type=Path)
    parser.add_argument("--worlds", type=int, nargs="+", default=[1, 2, 4])
    parser.add_argument("--width", type=int, default=128)
    parser.add_argument("--vocabulary-size", type=int, default=20_000)
    options = parser.parse_args()
    rows = []
    for world in options.worlds:
        listed = cases([world], options.width, options.vocabulary_size)
        rows += [row_of(case, found) for case, found in zip(listed, in_ranks(Path(__file__), listed, world), strict=True)]
    print(table(rows))
    if options.json is not None:
        options.json.parent.mkdir(parents=True, exist_ok=True)
        record.write(options.json, rows, machine.describe(), ("stage", "precision", "world"))


if __name__ == "__main__":
    if "RANK" in os.environ:  # started by `in_ranks`
        work(*map(Path, sys.argv[1:]))
    main()
