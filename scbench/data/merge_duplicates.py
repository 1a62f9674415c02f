"""Cells that several parts of a store have: found by their content, dropped by writing the shards that hold one again.

The rule is that of one run (`splits.keep_once`): of equal cells the one of the first part stays.
"""

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from scbench.data.fingerprints import FINGERPRINTS_FILE
from scbench.data.parts import finished_part
from scbench.data.shard_format import CELLS_FILE, SPLITS, ShardInfo, counts_dtype, too_small_dtypes
from scbench.data.shard_writer import ShardWriter
from scbench.data.splits import keep_once
from scbench.data.store import Split, Store
from scbench.errors import UserError
from scbench.files import sha256


@dataclass(frozen=True, kw_only=True)
class Dropped:
    """Rows of a shard that have to go."""

    part: int  # position of the store among the parts
    shard: ShardInfo
    rows: np.ndarray  # int64
    sources: Counter[str]  # how many are of each source


def find_dropped(stores: Sequence[Store]) -> list[Dropped]:
    """The cells of `stores`, in the order of the parts, that are there already; 8 bytes a cell in memory.

    Raises
    ------
    UserError
        If a table of cells is damaged.
    """
    shards = [(part, store, shard) for part, store in enumerate(stores) for shard in store.shards]
    hashes = np.empty(sum(shard.cells for *_, shard in shards), dtype=np.uint64)
    end = 0
    for _, store, shard in shards:
        _check(store.path, store.manifest["files"], f"{shard.name}/{CELLS_FILE}")
        hashes[end : end + shard.cells] = _column(store, shard, "content_hash")
        end += shard.cells
    hashes.sort()
    repeated = np.unique(hashes[1:][hashes[1:] == hashes[:-1]])
    del hashes
    if len(repeated) == 0:
        return []
    found: list[list[np.ndarray]] = []
    for number, (_, store, shard) in enumerate(shards):
        content = _column(store, shard, "content_hash")
        rows = np.flatnonzero(repeated[np.minimum(np.searchsorted(repeated, content), len(repeated) - 1)] == content)
        split = np.full(len(rows), SPLITS.index(shard.split))
        found.append([
            np.full(len(rows), number), rows, split, content[rows],
            *(_column(store, shard, name)[rows] for name in ("n_genes", "total")),
        ])
    number, rows, split, content, n_genes, total = (np.concatenate(column) for column in zip(*found, strict=True))
    order = np.lexsort((rows, number, total, n_genes, content))
    gone = order[~keep_once(content[order], n_genes[order], total[order], split[order])]
    dropped = []
    for shard_number in np.unique(number[gone]):
        part, store, shard = shards[shard_number]
        mine = np.sort(rows[gone[number[gone] == shard_number]])
        sources = pq.read_table(store.path / shard.name / CELLS_FILE, columns=["source"])["source"].take(pa.array(mine))
        dropped.append(Dropped(part=part, shard=shard, rows=mine, sources=Counter(sources.to_pylist())))
    return dropped


def _check(store: Path, files: Mapping[str, dict], name: str) -> None:
    if sha256(store / name) != files[name]["sha256"]:
        raise UserError(f"{store / name} is damaged (wrong SHA-256): prepare that part again.")


def _column(store: Store, shard: ShardInfo, name: str) -> np.ndarray:
    return pq.read_table(store.path / shard.name / CELLS_FILE, columns=[name])[name].to_numpy()


@dataclass(frozen=True, kw_only=True)
class RewriteTask:
    """A shard of the store `store`, to go into the directory `part` without `rows`."""

    part: Path
    store: Path
    files: dict[str, dict]  # what the manifest says of the shard's
    shard: ShardInfo
    rows: np.ndarray


def rewrite(task: RewriteTask) -> dict:
    """Do a task. Facts: "shard" (ShardInfo fields; None if no cell is left)."""
    return finished_part(task.part, lambda directory: _rewrite(task, directory))


def _rewrite(task: RewriteTask, directory: Path) -> dict:
    old = task.shard
    split = Split(task.store, old.split, [old], task.files)
    keep = np.ones(old.cells, dtype=bool)
    keep[task.rows] = False
    if not keep.any():
        return {"shard": None}
    nnz, too_small = 0, [np.zeros(0, dtype=np.uint8)]
    for _, counts, lengths in _kept(split, keep):
        nnz += len(counts)
        too_small.append(too_small_dtypes(counts, np.concatenate([[0], np.cumsum(lengths)])))
    info = ShardInfo.plan(
        split=old.split, cells=int(keep.sum()), nnz=nnz, counts=counts_dtype(np.concatenate(too_small)),
        vocabulary_size=np.iinfo(old.genes).max + 1,
    )
    writer = ShardWriter(directory, info)
    for cells in _kept(split, keep):
        writer.append(*cells)
    folder = task.store / old.name
    _check(task.store, task.files, f"{old.name}/{FINGERPRINTS_FILE}")
    writer.finish(pq.read_table(folder / CELLS_FILE).filter(pa.array(keep)))
    np.save(directory / FINGERPRINTS_FILE, np.load(folder / FINGERPRINTS_FILE, allow_pickle=False)[keep])
    return {"shard": asdict(info)}


def _kept(split: Split, keep: np.ndarray) -> Iterator[tuple[np.ndarray, np.ndarray, np.ndarray]]:
    """Genes, counts and lengths of the cells that stay, an extent at a time."""
    start = 0
    for number, size in enumerate(split.extent_sizes):
        extent = split.read_extent(number)
        kept = keep[start : start + size]
        lengths = np.diff(extent.offsets)
        tokens = np.repeat(kept, lengths)
        yield extent.genes[tokens], extent.counts[tokens], lengths[kept]
        start += size
