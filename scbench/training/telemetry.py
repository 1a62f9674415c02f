"""What a run says of itself: metrics.jsonl, TensorBoard, a progress bar, environment.json."""

import json
import math
import os
import platform
import sys
from importlib.metadata import version
from pathlib import Path

import torch

from scbench import __version__
from scbench.files import write_text
from scbench.training.hardware import peak_memory


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


OF_THE_MACHINE = ("cells_per_second", "tokens_per_second", "mfu", "wait_share", "peak_memory_bytes")  # no part of the result


class Telemetry:
    """The metrics of a run; used by rank 0 only.

    A step's row: loss, regression_loss, mvc_loss, gradient_norm (before clipping), lr; tokens, of all ranks, and
    token_imbalance, the busiest rank's over the mean rank's; cells_per_second, tokens_per_second; mfu; wait_share, the part of
    the step's time in which rank 0 waited for data; peak_memory_bytes of rank 0.

        mfu = FLOPs that training needs for the step's cells (models/flops.py) / (seconds × ranks × peak of a device)

    Parameters
    ----------
    run
        The run directory.
    start_step
        Steps done before: rows of later steps, left by a run that was killed, are cut off.
    steps, batch_cells
        Of the whole run.
    peak
        FLOP/s of all devices together at best, or None.
    device
        Of rank 0.
    """

    def __init__(self, run: Path, start_step: int, steps: int, batch_cells: int, peak: float | None,
                 device: torch.device):
        from torch.utils.tensorboard import SummaryWriter

        self.path = run / "metrics.jsonl"
        rows = self.path.read_text(encoding="utf-8").splitlines() if self.path.is_file() else []
        rows = [row for row in rows if _step(row) <= start_step]
        write_text(self.path, "".join(f"{row}\n" for row in rows))
        self.validated_at_start = any(_step(row) == start_step and "validation_loss" in row for row in rows[-2:])
        """Whether the validation after `start_step` steps is on record."""
        self.file = open(self.path, "a", encoding="utf-8")  # noqa: SIM115 - open for the life of the run
        self.tensorboard = SummaryWriter(str(run / "tensorboard"), purge_step=start_step + 1)
        self.batch_cells, self.peak, self.device = batch_cells, peak, device
        self.progress = _progress(steps, start_step)

    def step(self, step: int, row: dict[str, float], seconds: float) -> None:
        """Record one optimizer step (counted from 1), which took so long."""
        row = dict(row)
        flops = row.pop("teraflops") * 1e12
        row["wait_share"] = min(1.0, row.pop("wait_seconds") / seconds)
        row["cells_per_second"] = self.batch_cells / seconds
        row["tokens_per_second"] = row["tokens"] / seconds
        row["mfu"] = flops / (seconds * self.peak) if self.peak else math.nan
        row["peak_memory_bytes"] = peak_memory(self.device) or math.nan
        self._write(step, row)
        if self.progress:
            bar, task = self.progress
            bar.update(task, completed=step, loss=f"{row['loss']:.3f}", speed=f"{row['cells_per_second']:,.0f} cells/s")

    def validation(self, step: int, result: dict[str, float]) -> None:
        """Record a validation after `step` steps."""
        self._write(step, {f"validation_{name}": value for name, value in result.items()})

    def _write(self, step: int, row: dict[str, float]) -> None:
        clean = {k: v if math.isfinite(v) else None for k, v in row.items()}  # JSON has no NaN
        self.file.write(json.dumps({"step": step, **clean}) + "\n")
        self.file.flush()
        for name, value in row.items():
            if math.isfinite(value):
                self.tensorboard.add_scalar(name, value, step)

    def flush(self) -> None:
        """Put what was recorded on the disk: before a checkpoint, lest a run that goes on from it has a gap."""
        os.fsync(self.file.fileno())
        self.tensorboard.flush()

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
