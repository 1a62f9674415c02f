"""Tasks of loaders in processes of their own: built, checked, their settings tried, then round after round."""

import dataclasses
import functools
import json
import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from loaders import corpus
from loaders.law import Law

from scbench.kernels import native
from scbench.kernels.sampler import SOURCE

if TYPE_CHECKING:
    from loader import LoaderOptions

BENCHMARKS = Path(__file__).resolve().parents[1]
MODULES = {"scbench": "scbench_store", "memmap": "memmap", "reference": "reference", "annbatch": "annbatch",
           "reference_numpy": "reference_numpy", "scdataset": "scdataset", "anndata": "anndata_loader"}
SAME_STORE = {"memmap": "scbench", "reference_numpy": "reference"}
TRIAL_SECONDS = 2.0
READ_BYTES = 8_000_000


def samplers(name: str) -> tuple[str | None, ...]:
    """Those that a loader is timed with; the reference has its own, and the others get the fastest."""
    found = _samplers()
    return {"scbench": found, "reference": (None,), "reference_numpy": (None,)}.get(name, found[:1])


@functools.cache
def _samplers() -> tuple[str, ...]:
    """scbench's, the fastest first."""
    try:
        native.load(SOURCE)
    except native.BuildError:
        return ("numpy",)
    return ("native", "numpy")


class TaskError(Exception):
    """A task's process failed; the last line that it said."""


@dataclass
class Contender:
    """A loader with one of the samplers, and what became of it."""

    name: str
    sampler: str | None  # of the tokenising behind it; the reference has its own
    stages: list[str]
    about: dict  # what building it said
    status: str = "ok"
    tried: dict[tuple[str, int], list[dict]] = dataclasses.field(default_factory=dict)  # by stage and number of cores
    best: dict[tuple[str, int], dict] = dataclasses.field(default_factory=dict)
    results: dict[tuple[str, str, int], list[dict]] = dataclasses.field(default_factory=dict)  # by stage, cache and cores


def start(python: str, task: dict, environment: dict[str, str], cores: list[int]) -> dict:
    """What loaders/run.py says of a task, in a process of its own on these cores."""
    process = subprocess.run([python, "-m", "loaders.run"], cwd=BENCHMARKS, input=json.dumps(task), capture_output=True,
                             text=True, env=environment, preexec_fn=lambda: os.sched_setaffinity(0, cores))
    if process.returncode:
        print(process.stderr, file=sys.stderr)
        raise TaskError(next(reversed(process.stderr.strip().splitlines()), f"exit status {process.returncode}"))
    return json.loads(process.stdout.splitlines()[-1])


class Bench:
    """Tasks of loaders on one set of cells."""

    def __init__(self, options: "LoaderOptions", pythons: dict[str, str], work: Path) -> None:
        self.options, self.work = options, work
        self._pythons = pythons
        self.corpus = corpus.make(work / "cells", data=options.data, cells=options.cells, seed=options.seed,
                                  vocabulary_size=options.vocabulary_size, max_genes=Law().max_genes)

    def folder(self, name: str) -> Path:
        """Where a loader's format lies."""
        return self.work / SAME_STORE.get(name, name)

    def run(self, name: str, action: str, *, sampler: str | None = None, cores: int | None = None,
            settings: dict | None = None, law: Law | None = None, stage: str = "training", once: bool = False) -> dict:
        """What a task in a fresh process gives."""
        law = law or Law(seed=self.options.seed)
        allowed = sorted(os.sched_getaffinity(0))[:cores]
        task = {"action": action, "module": MODULES[name], "corpus": str(self.work / "cells"), "stage": stage,
                "folder": str(self.folder(name)), "law": law._asdict(), "settings": settings or {}, "once": once,
                "seconds": TRIAL_SECONDS if action == "try" else self.options.seconds}
        threads = str(len(allowed))
        limits = {f"{name}_NUM_THREADS": threads for name in ("OMP", "OPENBLAS", "MKL", "NUMBA", "RAYON")}
        environment = {**os.environ, **limits, "HF_HUB_OFFLINE": "1", "SCBENCH_SAMPLER": sampler or "numpy"}
        return start(self._pythons.get(name, sys.executable), task, environment, allowed)

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


    def warm(self, name: str, settings: dict) -> None:
        """All files that a loader reads into the page cache."""
        for path in self.files(name, settings):
            with open(path, "rb", buffering=0) as file:
                while file.read(READ_BYTES):
                    pass


def contenders(bench: Bench) -> list[Contender]:
    """Every loader with every sampler: built, its settings tried, and checked with those that it will be timed with."""
    found = []
    for name in dict.fromkeys(bench.options.loaders):
        try:
            if name in SAME_STORE:
                bench.run(SAME_STORE[name], "build")
            about = bench.run(name, "build")
        except TaskError as error:
            about = {"absent": str(error)}
        if "absent" in about:
            found.append(Contender(name, None, [], about, status=f"absent: {about['absent']}"))
            continue
        for sampler in samplers(name):
            # a stage that samples nothing is timed once
            stages = about["stages"] if sampler == samplers(name)[0] else ["training"]
            contender = Contender(name, sampler, stages, about)
            found.append(contender)
            try:
                _tune(bench, contender)
                contender.status = _failure(bench, contender) or "ok"
            except TaskError as error:
                contender.status = f"failed: {error}"
    return found


def _tune(bench: Bench, contender: Contender) -> None:
    """Try all settings of each stage on each number of cores, warm; keep the fastest."""
    for stage in contender.stages:
        for cores in bench.options.cores:
            # a second thread or process has nowhere to run on one core
            settings = [tried for tried in contender.about["tried"]
                        if cores > 1 or not (tried.get("ahead") or tried.get("workers"))]
            trials = []
            for tried in settings if len(settings) > 1 else ():
                bench.warm(contender.name, tried)
                try:
                    result = bench.run(contender.name, "try", sampler=contender.sampler, cores=cores, settings=tried,
                                       stage=stage)
                    trials.append({**tried, "cells_per_second": round(result["cells_per_second"])})
                except TaskError as error:
                    trials.append({**tried, "cells_per_second": 0, "failed": str(error)})
            best = int(np.argmax([trial["cells_per_second"] for trial in trials])) if trials else 0
            contender.tried[stage, cores], contender.best[stage, cores] = trials, settings[best]


def _failure(bench: Bench, contender: Contender) -> str | None:
    """What is wrong with an epoch of this loader that shows every gene."""
    law = Law(seed=bench.options.seed, max_genes=bench.corpus["largest"])
    distinct = []
    for settings in contender.best.values():
        if settings not in distinct:
            distinct.append(settings)
    failures = (bench.run(contender.name, "check", sampler=contender.sampler, law=law, settings=settings)["failure"]
                for settings in distinct)
    return next(filter(None, failures), None)


def play(bench: Bench, found: list[Contender]) -> None:
    """The rounds."""
    options = bench.options
    turns = [("training", cache, cores) for cache in options.caches for cores in options.cores
             if cache == "warm" or cores == max(options.cores)]
    turns += [(stage, "warm", cores) for stage in ("rows", "shuffled", "extents") for cores in options.cores]
    for _ in range(options.rounds):
        for stage, cache, cores in turns:
            for contender in found:
                if contender.status != "ok" or stage not in contender.stages:
                    continue
                if cache == "cold":
                    bench.drop(contender.name)
                else:
                    bench.warm(contender.name, contender.best[stage, cores])
                try:
                    result = bench.run(contender.name, "time", sampler=contender.sampler, cores=cores, stage=stage,
                                       settings=contender.best[stage, cores], once=cache == "cold")
                except TaskError as error:
                    contender.status = f"failed: {error}"
                    continue
                if stage == "training" and result["whole_epoch"]:
                    _same_tokens(bench, contender, result)
                contender.results.setdefault((stage, cache, cores), []).append(result)


def _same_tokens(bench: Bench, contender: Contender, result: dict) -> None:
    """Timed epochs have as many tokens a cell as they must have; the last one may be a part of one."""
    per_cell = result["tokens_per_second"] / result["cells_per_second"]
    expected = bench.corpus["tokens"] / bench.corpus["cells"]
    if abs(per_cell / expected - 1) > 1e-3 + 1 / np.sqrt(bench.corpus["cells"]):
        contender.status = f"failed: {result['cells']} cells with {per_cell:.1f} tokens each instead of {expected:.1f}"
