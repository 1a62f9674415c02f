"""`scbench info` and `scbench verify`: what a store holds, and whether every byte of it is right."""

import os
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from rich.progress import track

from scbench.config import InfoConfig, VerifyConfig
from scbench.data.shard_format import CELLS_FILE, SPLITS, ShardInfo
from scbench.data.store import DIGEST_FILE, MANIFEST_FILE, Extent, Store
from scbench.errors import UserError
from scbench.files import sha256


def info(store: Store) -> dict:
    """What the store holds, JSON-able: splits, vocabulary, bytes, sources. Reads one column of each cells.parquet in turn."""
    splits = {}
    for name in SPLITS:
        split = store.split(name)
        histogram = np.zeros(1, dtype=np.int64)  # of n_genes: memory doesn't grow with the cells
        for shard in split.shards:
            n_genes = pq.read_table(store.path / shard.name / CELLS_FILE, columns=["n_genes"])["n_genes"].to_numpy()
            counts = np.bincount(n_genes, minlength=len(histogram))
            counts[: len(histogram)] += histogram
            histogram = counts
        splits[name] = {
            "cells": split.n_cells, "tokens": split.n_tokens, "shards": len(split.shards),
            "extents": len(split.extent_sizes), "median_genes": _median(histogram),
        }
    return {
        "store": str(store.path),
        "fingerprint": store.fingerprint,
        "format_version": store.manifest["format_version"],
        "parts": _parts(store.manifest),
        "bytes": sum(file["bytes"] for file in store.manifest["files"].values()),
        "vocabulary": store.manifest["vocabulary"],
        "splits": splits,
        "obs_columns": store.manifest["obs_columns"],
        "sources": store.manifest["sources"],
        "measured": store.manifest.get("measured", []),
    }


def _measured(sets: list[dict], source: str) -> str:
    """How many genes of the vocabulary a source measured; of a census, its datasets."""
    genes = [measured["genes"] for measured in sets if measured["source"] == source]
    if len(genes) < 2:
        return "".join(f", {n:,} genes measured" for n in genes)
    return f", {min(genes):,} to {max(genes):,} genes measured by its {len(genes):,} datasets"


def _parts(manifest: dict) -> str | None:
    """What to say of a store that several jobs made, or of what one of them made."""
    if "part" in manifest:
        return f"part {manifest['part']['number']} of {manifest['part']['of']}, to be merged with the others"
    return f"merged from {manifest['parts']} parts" if "parts" in manifest else None


def verify(store: Store) -> dict:
    """Check every byte of an opened store: digests, checksums of blocks, and that the cells make sense.

    Returns
    -------
    JSON-able: files, bytes and cells checked, and "unknown_files", names of files that the manifest doesn't list.

    Raises
    ------
    UserError
        Names the first file that is damaged.
    """
    files = store.manifest["files"]
    store.check_files()
    with ThreadPoolExecutor(os.cpu_count()) as pool:  # hashing releases the GIL
        digests = pool.map(lambda name: sha256(store.path / name), files)
        for name, digest in _watched(zip(files, digests, strict=True), "hashing", len(files)):
            if digest != files[name]["sha256"]:
                raise UserError(f"{store.path / name} is damaged (wrong SHA-256): restore it or prepare the store again.")
    size = store.vocabulary.size
    for name in SPLITS:
        split = store.split(name)
        extents = len(split.extent_sizes)
        for extent in _watched(range(extents), f"checking {name}", extents):
            _check_extent(store, split.read_extent(extent), size, f"extent {extent} of the {name} split")
        for shard in split.shards:
            _check_table(store, shard)
    there = {path.relative_to(store.path).as_posix() for path in store.path.rglob("*") if not path.is_dir()}
    return {
        "store": str(store.path),
        "files": len(files),
        "bytes": sum(file["bytes"] for file in files.values()),
        "cells": sum(shard.cells for shard in store.shards),
        "unknown_files": sorted(there - set(files) - {MANIFEST_FILE, DIGEST_FILE}),
    }


def run_info(config: InfoConfig) -> dict:
    """The verb: say what a store holds."""
    facts = info(Store.open(config.store))
    if not config.json:
        print(f"{facts['store']}: format {facts['format_version']}, {facts['bytes'] / 1e6:,.1f} MB, "
              f"fingerprint {facts['fingerprint'][:12]}")
        if facts["parts"]:
            print(f"  {facts['parts']}")
        print(f"  vocabulary: {facts['vocabulary']['tokens']:,} tokens, fingerprint {facts['vocabulary']['fingerprint'][:12]}")
        for name, split in facts["splits"].items():
            print(f"  {name}: {split['cells']:,} cells, {split['tokens']:,} tokens, {split['median_genes']:g} genes in the "
                  f"median cell, {split['shards']} shards, {split['extents']} extents")
        for source in facts["sources"]:
            print(f"  from {source['name']}: {source['kept']:,} cells, {source['organism']}, counts in {source['layer']}"
                  f"{_measured(facts['measured'], source['name'])}")
        if facts["obs_columns"]:
            print(f"  kept of obs: {', '.join(facts['obs_columns'])}")
    return facts


def run_verify(config: VerifyConfig) -> dict:
    """The verb: check a store."""
    facts = verify(Store.open(config.store))
    if not config.json:
        print(f"{facts['store']}: OK ({facts['files']} files, {facts['bytes'] / 1e6:,.1f} MB, {facts['cells']:,} cells)")
        for name in facts["unknown_files"]:
            print(f"  not part of the store: {name}")
    return facts


def _watched(items: Iterator | range, title: str, total: int) -> Iterator:
    return track(items, title, total, transient=True, disable=not sys.stdout.isatty())


def _median(histogram: np.ndarray) -> float:
    """The median of the values that a histogram of 0, 1, 2, … counts; 0 without values."""
    cumulative = np.cumsum(histogram)
    n = int(cumulative[-1])
    if n == 0:
        return 0.0
    low, high = (int(np.searchsorted(cumulative, rank, side="right")) for rank in ((n - 1) // 2, n // 2))
    return (low + high) / 2


def _check_extent(store: Store, extent: Extent, vocabulary_size: int, place: str) -> None:
    """UserError unless tokens are in the vocabulary and ascend in each cell, and counts are positive."""
    genes = extent.genes.astype(np.int64)
    ascending = np.diff(genes) > 0
    starts = extent.offsets[1:-1]
    ascending[starts[(starts > 0) & (starts < len(genes))] - 1] = True  # a new cell may start anywhere
    for wrong, problem in (
        (len(genes) > 0 and genes.max() >= vocabulary_size, "a gene outside the vocabulary"),
        (not ascending.all(), "genes out of order"),
        (not extent.counts.all(), "a count of 0"),
        (not ((extent.counts >= 0) & np.isfinite(extent.counts)).all(), "a count that is none"),
    ):
        if wrong:
            raise UserError(f"{store.path} holds {problem} in {place}: prepare the store again.")


def _check_table(store: Store, shard: ShardInfo) -> None:
    """UserError unless cells.parquet has the shard's cells and tokens."""
    path = store.path / shard.name / CELLS_FILE
    try:
        n_genes = pq.read_table(path, columns=["n_genes"])["n_genes"].to_numpy()
    except (OSError, KeyError, pa.ArrowInvalid) as error:
        raise UserError(f"{path} cannot be read ({error}): prepare the store again.") from error
    if len(n_genes) != shard.cells or int(n_genes.sum(dtype=np.int64)) != shard.nnz:
        raise UserError(f"{path} has not the cells of its shard: prepare the store again.")
