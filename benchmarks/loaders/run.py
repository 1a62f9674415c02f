"""One task of one loader in a process of its own: `python -m loaders.run`, the task as JSON on standard input, what came of it
as JSON on the last line of standard output."""

import json
import sys
import time
from collections.abc import Callable, Iterator
from importlib import import_module
from pathlib import Path
from types import ModuleType

import numpy as np
from loaders import tokenise
from loaders.law import Law

from scbench.data.cells import content_hash
from scbench.data.prefetch import Prefetcher

STAGES = ("training", "rows", "shuffled", "extents")
LOOK_SECONDS = 0.5


def main(task: dict) -> dict:
    """Do the task."""
    corpus, folder, law = Path(task["corpus"]), Path(task["folder"]), Law(**task["law"])
    try:
        loader = import_module(f"loaders.{task['module']}")
        if task["action"] == "build":
            return _build(loader, corpus, folder)
    except ImportError as error:
        return {"absent": f"{error} (Python {sys.version.split()[0]})"}
    epochs = _epochs(loader, corpus, folder, law, task["settings"])
    if task["action"] == "check":
        return {"failure": _check(loader, epochs["training"](), np.load(corpus / "hashes.npy"))}
    return _time(epochs[task["stage"]], task["seconds"], len(np.load(corpus / "hashes.npy", mmap_mode="r")), task["once"])


def _build(loader: ModuleType, corpus: Path, folder: Path) -> dict:
    done = folder / "built"
    if not done.exists():
        folder.mkdir(exist_ok=True)
        loader.build(corpus, folder)
        done.touch()
    stages = list(_epochs(loader, corpus, folder, Law(), {}))
    return {"tried": loader.TRIED, "format": loader.FORMAT, "stages": stages}


def _epochs(loader: ModuleType, corpus: Path, folder: Path, law: Law, settings: dict) -> dict[str, Callable[[], Iterator]]:
    """What makes the endless epochs of each stage that the loader has; one that only gives rows gets scbench's tokenising
    behind it."""
    made = {stage: lambda stage=stage: getattr(loader, stage)(corpus, folder, law, settings)
            for stage in STAGES if hasattr(loader, stage)}
    if "rows" in made and settings.get("ahead"):
        read = made["rows"]
        made["rows"] = lambda: Prefetcher(read(), settings["ahead"])
    if settings.get("workers") and hasattr(loader, "training_in_workers"):
        made["training"] = lambda: loader.training_in_workers(corpus, law, settings)
    elif "training" not in made:
        made["training"] = lambda: tokenise.tokenised(made["rows"](), corpus, law)
    return made


def _check(loader: ModuleType, epochs: Iterator, expected: np.ndarray) -> str | None:
    """What is wrong with a first epoch that shows every gene: each cell must come once, gene by gene and count by count.

    `expected`: the sorted content hashes of the source.
    """
    whole_cells = getattr(loader, "whole_cells", tokenise.whole_cells)
    hashes, left = [], len(expected)
    for batch in epochs:
        found = content_hash(*whole_cells(batch))
        if getattr(loader, "FILLED", False):
            found = found[np.asarray(batch.samples) < len(expected)]
        hashes.append(found)
        left -= len(found)
        if left <= 0:
            break
    delivered = np.sort(np.concatenate(hashes))
    wrong = np.count_nonzero(~np.isin(delivered, expected))
    if wrong:
        return f"failed: {wrong} cells differ from the source"
    if not np.array_equal(delivered, expected):
        missing = np.count_nonzero(~np.isin(expected, delivered))
        return f"failed: an epoch delivered {len(delivered)} cells of {len(expected)}, {missing} of them never"
    return None


def _time(epochs: Callable[[], Iterator], seconds: float, epoch_cells: int, once: bool) -> dict:
    """Epoch after epoch for `seconds`, from opening on, or only `once`; who doesn't get through one has its first batch, with
    the opening, left out of the rate."""
    before = peak = _peak_bytes()
    looked = 0.0
    start = time.perf_counter()
    batches = epochs()
    cells, tokens, moved, first = 0, 0, 0, None
    for batch in batches:
        now = time.perf_counter() - start
        sizes = _sizes(batch)
        if first is None:
            first, first_sizes = now, sizes
        if now - looked > LOOK_SECONDS:  # a process that reads for this one may end before the epoch does
            peak, looked = max(peak, _peak_bytes()), now
        cells, tokens, moved = (total + size for total, size in zip((cells, tokens, moved), sizes, strict=True))
        if (now > seconds and now > 2 * first) or (once and cells >= epoch_cells):
            break
    elapsed = time.perf_counter() - start
    peak = max(peak, _peak_bytes())
    whole = cells >= epoch_cells
    if not whole:
        elapsed -= first
        cells, tokens, moved = (total - size for total, size in zip((cells, tokens, moved), first_sizes, strict=True))
    return {"cells_per_second": cells / elapsed, "tokens_per_second": tokens / elapsed, "bytes_per_second": moved / elapsed,
            "first_batch_seconds": first, "peak_bytes": peak, "idle_bytes": before, "whole_epoch": whole, "cells": cells}


def _sizes(batch: tuple) -> tuple[int, int, int]:
    """(cells, tokens that are no pads, bytes of genes and counts) of a batch, or of raw cells."""
    if hasattr(batch, "n_cells"):
        return batch.n_cells, getattr(batch, "n_tokens", len(batch.genes)), 0
    return len(batch.offsets) - 1, len(batch.genes), batch.genes.nbytes + batch.counts.nbytes


def _peak_bytes() -> int:
    """The peak of resident memory, file pages that are mapped included, of this process and its children, each at its own."""
    pids, total = ["self"], 0
    while pids:
        process = Path("/proc", str(pids.pop()))
        try:
            status = (process / "status").read_text()
            pids += [pid for task in (process / "task").iterdir() for pid in (task / "children").read_text().split()]
        except OSError:  # it has just ended
            continue
        lines = [line for line in status.splitlines() if line.startswith("VmHWM:")]  # none of a process that has ended
        total += sum(int(line.split()[1]) * 1024 for line in lines)
    return total


if __name__ == "__main__":
    print("\n" + json.dumps(main(json.load(sys.stdin))))
