"""The memory that `scbench plan` predicts beside the memory that training steps take on this CPU.

    python benchmarks/plan_check.py [--json docs/results/plan/memory.json] [--worlds 1 2]

Every structure at two sizes, and every stage with one rank and two: the peak of everything that torch allocates in a step
(plan_worker.py), over the prediction. A ratio over 1: more was taken than predicted. `activation_share` is what part of the
prediction follows the micro-batch; the rest are states.
"""

import argparse
import dataclasses
import itertools
import json
import os
import socket
import subprocess
import sys
import tempfile
from pathlib import Path

import machine
import record
from plan_worker import MASK_RATIO, Case, synthetic_batch

from scbench.config import STRUCTURES
from scbench.training.plan_memory import Micro, memory_of

WORKER = Path(__file__).with_name("plan_worker.py")
SIZES = {  # structure by structure, under zero1
    "small": {"width": 64, "layers": 2, "cells": 8, "genes": 127},
    "wide": {"width": 128, "layers": 4, "cells": 4, "genes": 255},
}
STAGE_SIZES = {  # stage by stage, of the transformer
    "activations": {"width": 64, "layers": 4, "cells": 16, "genes": 127},
    "states": {"width": 128, "layers": 2, "cells": 2, "genes": 31, "vocabulary_size": 30_000},
}


def cases(world: int) -> list[tuple[str, Case]]:
    """(name of the size, case): structures, precisions and sizes; then stages."""
    found = []
    if world == 1:
        for structure, precision, (size, shape) in itertools.product(STRUCTURES, ("bf16", "fp32"), SIZES.items()):
            found.append((size, Case(structure=structure, precision=precision, **shape)))
    for stage, precision, (size, shape) in itertools.product(range(4), ("bf16", "fp32"), STAGE_SIZES.items()):
        found.append((size, Case(structure="transformer", precision=precision, stage=stage, world=world, **shape)))
    return found


def in_ranks(script: Path, listed: list[Case], world: int) -> list[dict]:
    """What rank 0 of `script SETTINGS.json OUT.json` writes of the cases, one process a rank."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    with tempfile.TemporaryDirectory() as folder:
        settings, out = Path(folder, "settings.json"), Path(folder, "out.json")
        settings.write_text(json.dumps([dataclasses.asdict(case) for case in listed]))
        address = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "WORLD_SIZE": str(world), "OMP_NUM_THREADS": "1"}
        ranks = []
        for rank in map(str, range(world)):
            environment = {**os.environ, **address, "RANK": rank, "LOCAL_RANK": rank}
            ranks.append(subprocess.Popen([sys.executable, script, settings, out], env=environment, stderr=subprocess.DEVNULL))
        if sum(process.wait() for process in ranks):
            raise SystemExit("a rank failed")
        return json.loads(out.read_text())


def row_of(size: str, case: Case, taken: dict) -> dict:
    """One row of the table."""
    batch, config = synthetic_batch(case), case.config()
    micro = Micro(case.cells, case.cells * (case.genes + 1), case.genes + 1, len(batch.masked), len(batch.query_genes))
    memory = memory_of(config.model(case.vocabulary_size), case.precision, f"zero{case.stage}", case.world, micro,
                       case.micro_steps, cpu=True)
    peak = max(taken["peak_gradients"], taken["peak_update"])
    return {"size": size, "structure": case.structure, "precision": case.precision, "stage": case.stage, "world": case.world,
            "predicted_bytes": round(memory.peak), "measured_bytes": peak, "ratio": round(peak / memory.peak, 3),
            "activation_share": round(memory.activations / memory.peak, 3), "parameters": taken["parameters"],
            "settings": dataclasses.asdict(case) | {"mask_ratio": MASK_RATIO}}


def main() -> None:
    """Measure, print, write."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--json", type=Path)
    parser.add_argument("--worlds", type=int, nargs="+", default=[1, 2])
    options = parser.parse_args()
    rows = []
    for world in options.worlds:
        listed = cases(world)
        for (size, case), found in zip(listed, in_ranks(WORKER, [case for _, case in listed], world), strict=True):
            rows.append(row_of(size, case, found["measured"]))
    columns = ["structure", "size", "precision", "stage", "world", "predicted_bytes", "measured_bytes", "ratio",
               "activation_share"]
    record.print_table(columns, [[str(row[name]) for name in columns] for row in rows])
    ratios = sorted(row["ratio"] for row in rows)
    print(f"measured over predicted: {ratios[0]} to {ratios[-1]}, median {ratios[len(ratios) // 2]}")
    if options.json is not None:
        options.json.parent.mkdir(parents=True, exist_ok=True)
        record.write(options.json, rows, machine.describe(), ("size", "structure", "precision", "stage", "world"))


if __name__ == "__main__":
    main()
