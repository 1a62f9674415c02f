"""Loaders side by side: training-ready cells/s, raw shuffled cells/s, bytes/s of blocks, memory, disk, time to first batch.

    python benchmarks/loader.py --data heart.h5ad pbmc3k.h5ad --cells 100000 --work DIR --json loader.json \\
        --python annbatch=ENV312/bin/python

scbench      `scbench.data.loader.Loader` over a shard store
reference    the reference's way: Hugging Face `datasets` over parquet, one cell at a time in torch, padded batches
             (reference_numpy: the same, but `datasets` gives arrays instead of its default, lists)
scdataset    scDataset over h5ad
annbatch     annbatch over its own zarr collection
anndata      anndata's AnnLoader over a backed h5ad file
memmap       the ceiling: the same store through np.memmap, in the same order, 8 MB at a time, nothing checked

All read the same cells and make the same batches: 128 cells, at most 512 genes of each, drawn as in pretraining, 40 % masked.
scdataset, annbatch, anndata and memmap have scbench's own sampling and packing behind them, by its fastest sampler.

First every loader tries its settings, on each number of cores, and keeps the fastest. With those it delivers an epoch that
shows every gene: each cell must come once, gene by gene and count by count, or the loader gets no number. Then rounds, all
loaders in turn, each in a fresh process pinned to its cores: epoch after epoch for --seconds, opening included. Who doesn't
get through one has its first batch, with the opening, left out of the rate. cold: the files leave the page cache before
(posix_fadvise), and one epoch is timed.

Environments (torch for the CPU; another index serves it where PyPI's comes with CUDA):

    python3.11 -m venv ENV && ENV/bin/pip install -e . scdataset==0.3.0 datasets==5.2.0
    python3.12 -m venv ENV312 && ENV312/bin/pip install "annbatch[zarrs]==0.3.1" "tyro>=1.0,<2"
    ENV312/bin/pip install -e . --no-deps
    ENV/bin/python benchmarks/loader.py --python annbatch=ENV312/bin/python …
"""

import os
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, get_args

import loader_plots
import machine
import numpy as np
import tyro
from loaders.law import Law
from loaders.rounds import MODULES, Bench, Contender, contenders, play
from record import print_table, write

from scbench.errors import UserError

IDENTITY = ("loader", "sampler", "stage", "cache", "cores", "status")
Name = Literal["scbench", "memmap", "reference", "reference_numpy", "annbatch", "scdataset", "anndata"]
Cache = Literal["warm", "cold"]


@dataclass(frozen=True, kw_only=True)
class LoaderOptions:
    """Time loaders side by side."""

    data: tuple[Path, ...] = ()
    """h5ad files with raw counts, or directories of them; by default cells are synthetic. Cells that express at least 1,500
    genes are repeated, each copy thinned anew to about 1,500."""
    cells: int = 20_000
    """Cells of an epoch."""
    vocabulary_size: int = 60_697
    """Tokens of the vocabulary of synthetic cells."""
    work: Path | None = None
    """Folder for the cells in all formats, kept for the next run; by default a temporary one."""
    loaders: tuple[Name, ...] = get_args(Name)
    """Which ones."""
    python: tuple[str, ...] = ()
    """LOADER=INTERPRETER: the Python that has a loader's packages; by default this one."""
    cores: tuple[int, ...] = (1, 2)
    """Numbers of cores to pin processes to."""
    caches: tuple[Cache, ...] = ("warm", "cold")
    """States of the page cache. Raw rows and blocks are timed warm only, and cold only on the largest number of cores."""
    rounds: int = 5
    """Rounds; medians are over them."""
    seconds: float = 8.0
    """That each measurement takes; all loaders go on, epoch after epoch."""
    seed: int = 0
    """Of the cells and the loaders."""
    json: Path | None = None
    """File for the rows; a long CSV and a picture are written beside it."""

    def __post_init__(self) -> None:
        if not hasattr(os, "sched_setaffinity"):
            raise UserError("loader.py pins processes to cores and reads /proc: it needs Linux.")
        for name, least in (("cells", 2), ("rounds", 1)):
            if getattr(self, name) < least:
                raise UserError(f"--{name} {getattr(self, name)}: it must be at least {least}.")
        available = len(os.sched_getaffinity(0))
        for cores in self.cores:
            if not 1 <= cores <= available:
                raise UserError(f"--cores {cores}: this machine gives this process {available}.")
        for pair in self.python:
            if pair.partition("=")[0] not in MODULES or not Path(pair.partition("=")[2]).is_file():
                raise UserError(f"--python {pair}: give LOADER=INTERPRETER, like annbatch=ENV/bin/python.")


def rows_of(bench: Bench, found: list[Contender]) -> list[dict]:
    """A row a loader, sampler, stage, cache state and number of cores."""
    rows = []
    for contender in found:
        shared = {"loader": contender.name, "sampler": contender.sampler}
        if contender.status != "ok":
            nothing = dict.fromkeys(("cache", "cores", "cells_per_second", "tokens_per_second", "peak_bytes"))
            rows.append({**shared, "stage": "training", **nothing, "status": contender.status, "settings": _settings(bench)})
            continue
        for (stage, cache, cores), results in sorted(contender.results.items()):
            cells = [result["cells_per_second"] for result in results]
            medians = {name: float(np.median([result[name] for result in results])) for name in (
                "cells_per_second", "tokens_per_second", "first_batch_seconds", "peak_bytes", "idle_bytes")}
            if stage == "training":
                files = bench.files(contender.name, contender.best[stage, cores])
                medians["disk_bytes_per_cell"] = sum(path.stat().st_size for path in files) / bench.corpus["cells"]
            else:
                medians["bytes_per_second"] = float(np.median([result["bytes_per_second"] for result in results]))
            rows.append({
                **shared, "stage": stage, "cache": cache, "cores": cores, "status": "ok", **medians,
                "cells_per_second_spread": {"least": min(cells), "most": max(cells)},
                "tried": contender.tried[stage, cores],
                "settings": {**_settings(bench), **contender.best[stage, cores], "format": contender.about["format"],
                             "whole_epoch": all(result["whole_epoch"] for result in results)},
            })
    return rows


def _settings(bench: Bench) -> dict:
    about = {name: bench.corpus[name] for name in ("data", "cells", "median_genes")}
    options = bench.options
    return {**about, **Law(seed=options.seed)._asdict(), "rounds": options.rounds, "seconds": options.seconds}


def report(rows: list[dict]) -> None:
    """Print the table, and who is absent or failed."""
    lines = []
    for row in rows:
        if row["status"] == "ok":
            spread, disk = row["cells_per_second_spread"], row.get("disk_bytes_per_cell")
            lines.append([row["loader"], row["sampler"] or "its own", row["stage"], row["cache"], str(row["cores"]),
                          f"{row['cells_per_second']:,.0f}", f"{spread['least']:,.0f}-{spread['most']:,.0f}",
                          f"{row['tokens_per_second'] / 1e6:,.2f}", f"{row.get('bytes_per_second', 0) / 1e6:,.0f}",
                          f"{row['first_batch_seconds']:.2f}", f"{row['peak_bytes'] / 1e6:,.0f}",
                          "-" if disk is None else f"{disk:,.0f}"])
    print_table(["loader", "sampler", "stage", "cache", "cores", "cells/s", "least-most", "M tokens/s", "MB/s", "first s",
                 "peak MB", "bytes a cell"], lines)
    for row in rows:
        if row["status"] != "ok":
            print(f"{row['loader']}: {row['status']}")


def main(arguments: list[str] | None = None) -> None:
    """Make the cells, check, try, time, write."""
    options = tyro.cli(LoaderOptions, args=arguments, description=__doc__)
    with tempfile.TemporaryDirectory() as temporary:
        pairs = (pair.split("=", 1) for pair in options.python)
        pythons = {name: str(Path(python).absolute()) for name, python in pairs}  # tasks run in another folder
        bench = Bench(options, pythons, (options.work or Path(temporary)).absolute())
        found = contenders(bench)
        play(bench, found)
        rows = rows_of(bench, found)
    report(rows)
    if options.json is not None:
        write(options.json, rows, machine.describe(), IDENTITY)
        loader_plots.draw(rows, options.json.with_suffix(".png"))


if __name__ == "__main__":
    try:
        main()
    except UserError as error:
        print(f"loader.py: {error}", file=sys.stderr)
        raise SystemExit(2) from None
