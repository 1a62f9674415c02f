"""What a run says of itself: metrics.jsonl, TensorBoard, a progress bar, environment.json."""

import json
import math
import os
import platform
import sys
import time
from importlib.metadata import version
from pathlib import Path

import torch

from scbench import __version__
from scbench.files import write_text


def environment(world: int) -> dict:
    """Versions and hardware of a run."""
    packages = ("torch", "triton", "deepspeed", "numpy", "anndata", "tensorstore", "safetensors")
    cuda = torch.cuda.is_available()
    return {
        "scbench": __version__,
        "python": platform.python_version(),
        "platform": platform.platform(),
        "packages": {name: version(name) for name in packages if name != "triton" or sys.platform == "linux"},
        "device": torch.cuda.get_device_name() if cuda else platform.processor() or platform.machine(),
        "world_size": world,
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
    }


class Telemetry:
    """The metrics of a run; used by rank 0 only.

    Parameters
    ----------
    run
        The run directory.
    start_step
        Steps done before: rows of later steps, left by a run that was killed, are cut off.
    steps, batch_cells
        Of the whole run, for the progress bar.
    """

    def __init__(self, run: Path, start_step: int, steps: int, batch_cells: int):
        from torch.utils.tensorboard import SummaryWriter

        self.path = run / "metrics.jsonl"
        rows = self.path.read_text(encoding="utf-8").splitlines() if self.path.is_file() else []
        write_text(self.path, "".join(f"{row}\n" for row in rows if _step(row) <= start_step))
        self.file = open(self.path, "a", encoding="utf-8")  # noqa: SIM115 - open for the life of the run
        self.tensorboard = SummaryWriter(str(run / "tensorboard"), purge_step=start_step + 1)
        self.batch_cells = batch_cells
        self.last_time = time.monotonic()
        self.progress = _progress(steps, start_step)

    def step(self, step: int, row: dict[str, float]) -> None:
        """Record one optimizer step (counted from 1)."""
        now = time.monotonic()
        row = {**row, "cells_per_second": self.batch_cells / (now - self.last_time)}
        self.last_time = now
        self._write(step, row)
        if self.progress:
            bar, task = self.progress
            bar.update(task, completed=step, loss=f"{row['loss']:.3f}", speed=f"{row['cells_per_second']:,.0f} cells/s")

    def validation(self, step: int, result: dict[str, float]) -> None:
        """Record a validation after `step` steps."""
        self._write(step, {f"validation_{name}": value for name, value in result.items()})
        self.last_time = time.monotonic()

    def _write(self, step: int, row: dict[str, float]) -> None:
        clean = {k: v if math.isfinite(v) else None for k, v in row.items()}  # JSON has no NaN
        self.file.write(json.dumps({"step": step, **clean}) + "\n")
        self.file.flush()
        for name, value in row.items():
            self.tensorboard.add_scalar(name, value, step)

    def close(self) -> None:
        """Flush everything."""
        if self.progress:
            self.progress[0].stop()
        self.file.close()
        self.tensorboard.close()


def _step(row: str) -> float:
    try:
        return json.loads(row)["step"]
    except (ValueError, KeyError):
        return math.inf  # the half-written last row of a killed run


def _progress(steps: int, start_step: int):
    """(bar, task) on a terminal, None elsewhere."""
    if not sys.stderr.isatty():
        return None
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    bar = Progress(TextColumn("pretrain"), BarColumn(), MofNCompleteColumn(), TextColumn("loss {task.fields[loss]}"),
                   TextColumn("{task.fields[speed]}"), TimeRemainingColumn(), console=Console(stderr=True))
    task = bar.add_task("pretrain", total=steps, completed=start_step, loss="–", speed="")
    bar.start()
    return bar, task
