"""The end of prepare: the shards of all buckets become one store, at once."""

import os
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np

from scbench.data.fingerprint_genes import gene_list
from scbench.data.fingerprints import FORMAT_VERSION as FINGERPRINTS_FORMAT
from scbench.data.gather import GatherTask
from scbench.data.manifest import write_manifest
from scbench.data.measured import MEASURED_FILE
from scbench.data.plan import Plan
from scbench.data.shard_format import BLOCK_CELLS, FORMAT_VERSION, SPLITS, ShardInfo, genes_dtype
from scbench.data.store import VOCABULARY_FILE
from scbench.errors import UserError
from scbench.files import refuse_existing, sha256, sync


def publish(
    plan: Plan,
    shares: tuple[float, float, float],
    sources: dict[int, dict],
    tasks: Sequence[GatherTask],
    gathered: Sequence[dict],
    work: Path,
    output: Path,
) -> None:
    """Move the shards into one directory, write the manifest, and rename the directory to `output`."""
    for i, source in sources.items():
        source["dropped"]["duplicates"] = sum(result["duplicates"][i] for result in gathered)
        source["kept"] = sum(result["kept"][i] for result in gathered)
    made = [
        (task, result, ShardInfo(**shard))
        for task, result in zip(tasks, gathered, strict=True)
        for shard in result["shards"]
    ]
    made.sort(key=lambda item: SPLITS.index(item[2].split))  # stable: a split's shards lie side by side, in bucket order
    splits = split_sizes([info for *_, info in made])
    if plan.config.split_by and not plan.one_of_parts:
        refuse_empty_split(splits, shares)
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
        "sources": list(sources.values()),
        "skipped": list(plan.skipped),
        **({"part": {**plan.part._asdict(), "plan": plan.common_fingerprint()}} if plan.part else {}),
        "files": dict(sorted(files.items())),
    })
    publish_store(store, output)


def split_sizes(shards: Sequence[ShardInfo]) -> dict[str, dict]:
    """What the manifest says of each split."""
    return {
        split: {name: sum(getattr(shard, name) for shard in shards if shard.split == split) for name in ("cells", "nnz")}
        for split in SPLITS
    }


def refuse_empty_split(splits: dict[str, dict], shares: Sequence[float]) -> None:
    """UserError if nothing is left of the groups of a split that should have some."""
    for split, share in zip(SPLITS, shares, strict=True):
        if share > 0 and splits[split]["cells"] == 0:
            raise UserError(f"the {split} split is empty, because all cells of its groups are duplicates: use another --seed.")


def publish_store(store: Path, output: Path) -> None:
    """Rename a whole store to `output`."""
    refuse_existing(output)
    if output.is_dir():
        output.rmdir()
    os.replace(store, output)
    sync(output.parent)
