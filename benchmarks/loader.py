"""Loaders side by side: cells/s of training-ready batches, of raw shuffled rows, and bytes/s of blocks; memory, disk, first batch.

    python benchmarks/loader.py --data heart.h5ad pbmc3k.h5ad --cells 100000 --work DIR --json loader.json \\
        --python annbatch=ENV312/bin/python

scbench      `scbench.data.loader.Loader` over a shard store
reference    the reference's way: Hugging Face `datasets` over parquet, one cell at a time in torch, padded batches
scdataset    scDataset over h5ad           annbatch    annbatch over its own zarr collection
anndata      anndata's AnnLoader over a backed h5ad file
memmap       the ceiling: the same store through np.memmap, in the same order, 8 MB at a time, nothing checked

All read the same cells and make the same batches: 128 cells, at most 512 genes of each, drawn as in pretraining, 40 % masked.
scdataset, annbatch, anndata and memmap have scbench's own sampling and packing behind them.
First every loader delivers an epoch that shows every gene: each cell must come once, gene by gene and count by count, or the
loader gets no number. Then each tries its settings on each number of cores and keeps the best. Then rounds, all loaders in turn,
each in a fresh process pinned to its cores: an epoch from opening on; who needs longer than --seconds is stopped there, and its
rate is taken after the first batch. cold: the files are dropped from the page cache before (posix_fadvise).

Environments (torch for the CPU; another index serves it where PyPI's comes with CUDA):

    python3.11 -m venv ENV && ENV/bin/pip install -e . scdataset==0.3.0 datasets==5.2.0
    python3.12 -m venv ENV312 && ENV312/bin/pip install "annbatch[zarrs]==0.3.1" "tyro>=1.0,<2"
    ENV312/bin/pip install -e . --no-deps
    ENV/bin/python benchmarks/loader.py --python annbatch=ENV312/bin/python …
"""

import dataclasses
import json
import os
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import loader_plots
import machine
import numpy as np
import tyro
from loaders import corpus
from loaders.law import Law
from record import print_table, write

from scbench.errors import UserError

BENCHMARKS = Path(__file__).resolve().parent
MODULES = {"scbench": "scbench_store", "memmap": "memmap", "reference": "reference", "annbatch": "annbatch",
           "scdataset": "scdataset", "anndata": "anndata_loader"}
SAME_STORE = {"memmap": "scbench"}
IDENTITY = ("loader", "sampler", "stage", "cache", "cores", "status")
SAMPLERS = ("numpy",)
TRIAL_SECONDS = 3.0
Name = Literal["scbench", "reference", "scdataset", "annbatch", "anndata", "memmap"]
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
    loaders: tuple[Name, ...] = ("scbench", "memmap", "reference", "annbatch", "scdataset", "anndata")
    """Which ones."""
    python: tuple[str, ...] = ()
    """LOADER=INTERPRETER: the Python that has a loader's packages; by default this one."""
    cores: tuple[int, ...] = (1, 2)
    """Numbers of cores to pin processes to."""
    caches: tuple[Cache, ...] = ("warm", "cold")
    """States of the page cache; raw rows and blocks are timed warm only."""
    rounds: int = 5
    """Rounds; medians are over them."""
    seconds: float = 8.0
    """A loader that needs longer for an epoch is stopped."""
    seed: int = 0
    """Of the cells and the loaders."""
    json: Path | None = None
    """File for the rows; a long CSV and a picture are written beside it."""

    def __post_init__(self) -> None:
        if not hasattr(os, "sched_setaffinity"):
            raise UserError("loader.py pins processes to cores and reads /proc: it needs Linux.")
        for name, least in (("cells", 2), ("rounds", 1)):
            if getattr(self, name) < least:
                raise UserError(f"--{name} is {getattr(self, name)}: it must be at least {least}.")
        available = len(os.sched_getaffinity(0))
        for cores in self.cores:
            if not 1 <= cores <= available:
                raise UserError(f"--cores {cores}: this machine gives this process {available}.")
        for pair in self.python:
            if pair.partition("=")[0] not in MODULES or not Path(pair.partition("=")[2]).is_file():
                raise UserError(f"--python {pair}: give LOADER=INTERPRETER, like annbatch=ENV/bin/python.")


@dataclass
class Contender:
    """A loader with one of the samplers, and what became of it."""

    name: str
    sampler: str | None  # of the tokenising behind it; the reference has its own
    about: dict  # what building it said
    status: str = "ok"
    tried: dict[tuple[str, int], list[dict]] = dataclasses.field(default_factory=dict)  # by stage and number of cores
    best: dict[tuple[str, int], dict] = dataclasses.field(default_factory=dict)
    results: dict[tuple[str, str, int], list[dict]] = dataclasses.field(default_factory=dict)  # by stage, cache and cores


class Bench:
    """Tasks of loaders on one set of cells."""

    def __init__(self, options: LoaderOptions, work: Path) -> None:
        self.options, self.work = options, work
        self.corpus = corpus.make(work / "cells", data=options.data, cells=options.cells, seed=options.seed,
                                  vocabulary_size=options.vocabulary_size, max_genes=Law().max_genes)
        self._pythons = dict(pair.split("=", 1) for pair in options.python)

    def folder(self, name: str) -> Path:
        """Where a loader's format lies."""
        return self.work / SAME_STORE.get(name, name)

    def run(self, name: str, action: str, *, sampler: str | None = None, cores: int | None = None,
            settings: dict | None = None, law: Law | None = None, stage: str = "training") -> dict:
        """What a task in a fresh process gives."""
        law = law or Law(seed=self.options.seed)
        allowed = sorted(os.sched_getaffinity(0))[:cores]
        task = {"action": action, "module": MODULES[name], "corpus": str(self.work / "cells"), "stage": stage,
                "folder": str(self.folder(name)), "law": law._asdict(), "settings": settings or {},
                "cores": allowed if cores else None, "seconds": TRIAL_SECONDS if action == "try" else self.options.seconds}
        threads = str(len(allowed))
        limits = {f"{name}_NUM_THREADS": threads for name in ("OMP", "OPENBLAS", "MKL", "NUMBA", "RAYON")}
        environment = {**os.environ, **limits, "HF_HUB_OFFLINE": "1", "SCBENCH_SAMPLER": sampler or "numpy"}
        process = subprocess.run([self._pythons.get(name, sys.executable), "-m", "loaders.run"], cwd=BENCHMARKS,
                                 input=json.dumps(task), capture_output=True, text=True, env=environment)
        if process.returncode:
            raise UserError(f"{name}: {action} ended with {process.returncode}:\n{process.stderr[-3000:]}")
        return json.loads(process.stdout.splitlines()[-1])

    def files(self, name: str, settings: dict | None = None) -> list[Path]:
        """What a loader reads, with these settings (None: with any)."""
        folder = self.folder(name)
        if settings and "store" in settings:
            folder /= f"{settings['store']}.zarr"
        files = [path for path in folder.rglob("*") if path.is_file() and path.suffix != ".lock" and path.name != "built"]
        return files or [self.work / "cells" / corpus.CELLS_FILE]

    def drop(self, name: str) -> None:
        """Out of the page cache with a loader's files."""
        for path in self.files(name):
            descriptor = os.open(path, os.O_RDONLY)
            try:
                os.fsync(descriptor)  # pages that are not written yet would stay
                os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
            finally:
                os.close(descriptor)


def contenders(bench: Bench) -> list[Contender]:
    """Every loader with every sampler: built and checked, or why not."""
    found = []
    for name in dict.fromkeys(bench.options.loaders):
        if name in SAME_STORE:  # its store is another's
            bench.run(SAME_STORE[name], "build")
        about = bench.run(name, "build")
        if "absent" in about:
            found.append(Contender(name, None, about, status=f"absent: {about['absent']}"))
            continue
        for sampler in SAMPLERS if name != "reference" else (None,):
            contender = Contender(name, sampler, about)
            law = Law(seed=bench.options.seed, max_genes=bench.corpus["largest"])
            failure = bench.run(name, "check", sampler=sampler, law=law, settings=about["tried"][0])["failure"]
            contender.status = failure or "ok"
            found.append(contender)
    return found


def tune(bench: Bench, contender: Contender) -> None:
    """Try all settings of each stage on each number of cores, warm; keep the fastest."""
    settings = contender.about["tried"]
    for stage in contender.about["stages"]:
        for cores in bench.options.cores:
            trials = []
            if len(settings) > 1 and (stage == "training" or contender.sampler == SAMPLERS[0]):
                for tried in settings:
                    result = bench.run(contender.name, "try", sampler=contender.sampler, cores=cores, settings=tried, stage=stage)
                    trials.append({**tried, "cells_per_second": round(result["cells_per_second"])})
            best = int(np.argmax([trial["cells_per_second"] for trial in trials])) if trials else 0
            contender.tried[stage, cores], contender.best[stage, cores] = trials, settings[best]


def play(bench: Bench, found: list[Contender]) -> None:
    """The rounds."""
    options = bench.options
    turns = [("training", cache, cores) for cache in options.caches for cores in options.cores]
    turns += [(stage, "warm", cores) for stage in ("rows", "extents") for cores in options.cores]
    for _ in range(options.rounds):
        for stage, cache, cores in turns:
            for contender in found:
                if contender.status != "ok" or stage not in contender.about["stages"]:
                    continue
                if stage != "training" and contender.sampler != SAMPLERS[0]:  # no sampler in it: once is enough
                    continue
                if cache == "cold":
                    bench.drop(contender.name)
                result = bench.run(contender.name, "time", sampler=contender.sampler, cores=cores, stage=stage,
                                   settings=contender.best[stage, cores])
                if stage == "training" and result["whole_epoch"]:
                    _same_epoch(bench, contender, result)
                contender.results.setdefault((stage, cache, cores), []).append(result)


def _same_epoch(bench: Bench, contender: Contender, result: dict) -> None:
    """A timed epoch has the cells and tokens that it must have (an endless loader fills its last batch)."""
    surplus = result["cells"] - bench.corpus["cells"]
    per_cell = result["tokens_per_second"] / result["cells_per_second"]
    expected = bench.corpus["tokens"] / bench.corpus["cells"]
    if not 0 <= surplus < Law().batch_cells or abs(per_cell / expected - 1) > 1e-3 + surplus / bench.corpus["cells"]:
        contender.status = f"failed: an epoch of {result['cells']} cells with {per_cell:.1f} tokens each"


def rows_of(bench: Bench, found: list[Contender]) -> list[dict]:
    """A row a loader, sampler, stage, cache state and number of cores."""
    rows = []
    for contender in found:
        shared = {"loader": contender.name, "sampler": contender.sampler}
        if contender.status != "ok":
            rows.append({**shared, "stage": "training", "cache": None, "cores": None, "status": contender.status,
                         "cells_per_second": None, "tokens_per_second": None, "peak_bytes": None, "settings": _settings(bench)})
            continue
        for (stage, cache, cores), results in sorted(contender.results.items()):
            cells = [result["cells_per_second"] for result in results]
            medians = {name: float(np.median([result[name] for result in results])) for name in (
                "cells_per_second", "tokens_per_second", "first_batch_seconds", "peak_bytes", "idle_bytes")}
            if stage == "training":
                medians["disk_bytes_per_cell"] = sum(
                    path.stat().st_size for path in bench.files(contender.name, contender.best[stage, cores])) / bench.corpus["cells"]
            else:
                medians["bytes_per_second"] = float(np.median([result["bytes_per_second"] for result in results]))
            rows.append({
                **shared, "stage": stage, "cache": cache, "cores": cores, "status": "ok", **medians,
                "cells_per_second_spread": {"least": min(cells), "most": max(cells)},
                "settings": {**_settings(bench), **contender.best[stage, cores], "format": contender.about["format"],
                             "tried": contender.tried[stage, cores], "whole_epoch": all(r["whole_epoch"] for r in results)},
            })
    return rows


def _settings(bench: Bench) -> dict:
    about = {name: bench.corpus[name] for name in ("data", "cells", "median_genes")}
    return {**about, **Law(seed=bench.options.seed)._asdict(), "rounds": bench.options.rounds, "seconds": bench.options.seconds}


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
        bench = Bench(options, (options.work or Path(temporary)).absolute())
        found = contenders(bench)
        for contender in found:
            if contender.status == "ok":
                tune(bench, contender)
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
