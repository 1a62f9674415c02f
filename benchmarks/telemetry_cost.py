"""What a run's telemetry costs a step: on the host, all of it, nothing of the model.

    python benchmarks/telemetry_cost.py [--json docs/results/telemetry/telemetry.json]

A window of 128 cells of 512 genes in four micro-batches, one rank. facts: tokens and FLOPs of the window; reduce: what carries
them to all ranks, with the wishes to stop; row: JSON, TensorBoard, the peak of memory; flush: both on the disk, as before a
checkpoint only. Median, 20th and 80th percentile of 200 steps.
"""

import argparse
import itertools
import tempfile
import time
from pathlib import Path

import machine
import record
import torch
from plan_worker import Case, synthetic_batch

from scbench.training import engine as engines
from scbench.training import step_facts
from scbench.training.engine import dist
from scbench.training.telemetry import Telemetry

STEPS, MICRO_BATCHES = 200, 4
VALUES = {"loss": 1.0, "regression_loss": 0.5, "mvc_loss": 0.5, "gradient_norm": 1.0, "lr": 1e-4, "wait_seconds": 0.0}


def measure(folder: Path) -> dict[str, list[float]]:
    """Seconds of each part of each step."""
    rank, world = engines.start_process_group()
    case = Case(structure="transformer", width=256, layers=6, heads=8, vocabulary_size=60_000, cells=32, genes=512)
    window = [synthetic_batch(case)] * MICRO_BATCHES
    model = case.config().model(case.vocabulary_size)
    telemetry = Telemetry(folder, 0, STEPS, case.cells * MICRO_BATCHES, 1e15, torch.device("cpu"))
    took: dict[str, list[float]] = {name: [] for name in ("facts", "reduce", "row", "flush")}
    for step in range(1, STEPS + 1):
        moments = [time.perf_counter()]
        shared = step_facts.facts(window, [0.0] * 3, model, rank, world)
        moments.append(time.perf_counter())
        dist.all_reduce(shared)
        _, work = step_facts.read(shared.tolist())
        moments.append(time.perf_counter())
        telemetry.step(step, VALUES | work, 0.1)
        moments.append(time.perf_counter())
        telemetry.flush()
        moments.append(time.perf_counter())
        for seconds, (start, end) in zip(took.values(), itertools.pairwise(moments), strict=True):
            seconds.append(end - start)
    telemetry.close()
    return took


def main() -> None:
    """Measure, print, write."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        took = measure(Path(folder))
    rows = [{"part": part, "seconds": record.percentiles(seconds), "settings": {"steps": STEPS}}
            for part, seconds in took.items()]
    record.print_table(["part", "ms", "20 %", "80 %"], [
        [row["part"], *(f"{row['seconds'][name] * 1e3:.3f}" for name in ("median", "p20", "p80"))] for row in rows])
    if options.json is not None:
        options.json.parent.mkdir(parents=True, exist_ok=True)
        record.write(options.json, rows, machine.describe(), ("part",))


if __name__ == "__main__":
    main()
