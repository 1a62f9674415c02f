"""Does bf16 train as fp32 does? Loss curves of the same runs in both, against what another seed changes; and their memory.

    python benchmarks/precision.py CELLS.h5ad --json precision.json --plots pictures
    python benchmarks/precision.py --store STORE --structures cnn mamba --width 64 --layers 2

Every run is scbench's own pretraining (DeepSpeed and all) in a fresh process. A seed decides weights, dropout, the order of
the cells, and which genes are drawn and masked; both precisions have the same. Only in validation every run sees the same
genes and masks, those of seed 0: else the spread between seeds would hold that of the masks too, and forgive bf16 more.

spread      of fp32's validation losses: the standard deviation between seeds
difference  bf16's validation loss less fp32's, seed by seed: its mean, and at the end its 95 % t-interval
verdict     within seed noise: at every validation after the learning rate's warm-up the mean difference is less than the
            spread. Else bf16 is worse (somewhere higher by the spread or more; the exit code is 1 then), or better.
growth      the most memory that the process has held (on a GPU: that was allocated there), at the end less at the first
            validation after warm-up
"""

import contextlib
import itertools
import json
import math
import multiprocessing
import os
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

import machine
import numpy as np
import tyro
from options import Structure
from precision_plots import plot_precision
from record import print_table, write
from scipy.stats import t
from tyro.conf import Positional

from scbench import Store, prepare
from scbench.config import PretrainConfig
from scbench.errors import UserError

PRECISIONS = ("fp32", "bf16")
VALIDATIONS = 10
SPLIT = (0.9, 0.1, 0.0)  # training, validation, test
IDENTITY = ("implementation", "structure", "status", "precision", "seed")


@dataclass(frozen=True, kw_only=True)
class PrecisionOptions:
    """Compare training in bf16 and in fp32."""

    cells: Positional[Path | None] = None
    """An h5ad file with raw counts in X; a tenth of its cells validate."""
    store: Path | None = None
    """Take this store instead."""
    structures: tuple[Structure, ...] = ("transformer",)
    """Which encoders."""
    width: int = 128
    layers: int = 3
    heads: int = 8
    """Attention heads (transformer only)."""
    genes: int = 128
    """Genes a cell at most."""
    batch_cells: int = 32
    """Cells a step."""
    lr: float = 1e-3
    """Peak learning rate; the first tenth of the steps warms it up."""
    steps: int = 300
    """Steps of a run; every tenth part of them ends with a validation."""
    seeds: int = 5
    """Runs in each precision."""
    json: Path | None = None
    """File for the rows; a long CSV is written beside it."""
    plots: Path | None = None
    """Folder for a picture of each structure."""

    def __post_init__(self) -> None:
        if (self.cells is None) == (self.store is None):
            raise UserError("give the cells as an h5ad file or as --store, one of the two.")
        if self.seeds < 2 or self.steps < 2 * VALIDATIONS:
            raise UserError(f"--seeds is {self.seeds} and --steps {self.steps}: at least 2 and {2 * VALIDATIONS} are needed.")
        if not self.structures:
            raise UserError("--structures: name one or more.")
        if self.json is not None and self.json.suffix == ".csv":
            raise UserError(f"--json {self.json} would be overwritten by the CSV beside it: name it .json.")
        for structure in self.structures:
            PretrainConfig(store=Path("store"), output=Path("run"), **self.training(structure, "bf16", 0))  # its own checks

    def training(self, structure: str, precision: str, seed: int) -> dict:
        """Options of a run."""
        return {"structure": structure, "width": self.width, "layers": self.layers, "heads": self.heads,
                "max_genes": self.genes, "batch_cells": self.batch_cells, "lr": self.lr, "steps": self.steps,
                "validate_every": self.steps // VALIDATIONS, "precision": precision, "seed": seed}


def train(store: Path, output: Path, log: Path, options: dict) -> None:
    """A run, in a process of its own; what it says goes to `log`."""
    from scbench.training import pretrain

    with open(log, "w") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    validate = pretrain.validate
    pretrain.validate = lambda *arguments, **named: validate(*arguments, **{**named, "seed": 0})
    pretrain.pretrain(store, output, **options)


def run(store: Path, options: dict) -> dict:
    """What a run gives: its status, and by the step of a validation its losses and the peak of its memory so far."""
    with tempfile.TemporaryDirectory(prefix="precision-") as name:
        output, log = Path(name, "run"), Path(name, "log")
        process = multiprocessing.get_context("spawn").Process(target=train, args=(store, output, log, options))
        process.start()
        process.join()
        if process.exitcode:
            said = log.read_text().splitlines() if log.is_file() else []
            return {"status": f"failed: {next((line for line in reversed(said) if line), f'exit code {process.exitcode}')}"}
        rows = [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]
    validations = {row["step"]: row["validation_loss"] for row in rows if "validation_loss" in row}
    steps = {row["step"]: row for row in rows if "loss" in row}
    parts = itertools.pairwise([0, *validations])
    return {
        "status": "ok", "validation_loss": validations,
        "training_loss": {stop: float(np.mean([steps[step]["loss"] for step in range(start + 1, stop + 1)]))
                          for start, stop in parts},
        "peak_bytes": {step: steps[step]["peak_memory_bytes"] for step in validations},
    }


def compare(steps: np.ndarray, fp32: np.ndarray, bf16: np.ndarray, warmup: int) -> dict:
    """What is said of a structure.

    Parameters
    ----------
    steps
        int [V], of the validations.
    fp32, bf16
        float [seeds, V]: validation losses; the same seeds in the same order.
    warmup
        Validations up to this step do not count for the verdict.
    """
    differences = bf16 - fp32
    mean, spread = differences.mean(0), fp32.std(0, ddof=1)
    counted = steps > warmup
    units = (mean / spread)[counted]
    half = t.ppf(0.975, len(fp32) - 1) * differences[:, -1].std(ddof=1) / math.sqrt(len(fp32))
    largest = int(np.abs(units).argmax())
    verdict = "within seed noise"
    if (np.abs(units) >= 1).any():
        verdict = "bf16 is worse" if (units >= 1).any() else "bf16 is better"
    return {
        "verdict": verdict, "largest_difference_in_spreads": float(units[largest]),
        "largest_difference_step": int(steps[counted][largest]),
        "end": {"fp32": float(fp32[:, -1].mean()), "bf16": float(bf16[:, -1].mean()), "difference": float(mean[-1]),
                "difference_low": float(mean[-1] - half), "difference_high": float(mean[-1] + half),
                "spread": float(spread[-1])},
        "mean_difference": dict(zip(steps.tolist(), mean.tolist(), strict=True)),
        "spread": dict(zip(steps.tolist(), spread.tolist(), strict=True)),
    }


def growth(peaks: dict[int, int | None], warmup: int) -> int | None:
    """Bytes that a run needed more after the first validation after warm-up than until then; None if they are not known."""
    first, last = next(step for step in peaks if step > warmup), max(peaks)
    return None if peaks[first] is None else peaks[last] - peaks[first]


def measure(options: PrecisionOptions, store: Path) -> list[dict]:
    """A row a run, and one a structure (precision "difference")."""
    warmup, cells = options.steps // 10, Store.open(store).split("train").n_cells
    rows = []
    for structure in dict.fromkeys(options.structures):
        runs: dict[str, list[dict]] = {precision: [] for precision in PRECISIONS}
        settings = {**options.training(structure, "", 0), "warmup_steps": warmup, "seeds": options.seeds, "cells": cells,
                    "data": (options.cells or options.store).name}
        settings = {name: value for name, value in settings.items() if name not in ("structure", "precision", "seed")}
        same = {"implementation": "scbench", "structure": structure, "settings": settings}
        for seed in range(options.seeds):
            for precision in PRECISIONS:
                found = run(store, options.training(structure, precision, seed))
                if found["status"] == "ok":
                    found["growth_bytes"] = growth(found["peak_bytes"], warmup)
                runs[precision].append(found)
                rows.append({**same, "precision": precision, "seed": seed, **found})
                print(f"{structure}, {precision}, seed {seed}: {found['status']}", file=sys.stderr)
        whole = {**same, "precision": "difference", "seed": None, "status": "ok"}
        if all(found["status"] == "ok" for found in (*runs["fp32"], *runs["bf16"])):
            steps = np.array(list(runs["fp32"][0]["validation_loss"]))
            curves = [np.array([list(found["validation_loss"].values()) for found in runs[name]]) for name in PRECISIONS]
            rows.append({**whole, **compare(steps, *curves, warmup)})
        else:
            rows.append({**whole, "status": "failed: not all runs ended well"})
    return rows


def print_rows(rows: list[dict]) -> None:
    """A table of the runs' memory and one of the verdicts."""
    lines = []
    for row in rows:
        if row["status"] != "ok" or row["precision"] == "difference":
            continue
        losses, peaks, grown = row["validation_loss"], row["peak_bytes"], row["growth_bytes"]
        last = max(losses)
        lines.append([row["structure"], row["precision"], str(row["seed"]),
                      f"{losses[min(losses)]:.4f}", f"{losses[last]:.4f}",
                      "" if peaks[last] is None else f"{peaks[last] / 1e6:,.0f}",
                      "" if grown is None else f"{grown / 1e6:+.1f}"])
    print_table(["structure", "precision", "seed", "first loss", "last loss", "peak MB", "growth"], lines)
    print()
    print_table(["structure", "fp32", "bf16", "difference", "95 %", "spread", "largest, in spreads", "verdict"], [
        [row["structure"], f"{row['end']['fp32']:.4f}", f"{row['end']['bf16']:.4f}", f"{row['end']['difference']:+.5f}",
         f"{row['end']['difference_low']:+.5f} to {row['end']['difference_high']:+.5f}", f"{row['end']['spread']:.5f}",
         f"{row['largest_difference_in_spreads']:+.2f} at {row['largest_difference_step']}", row["verdict"]]
        for row in rows if row["precision"] == "difference" and row["status"] == "ok"])


def main(arguments: list[str] | None = None) -> int:
    """Run, print, write, draw; the exit code."""
    options = tyro.cli(PrecisionOptions, args=arguments, description=__doc__)
    with contextlib.ExitStack() as stack:
        store = options.store
        if options.cells is not None:
            store = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="precision-")), "store")
            prepare(options.cells, store, split=SPLIT, workers=1)
        if not Store.open(store).split("validation").n_cells:
            raise UserError(f"the store {store} has no validation cells: prepare it with a larger validation share.")
        rows = measure(options, store)
    print_rows(rows)
    if options.json is not None:
        options.json.parent.mkdir(parents=True, exist_ok=True)
        write(options.json, rows, machine.describe(), IDENTITY)
    if options.plots is not None:
        plot_precision(rows, options.plots)
    wrong = [row for row in rows if row["status"] != "ok" or row.get("verdict") == "bf16 is worse"]
    return 1 if wrong else 0


if __name__ == "__main__":
    try:
        raise SystemExit(main())
    except UserError as error:
        print(f"precision.py: {error}", file=sys.stderr)
        raise SystemExit(2) from None
