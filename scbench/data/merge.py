"""`scbench merge`: the stores that the jobs of `prepare --part i/n` made become one store, without copying their bytes.

Files are hard-linked; only shards with a cell that an earlier part has too are written again, without it. The shards of
all parts alternate, each part's spread over the whole split. One rename publishes the store.
"""

import errno
import hashlib
import os
import shutil
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import NamedTuple

from scbench.config import MergeConfig
from scbench.data.manifest import write_manifest
from scbench.data.measured import MEASURED_FILE
from scbench.data.merge_duplicates import Dropped, RewriteTask, find_dropped, rewrite
from scbench.data.publish import publish_store, refuse_empty_split, split_sizes
from scbench.data.shard_format import SPLITS, ShardInfo
from scbench.data.store import VOCABULARY_FILE, Store
from scbench.data.workers import Workers
from scbench.data.working import disk_errors, locked, progress_bars
from scbench.errors import RetryError, UserError
from scbench.files import refuse_existing, sync, write_text

SUMMED = ("counts", "counts_matched", "inexact_counts", "fractional_values", "cells", "kept")  # facts of a source
NO_LINKS = (errno.EXDEV, errno.EPERM, errno.EMLINK, errno.EOPNOTSUPP)


def merge(parts: Sequence[Path | str], output: Path | str) -> Store:
    """Join the stores of all n parts of one plan into the store `output`, which must not exist, and open it.

    Parameters
    ----------
    parts
        The stores that ``prepare(…, part="1/n")`` … ``prepare(…, part="n/n")`` made, in any order. They stay as they are,
        and can be removed afterwards.

    Raises
    ------
    UserError
        If a part is missing, given twice, damaged, unfinished or of another plan, or if its files cannot be linked; nothing
        is published then.
    """
    refuse_existing(Path(output))
    stores = _open_parts([Path(part) for part in parts])
    output = Path(output).absolute()
    work = output.with_name(f".merge-{output.name}")
    with disk_errors(work):
        work.mkdir(parents=True, exist_ok=True)
        with locked(work):
            try:
                _merge(stores, work, output)
            except RetryError:
                raise
            except UserError:
                shutil.rmtree(work)
                raise
            shutil.rmtree(work)
    return Store.open(output)


def run_merge(config: MergeConfig) -> dict:
    """The verb: merge, and say what came of it."""
    manifest = merge(config.parts, config.output).manifest
    if not config.json:
        cells = {split: facts["cells"] for split, facts in manifest["splits"].items()}
        print(f"{config.output}: {sum(cells.values()):,} cells of {len(config.parts)} parts ("
              + ", ".join(f"{split} {n:,}" for split, n in cells.items()) + ")")
    return {"store": str(config.output), **{name: manifest[name] for name in ("splits", "vocabulary", "sources")}}


def _open_parts(paths: Sequence[Path]) -> list[Store]:
    """The parts in order; UserError unless they are all the parts of one plan."""
    stores: dict[int, Store] = {}
    of = 0
    for path in paths:
        store = Store.open(path)
        store.check_files()
        if "part" not in store.manifest:
            raise UserError(f"{path} is no part of a store: it was not made with `scbench prepare --part`.")
        first = next(iter(stores.values()), store)
        number, of = store.manifest["part"]["number"], first.manifest["part"]["of"]
        if store.manifest["part"] != {**first.manifest["part"], "number": number}:
            raise UserError(f"{first.path} and {path} are parts of different plans: {_difference(first, store)}; prepare all "
                            "parts by one command, but for --part.")
        if number in stores:
            raise UserError(f"part {number}/{of} is given twice: {stores[number].path} and {path}; leave one out.")
        stores[number] = store
    missing = [str(number) for number in range(1, of + 1) if number not in stores]
    if missing or not stores:
        some = f"{', '.join(missing[:8])}{' …' if len(missing) > 8 else ''} of {of}"
        raise UserError(f"part{'s' * (len(missing) > 1)} {some} missing: give all parts." if stores else "there is no part.")
    return [stores[number] for number in sorted(stores)]


def _difference(first: Store, other: Store) -> str:
    one, two = first.manifest, other.manifest
    if one["part"]["of"] != two["part"]["of"]:
        return f"one is of {one['part']['of']} parts and the other of {two['part']['of']}"
    if one["format_version"] != two["format_version"]:
        return "their formats differ"
    if one["vocabulary"] != two["vocabulary"]:
        return "their vocabularies differ"
    for name, value in one["options"].items():
        if value != two["options"].get(name):
            return f"--{name.replace('_', '-')} is {value!r} in one and {two['options'].get(name)!r} in the other"
    return "their inputs or the versions of scbench differ"


class _Shard(NamedTuple):
    """A shard as the store will have it."""

    order: tuple  # what it is sorted by
    directory: Path  # where its files are now
    info: ShardInfo
    files: dict[str, dict]  # name in the directory → bytes and SHA-256


def _merge(stores: Sequence[Store], work: Path, output: Path) -> None:
    shutil.rmtree(work / "store", ignore_errors=True)  # of a merge that was killed
    plan = hashlib.sha256("".join(store.fingerprint for store in stores).encode()).hexdigest()
    if not (work / "plan").exists() or (work / "plan").read_text() != plan:
        shutil.rmtree(work / "shards", ignore_errors=True)
        write_text(work / "plan", plan)
    sources = _join_sources(stores)
    dropped = find_dropped(stores)
    for cells in dropped:
        for source in sources:
            source["dropped"]["duplicates"] += cells.sources[source["name"]]
            source["kept"] -= cells.sources[source["name"]]
    made = _shards(stores, dropped, work)
    options = stores[0].manifest["options"]
    splits = split_sizes([shard.info for shard in made])
    if options["split_by"]:
        refuse_empty_split(splits, [float(share) for share in options["split"].split(",")])
    if not made:
        raise UserError(f"no cell is left: all have fewer than {options['min_genes']} expressed genes (--min-genes).")
    manifest = stores[0].manifest | {"splits": splits, "sources": sources}
    del manifest["part"]
    if len(stores) > 1:
        manifest["parts"] = len(stores)
    store = work / "store"
    store.mkdir()
    files = {name: manifest["files"][name] for name in (VOCABULARY_FILE, MEASURED_FILE)}
    for name in files:
        _link(stores[0].path / name, store / name)
    manifest["shards"] = []
    for number, shard in enumerate(made):
        name = f"shard-{number:05d}"
        manifest["shards"].append(asdict(replace(shard.info, name=name)))
        for file, facts in shard.files.items():
            _link(shard.directory / file, store / name / file)
            files[f"{name}/{file}"] = facts
    for directory in store.rglob("*/"):
        sync(directory)
    write_manifest(store, manifest | {"files": dict(sorted(files.items()))})
    publish_store(store, output)


def _shards(stores: Sequence[Store], dropped: Sequence[Dropped], work: Path) -> list[_Shard]:
    """The shards of all parts in their new order, those with dropped cells written again."""
    files = [_files_by_shard(store) for store in stores]
    tasks = {
        (cells.part, cells.shard.name): RewriteTask(
            part=work / "shards" / f"{cells.part:05d}-{cells.shard.name}", store=stores[cells.part].path.absolute(),
            files={f"{cells.shard.name}/{file}": facts for file, facts in files[cells.part][cells.shard.name].items()},
            shard=cells.shard, rows=cells.rows,
        )
        for cells in dropped
    }
    with progress_bars() as progress, Workers(min(os.cpu_count(), len(tasks))) as pool:
        advance = progress("writing shards without duplicates", len(tasks))
        rewritten = dict(zip(tasks, pool.map(rewrite, list(tasks.values()), lambda _: advance(1)), strict=True))
    made = []
    for part, store in enumerate(stores):
        for split in SPLITS:
            shards = store.split(split).shards
            for i, shard in enumerate(shards):
                place = (SPLITS.index(split), (2 * i + 1) / len(shards), part)
                result = rewritten.get((part, shard.name))
                if result is None:
                    made.append(_Shard(place, store.path / shard.name, shard, files[part][shard.name]))
                elif result["shard"]:
                    made.append(_Shard(place, tasks[part, shard.name].part, ShardInfo(**result["shard"]), result["files"]))
    return sorted(made, key=lambda shard: shard.order)


def _files_by_shard(store: Store) -> dict[str, dict[str, dict]]:
    files: dict[str, dict[str, dict]] = {}
    for name, facts in store.manifest["files"].items():
        shard, _, file = name.partition("/")
        files.setdefault(shard, {})[file] = facts
    return files


def _link(file: Path, link: Path) -> None:
    link.parent.mkdir(parents=True, exist_ok=True)
    try:
        os.link(file, link)
    except OSError as error:
        if error.errno not in NO_LINKS:
            raise
        raise UserError(f"{file} cannot be hard-linked to where the store is to be ({error.strerror}): put the parts and "
                        "--output on one file system, one that has hard links.") from None


def _join_sources(stores: Sequence[Store]) -> list[dict]:
    """The provenance of each source, over all parts; UserError if a file changed between them, or one was given twice."""
    joined = [_join_source(facts) for facts in zip(*(store.manifest["sources"] for store in stores), strict=True)]
    names: dict[str, str] = {}
    for source in joined:
        other = names.setdefault(source["sha256"], source["name"])
        if other != source["name"]:
            raise UserError(f"the inputs {other} and {source['name']} are the same file: prepare all parts without one.")
    return joined


def _join_source(facts: Sequence[dict]) -> dict:
    joined = {}
    for name, value in facts[0].items():
        values = [fact[name] for fact in facts]
        if name in SUMMED:
            joined[name] = sum(values)
        elif name == "fractional_distance":
            joined[name] = max(values)
        elif name == "dropped":
            joined[name] = {reason: sum(dropped[reason] for dropped in values) for reason in value}
        else:
            known = [value for value in values if value is not None]  # a part says nothing of a file that it didn't read
            if any(value != known[0] for value in known):
                raise UserError(f"{facts[0]['name']} changed between the parts (its {name} differs): prepare them all again.")
            joined[name] = known[0] if known else None
    return joined
