"""`scbench prepare`: files in, a shard store out: cells mapped, deduplicated, split, globally shuffled, in bounded memory.

Two passes over parts that survive a kill (parts.py), in a hidden directory beside the output: scatter.py sorts the cells
of the inputs into runs, gather.py makes the shards of each bucket out of them. One rename publishes the store.
"""

import os
import shutil
from collections.abc import Sequence
from pathlib import Path

from scbench.config import PrepareConfig
from scbench.data.counts import EXACT_COUNT
from scbench.data.gather import gather
from scbench.data.into_rows import rows_tasks, with_rows, write_rows
from scbench.data.plan import Plan, make_plan, or_skip
from scbench.data.publish import publish
from scbench.data.scatter import close_sources, scatter
from scbench.data.store import Store
from scbench.data.tasks import gather_tasks, scatter_tasks, source_facts, without_bad_sources
from scbench.data.workers import Workers, start_server
from scbench.data.working import disk_errors, locked, progress_bars
from scbench.errors import RetryError, UserError
from scbench.files import refuse_existing, write_text
from scbench.kernels import cells as native
from scbench.kernels.native import BuildError


def prepare(inputs: Sequence[Path | str] | Path | str, output: Path | str, **options) -> Store:
    """Make a shard store of files with cells or of a census, and open it.

    The same inputs and options give the same bytes, whatever `workers` is and however often the work was killed.

    Parameters
    ----------
    inputs
        With raw counts: h5ad files, zarr stores of an AnnData, 10x Genomics HDF5 files. The reference implementation's parquet
        files: lists ``genes`` (token ids of ``vocabulary``, which they need) and ``expressions`` (log1p of raw counts).
        Directories of these. ``census:``, ``census:VERSION`` or ``census:URI``, the CELLxGENE Census (with ``filter``,
        ``preset``).
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
    try:
        native.library()  # compiled once, before the workers ask for it
    except BuildError as error:
        raise UserError(f"{error}.") from error
    if workers > 1:
        start_server(["scbench.data.scatter", "scbench.data.gather"])
    output = config.output.absolute()
    work = output.with_name(f".prepare-{output.name}")
    plan = make_plan(config, workers, work)
    with disk_errors(work):
        work.mkdir(parents=True, exist_ok=True)
        with locked(work):
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
    return {"store": str(config.output), **{name: manifest[name] for name in ("splits", "vocabulary", "sources", "skipped")}}


def _prepare(plan: Plan, shares: tuple[float, float, float], workers: int, work: Path, output: Path) -> None:
    _start_over_unless(plan, work)
    with progress_bars() as progress:
        try:
            tasks = rows_tasks(plan, work)
            advance = progress("bringing columns into rows", len(tasks))
            with Workers(min(workers, len(tasks))) as pool:
                plan = with_rows(plan, tasks, pool.map(write_rows, tasks, lambda _: advance(1)))
            tasks = scatter_tasks(plan, work)
            advance = progress("reading", plan.cells)
            with Workers(min(workers, len(tasks))) as pool:
                scattered = pool.map(scatter, tasks, lambda task: advance(task.stop - task.start))
        except RetryError:
            raise
        except UserError as error:
            raise or_skip(error, plan.others) from error
        plan, tasks, scattered = without_bad_sources(plan, tasks, scattered)
        sources = source_facts(plan, tasks, scattered)
        buckets = gather_tasks(plan, shares, tasks, scattered, work)
        advance = progress("writing", len(buckets))
        with Workers(min(workers, len(buckets))) as pool:  # new processes: the first ones' heaps are large and fragmented
            gathered = pool.map(gather, buckets, lambda _: advance(1))
    publish(plan, shares, sources, buckets, gathered, work, output)


def _start_over_unless(plan: Plan, work: Path) -> None:
    """Keep the finished parts of an earlier run in `work` only if it had the same plan, and no half-made ones."""
    fingerprint = work / "plan"
    same = fingerprint.exists() and fingerprint.read_text() == plan.fingerprint()
    if (work / "store").exists():  # killed while the shards were being moved there
        shutil.rmtree(work / "store")
        shutil.rmtree(work / "shards", ignore_errors=True)
    for name in ("rows", "runs", "shards"):
        for leftover in (work / name).glob(".partial-*" if same else "*"):
            shutil.rmtree(leftover)
    write_text(fingerprint, plan.fingerprint())


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
        if source["fractional_values"]:
            what = "kept" if manifest["options"]["fractional"] == "keep" else "rounded"
            print(f"    not whole: {source['fractional_values']:,} values, {what} (up to {source['fractional_distance']:.2g} "
                  "from a whole number)")
        if source["inexact_counts"]:
            print(f"    inexact counts: {source['inexact_counts']:,} (over {EXACT_COUNT:,}, too large for log1p in float32)")
    for skipped in manifest["skipped"]:
        print(f"  left out: {skipped['name']}: {skipped['reason']}")
