"""The machine that a benchmark runs on: what it is, its matrix rate, its clock, a process's memory."""

import contextlib
import ctypes
import gc
import subprocess
import time
from pathlib import Path
from typing import NamedTuple

import torch

from scbench.training.telemetry import environment

PEAK_SHAPES = ((1024, 1024, 1024), (2048, 2048, 2048), (4096, 4096, 4096), (16384, 256, 256), (16384, 768, 256))
PEAK_REPEATS = 3


class Peak(NamedTuple):
    """The best bf16 matrix rate found."""

    flops_per_second: float
    shape: tuple[int, int, int]  # rows, inner, columns


def matrix_peak(device: torch.device) -> Peak:
    """The best bf16 rate over PEAK_SHAPES, each the fastest of PEAK_REPEATS products."""
    best = Peak(0.0, PEAK_SHAPES[0])
    for shape in PEAK_SHAPES:
        rows, inner, columns = shape
        left = torch.ones(rows, inner, dtype=torch.bfloat16, device=device)
        right = torch.ones(inner, columns, dtype=torch.bfloat16, device=device)
        out = left @ right
        for _ in range(PEAK_REPEATS):
            start = clock(device)
            torch.mm(left, right, out=out)
            best = max(best, Peak(2 * rows * inner * columns / (clock(device) - start), shape))
    return best


def clock(device: torch.device) -> float:
    """Seconds, once the device has done what it was asked."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


def device() -> torch.device:
    """The GPU if there is one, else the CPU."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def peak_bytes() -> int | None:
    """This process's peak, since `forget_peak` if that was called: of allocated GPU memory where there is a GPU, else of
    resident memory; None where neither is known.

    VmHWM, not getrusage: the latter starts from the parent's peak.
    """
    return torch.cuda.max_memory_allocated() if torch.cuda.is_available() else resident_bytes("VmHWM")


def forget_peak() -> None:
    """Let `peak_bytes` begin anew, at what is in use now; where the system cannot do it, a peak stays that of the process."""
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
        return
    gc.collect()
    with contextlib.suppress(AttributeError):  # glibc: memory that was freed and kept goes back
        ctypes.CDLL(None).malloc_trim(0)
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")


def resident_bytes(field: str = "VmRSS") -> int | None:
    """This process's resident memory now, or its peak ("VmHWM"); None where it is not known."""
    status = Path("/proc/self/status")
    if not status.is_file():
        return None
    return next(int(line.split()[1]) * 1024 for line in status.read_text().splitlines() if line.startswith(f"{field}:"))


def describe() -> dict[str, str | int]:
    """Revision, versions and hardware, flat: one column each in a CSV."""
    about = environment(world=1)
    packages = about.pop("packages")
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.is_file() else []
    processor = next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), about["device"])
    return {"revision": _revision(), **about, **packages, "processor": processor}


def _revision() -> str:
    """The commit of this checkout, "+" after it if tracked files differ; "unknown" without git."""
    def git(*arguments: str) -> str:
        here = Path(__file__).parent
        return subprocess.run(["git", *arguments], cwd=here, capture_output=True, text=True, check=True).stdout

    try:
        return git("rev-parse", "--short=12", "HEAD").strip() + "+" * bool(git("status", "--porcelain", "-uno").strip())
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
