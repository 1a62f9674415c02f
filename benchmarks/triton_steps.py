"""A training run through the Triton kernels under their interpreter beside one through PyTorch: the losses must be the same.

    python benchmarks/triton_steps.py STORE --structure mamba --tokens 64 --width 64

Both are `scbench pretrain`, dropout on, fp32, SGD (Adam hides a wrong gradient). At the default size a step takes minutes, and
the same means to 1e-7, or to 1e-5 after a number has rounded to the other side of a ReLU's kink.
"""

import json
import os
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

import machine
import tyro
from record import print_table, write
from tyro.conf import Positional

from scbench.config.model import Structure

LOSSES = ("regression_loss", "mvc_loss")


@dataclass(frozen=True, kw_only=True)
class StepsOptions:
    """Train twice and compare."""

    store: Positional[Path]
    """A store made by `scbench prepare`."""
    structure: Structure = "transformer"
    """The encoder."""
    steps: int = 10
    """Optimizer steps."""
    cells: int = 2
    """Cells a step."""
    tokens: int = 513
    """Of a cell at most, <cls> included."""
    width: int = 256
    """Width of the model."""
    layers: int = 2
    """Encoder layers."""
    json: Path | None = None
    """File for the rows; a long CSV is written beside it."""


def train(options: StepsOptions, kernels: str, output: Path) -> list[dict]:
    """The steps' rows of metrics.jsonl."""
    words = [options.store, "-o", output, "--structure", options.structure, "--steps", options.steps, "--width", options.width,
             "--layers", options.layers, "--batch-cells", options.cells, "--max-genes", options.tokens - 1, "--lr", 0.01,
             "--warmup-steps", 0, "--optimizer", "sgd", "--precision", "fp32", "--validation-cells", options.cells]
    environment = {**os.environ, "SCBENCH_KERNELS": kernels, "TRITON_INTERPRET": "1"}  # of no meaning to PyTorch
    command = [sys.executable, "-m", "scbench", "pretrain", *map(str, words)]
    if code := subprocess.run(command, env=environment, stdout=subprocess.DEVNULL).returncode:
        raise SystemExit(code)  # it has said why
    rows = map(json.loads, (output / "metrics.jsonl").read_text(encoding="utf-8").splitlines())
    return [row for row in rows if "loss" in row]


def main() -> None:
    """Train, print, write."""
    options, runs = tyro.cli(StepsOptions, description=__doc__), {}
    with tempfile.TemporaryDirectory() as directory:
        for kernels in ("torch", "triton"):
            runs[kernels] = train(options, kernels, Path(directory) / kernels)
    rows = [{"structure": options.structure, "step": ours["step"], "tokens": ours["tokens"],
             **{f"{loss}_{kernels}": row[loss] for loss in LOSSES for kernels, row in (("torch", plain), ("triton", ours))},
             "difference": max(abs(ours[loss] - plain[loss]) / (plain[loss] or 1) for loss in LOSSES)}
            for plain, ours in zip(*runs.values(), strict=True)]
    columns = list(rows[0])[1:]
    print_table(columns, [[f"{row[name]:.9g}" for name in columns] for row in rows])
    print(f"{options.structure}: largest relative difference {max(row['difference'] for row in rows):.1e}")
    if options.json is not None:
        write(options.json, rows, machine.describe(), ("structure", "step"))


if __name__ == "__main__":
    main()
