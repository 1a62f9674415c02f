"""`scbench prepare`: files in, a shard store out: cells mapped, deduplicated, split, globally shuffled, in bounded memory.

Two passes over parts that survive a kill (parts.py), in a hidden directory beside the output: scatter.py sorts the cells
of the inputs into runs, gather.py makes the shards of each bucket out of them. One rename publishes the store.
"""

import contextlib
import errno
import fcntl
import os
import shutil
import sys
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

from scbench.config import PrepareConfig
from scbench.data.counts import EXACT_COUNT
from scbench.data.fingerprint_genes import gene_list
from scbench.data.fingerprints import FORMAT_VERSION as FINGERPRINTS_FORMAT
from scbench.data.gather import GatherTask, Run, gather
from scbench.data.gene_identity import check_matched
from scbench.data.manifest import write_manifest
from scbench.data.measured import MEASURED_FILE
from scbench.data.plan import Plan, make_plan
from scbench.data.scatter import ScatterTask, close_sources, scatter
from scbench.data.shard_format import BLOCK_CELLS, FORMAT_VERSION, SPLITS, ShardInfo, genes_dtype
from scbench.data.splits import group_id, split_groups
from scbench.data.store import VOCABULARY_FILE, Store
from scbench.data.workers import Workers
from scbench.errors import RetryError, UserError
from scbench.files import refuse_existing, sha256, sync, write_text

TASK_CELLS = 16_384  # cells of an input that a worker reads in one part


def prepare(inputs: Sequence[Path | str] | Path | str, output: Path | str, **options) -> Store:
    """Make a shard store of h5ad files, of the reference implementation's parquet files, or of both, and open it.

    The same inputs and options give the same bytes, whatever `workers` is and however often the work was killed.

    Parameters
    ----------
    inputs
        h5ad files with raw counts; parquet files with the lists ``genes`` (token ids of ``vocabulary``, which they need) and
        ``expressions`` (log1p of raw counts); directories of such parquet files; ``census:``, ``census:VERSION`` or
        ``census:URI``, the CELLxGENE Census (with ``filter``, ``preset``).
    output
        The store to make; must not exist.
    options
        Fields of `scbench.config.PrepareConfig`, such as ``vocabulary``, ``split_by=("donor",)``, ``keep_obs``, ``seed``.

    Raises
    ------
    UserError
        If an input, an option or the disk doesn't serve; nothing is published then.
    """
    paths = (inputs,) if isinstance(inputs, (str, Path)) else inputs
    for name in ("split_by", "keep_obs", "preset"):
        value = options.get(name, ())
        options[name] = (value,) if isinstance(value, str) else tuple(value)
    if not isinstance(options.get("split", ""), str):
        options["split"] = ",".join(map(str, options["split"]))
    if options.get("vocabulary") is not None:
        options["vocabulary"] = Path(options["vocabulary"])
    config = PrepareConfig(inputs=tuple(map(str, paths)), output=Path(output), **options)
    return prepare_store(config)


def prepare_store(config: PrepareConfig) -> Store:
    """The same from a config."""
    shares = config.split_shares()
    workers = os.cpu_count() if config.workers is None else config.workers
    if not config.inputs:
        raise UserError("there is no input: name one h5ad or parquet file or more, or census:.")
    if workers < 1:
        raise UserError(f"--workers is {workers}: it must be at least 1.")
    if config.min_genes < 0:
        raise UserError(f"--min-genes is {config.min_genes}: it cannot be negative.")
    refuse_existing(config.output)
    output = config.output.absolute()
    work = output.with_name(f".prepare-{output.name}")
    plan = make_plan(config, workers, work)
    with _disk_errors(work):
        work.mkdir(parents=True, exist_ok=True)
        with _locked(work):
            try:
                _prepare(plan, shares, workers, work, output)
            except RetryError:
                raise
            except UserError:
                shutil.rmtree(work)  # the same plan would fail again, and nobody looks for hidden gigabytes
                raise
            finally:
                close_sources()
            shutil.rmtree(work)
    return Store.open(config.output)


def run_prepare(config: PrepareConfig) -> dict:
    """The verb: prepare, and say what came of it."""
    manifest = prepare_store(config).manifest
    if not config.json:
        _say(config.output, manifest)
    return {"store": str(config.output), **{name: manifest[name] for name in ("splits", "vocabulary", "sources")}}


def _prepare(plan: Plan, shares: tuple[float, float, float], workers: int, work: Path, output: Path) -> None:
    _start_over_unless(plan, work)
    scatter_tasks = _scatter_tasks(plan, work)
    with _progress() as progress:
        advance = progress("reading", plan.cells)
        with Workers(min(workers, len(scatter_tasks))) as pool:
            scattered = pool.map(scatter, scatter_tasks, lambda task: advance(task.stop - task.start))
        sources = _source_facts(plan, scatter_tasks, scattered)
        tasks = _gather_tasks(plan, shares, scatter_tasks, scattered, work)
        advance = progress("writing", len(tasks))
        with Workers(min(workers, len(tasks))) as pool:  # new processes: the first ones' heaps are large and fragmented
            gathered = pool.map(gather, tasks, lambda _: advance(1))
    _publish(plan, shares, sources, tasks, gathered, work, output)


def _start_over_unless(plan: Plan, work: Path) -> None:
    """Keep the finished parts of an earlier run in `work` only if it had the same plan, and no half-made ones."""
    fingerprint = work / "plan"
    same = fingerprint.exists() and fingerprint.read_text() == plan.fingerprint()
    if (work / "store").exists():  # killed while the shards were being moved there
        shutil.rmtree(work / "store")
        shutil.rmtree(work / "shards", ignore_errors=True)
    for name in ("runs", "shards"):
        for leftover in (work / name).glob(".partial-*" if same else "*"):
            shutil.rmtree(leftover)
    write_text(fingerprint, plan.fingerprint())


def _scatter_tasks(plan: Plan, work: Path) -> list[ScatterTask]:
    tasks, sets = [], 0
    for source in plan.sources:
        for start in range(0, source.cells, TASK_CELLS):
            stop = min(start + TASK_CELLS, source.cells)
            tasks.append(ScatterTask(
                part=work / "runs" / f"{len(tasks):05d}",
                source=source.options,
                gene_map=source.gene_map,
                start=start,
                stop=stop,
                min_genes=plan.config.min_genes,
                seed=plan.config.seed,
                buckets=plan.buckets,
                genes_dtype=genes_dtype(plan.vocabulary.size),
                obs_columns=plan.obs_columns,
                split_by=plan.config.split_by,
                first_set=sets,
                datasets=source.datasets,
            ))
        sets += len(source.measured)
    return tasks


def _source_facts(plan: Plan, tasks: Sequence[ScatterTask], scattered: Sequence[dict]) -> list[dict]:
    """The manifest's provenance of each source, as far as the first pass knows it; UserError if too little matched."""
    facts = []
    for source in plan.sources:
        mine = [result for task, result in zip(tasks, scattered, strict=True) if task.source == source.options]
        counts, matched = (sum(result[name] for result in mine) for name in ("counts", "counts_matched"))
        check_matched(source.gene_map, matched, counts)
        facts.append({
            "name": source.name,
            "sha256": source.sha256,
            "layer": source.options.layer,
            "organism": source.gene_map.organism,
            "genes": source.gene_map.n_genes,
            "genes_matched": source.gene_map.matched_genes,
            "merged_columns": source.gene_map.merged_columns,
            "counts": counts,
            "counts_matched": matched,
            "recovered_counts": source.recovered_counts,
            "inexact_counts": sum(result["inexact_counts"] for result in mine),
            "fractional_values": sum(result["fractional_values"] for result in mine),
            "fractional_distance": max(result["fractional_distance"] for result in mine),
            "cells": source.cells,
            "dropped": {"below_min_genes": sum(result["below_min_genes"] for result in mine)},
            **source.provenance,
        })
    if sum(fact["cells"] - fact["dropped"]["below_min_genes"] for fact in facts) == 0:
        least = plan.config.min_genes
        raise UserError(f"no cell is left: all {plan.cells} have fewer than {least} expressed genes (--min-genes).")
    return facts


def _gather_tasks(
    plan: Plan, shares: tuple[float, float, float], tasks: Sequence[ScatterTask], scattered: Sequence[dict], work: Path
) -> list[GatherTask]:
    split_of_group = None
    if plan.config.split_by:
        sizes: Counter[tuple[str, ...]] = Counter()
        for result in scattered:
            sizes.update({tuple(group): cells for group, cells in result["groups"]})
        splits = split_groups(sizes, shares, plan.config.seed)
        split_of_group = {group_id(group): split for group, split in splits.items()}
    number = {source.options: i for i, source in enumerate(plan.sources)}
    runs = tuple(
        Run(stem=task.part / f"run-{i}", source=number[task.source], genes=task.genes_dtype, counts=run["counts"])
        for task, result in zip(tasks, scattered, strict=True)
        for i, run in enumerate(result["runs"])
    )
    common = GatherTask(
        part=work, bucket=0, runs=runs, sources=tuple(source.name for source in plan.sources), seed=plan.config.seed,
        shares=shares, split_of_group=split_of_group, vocabulary_size=plan.vocabulary.size,
        totals="float64" if any(isinstance(result["counts"], float) for result in scattered) else "int64",
        fingerprint_genes=gene_list(plan.vocabulary),
    )
    return [replace(common, part=work / "shards" / f"{bucket:05d}", bucket=bucket) for bucket in range(plan.buckets)]


def _publish(
    plan: Plan,
    shares: tuple[float, float, float],
    sources: list[dict],
    tasks: Sequence[GatherTask],
    gathered: Sequence[dict],
    work: Path,
    output: Path,
) -> None:
    """Move the shards into one directory, write the manifest, and rename the directory to `output`."""
    for i, source in enumerate(sources):
        source["dropped"]["duplicates"] = sum(result["duplicates"][i] for result in gathered)
        source["kept"] = sum(result["kept"][i] for result in gathered)
    made = [
        (task, result, ShardInfo(**shard))
        for task, result in zip(tasks, gathered, strict=True)
        for shard in result["shards"]
    ]
    made.sort(key=lambda item: SPLITS.index(item[2].split))  # stable: a split's shards lie side by side, in bucket order
    splits = {
        split: {"cells": sum(info.cells for *_, info in made if info.split == split),
                "nnz": sum(info.nnz for *_, info in made if info.split == split)}
        for split in SPLITS
    }
    for split, share in zip(SPLITS, shares, strict=True):
        if plan.config.split_by and share > 0 and splits[split]["cells"] == 0:
            raise UserError(f"the {split} split is empty, because all cells of its groups are duplicates: use another --seed.")
    store = work / "store"
    store.mkdir()
    shards, files = [], {}
    for number, (task, result, info) in enumerate(made):
        name = f"shard-{number:05d}"
        os.replace(task.part / info.split, store / name)
        shards.append(asdict(replace(info, name=name)))
        prefix = f"{info.split}/"
        files |= {f"{name}/{file[len(prefix):]}": facts for file, facts in result["files"].items() if file.startswith(prefix)}
    vocabulary = store / VOCABULARY_FILE
    plan.vocabulary.save(vocabulary)
    np.save(store / MEASURED_FILE, np.concatenate([source.measured for source in plan.sources]))
    for file in (vocabulary, store / MEASURED_FILE):
        files[file.name] = {"bytes": file.stat().st_size, "sha256": sha256(file)}
    write_manifest(store, {
        "format_version": FORMAT_VERSION,
        "transform": "counts",
        "block_cells": BLOCK_CELLS,
        "genes_dtype": genes_dtype(plan.vocabulary.size),
        "vocabulary": {"fingerprint": plan.vocabulary.fingerprint, "tokens": len(plan.vocabulary.tokens)},
        "splits": splits,
        "shards": shards,
        "obs_columns": [column.name for column in plan.obs_columns],
        "options": plan.options(),
        "fingerprints": {"format": FINGERPRINTS_FORMAT, "genes": gene_list(plan.vocabulary).fingerprint},
        "measured": [facts for source in plan.sources for facts in source.measured_facts()],
        "sources": sources,
        "files": dict(sorted(files.items())),
    })
    refuse_existing(output)
    if output.is_dir():
        output.rmdir()
    os.replace(store, output)
    sync(output.parent)


@contextlib.contextmanager
def _locked(work: Path) -> Iterator[None]:
    """Hold the work directory; the lock goes with the process, however it ends."""
    with open(work / "lock", "w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UserError("another scbench prepare is making this store: wait for it, or give another --output.") from None
        yield


@contextlib.contextmanager
def _disk_errors(work: Path) -> Iterator[None]:
    """Say in one sentence that the disk is full or cannot be written."""
    try:
        yield
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise UserError(
                f"the disk is full: make room and run the same command again (it goes on with what is in {work}), "
                "or remove that directory."
            ) from error
        if error.errno in (errno.EACCES, errno.EPERM, errno.EROFS):
            raise UserError(f"{error.filename or work} cannot be written: {error.strerror}.") from error
        raise


@contextlib.contextmanager
def _progress() -> Iterator[Callable[[str, int], Callable[[int], None]]]:
    """A bar for each `progress(title, total)`, advanced by the function that this returns; silent if nobody is watching."""
    count = TextColumn("{task.completed:,}/{task.total:,}")
    columns = (TextColumn("{task.description}"), BarColumn(), count, TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True), transient=True, disable=not sys.stdout.isatty()) as bars:

        def add(title: str, total: int) -> Callable[[int], None]:
            bar = bars.add_task(title, total=total)
            return lambda amount: bars.advance(bar, amount)

        yield add


def _say(output: Path, manifest: dict) -> None:
    cells = {split: facts["cells"] for split, facts in manifest["splits"].items()}
    print(f"{output}: {sum(cells.values()):,} cells (" + ", ".join(f"{split} {n:,}" for split, n in cells.items()) + ")")
    for source in manifest["sources"]:
        share = source["counts_matched"] / source["counts"] if source["counts"] else 1.0
        print(f"  {source['name']}: {source['kept']:,} of {source['cells']:,} cells kept; {source['genes_matched']:,} of "
              f"{source['genes']:,} genes and {share:.1%} of the counts matched (counts in {source['layer']})")
        for reason, dropped in source["dropped"].items():
            if dropped:
                print(f"    dropped {dropped:,}: {reason.replace('_', ' ')}")
        if source["recovered_counts"]:
            print(f"    counts recovered: {source['recovered_counts']}")
        if source["inexact_counts"]:
            print(f"    inexact counts: {source['inexact_counts']:,} (over {EXACT_COUNT:,}, too large for log1p in float32)")
