"""prepare's second pass: the cells of one bucket, out of all runs, sorted, without duplicates, into a shard a split."""

from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa

from scbench.data.cells import take_ranges
from scbench.data.fingerprint_genes import GeneList
from scbench.data.fingerprints import FINGERPRINTS_FILE, RECORD, barcode_hashes, records
from scbench.data.parts import finished_part
from scbench.data.runs import CELL, Run, shuffle_words
from scbench.data.shard_format import SPLITS, ShardInfo, counts_dtype
from scbench.data.shard_writer import ShardWriter
from scbench.data.splits import keep_once, split_by_word, split_cells

SEGMENT_TOKENS = 1 << 21  # tokens in memory at once


@dataclass(frozen=True, kw_only=True)
class GatherTask:
    """Bucket number `bucket`, to go into the directory `part`: a folder a split, named as in SPLITS."""

    part: Path
    bucket: int
    runs: tuple[Run, ...]
    sources: tuple[str, ...]
    seed: int
    shares: tuple[float, float, float]
    split_of_group: dict[int, int] | None  # group_id -> index into SPLITS; None: split by cell
    one_of_parts: bool  # other jobs make the rest of the store: the split of a cell must not depend on the cells of this one
    bad_sets: tuple[int, ...]  # sets of measured genes whose cells are left out
    vocabulary_size: int
    totals: str  # dtype of the cells' totals in the store
    fingerprint_genes: GeneList


def gather(task: GatherTask) -> dict:
    """Do a task. Facts: the shards written (ShardInfo fields), duplicates of each source, kept cells of each source."""
    facts = finished_part(task.part, lambda directory: _gather(task, directory))
    for pool in (pa.default_memory_pool(), pa.system_memory_pool()):  # the second is malloc's
        pool.release_unused()  # else a process would grow with the buckets that it has done
    return facts


def _gather(task: GatherTask, directory: Path) -> dict:
    bucket = _Bucket(task)
    shards = []
    writers: list[ShardWriter | None] = []
    fingerprints: list[list[np.ndarray]] = [[np.zeros(0, dtype=RECORD)] for _ in SPLITS]
    for split, name in enumerate(SPLITS):
        cells = bucket.cells[bucket.split == split]
        writers.append(None)
        if len(cells) == 0:
            continue
        info = ShardInfo.plan(
            split=name, cells=len(cells), nnz=int(cells["n_genes"].sum(dtype=np.int64)),
            counts=counts_dtype(cells["too_small"]), vocabulary_size=task.vocabulary_size,
        )
        shards.append(asdict(info))
        writers[-1] = ShardWriter(directory / name, info)
    for first, genes, counts, starts in bucket.segments():
        last = first + len(starts)
        for split, writer in enumerate(writers):
            chosen = np.flatnonzero(bucket.split[first:last] == split)
            if writer is not None and len(chosen):
                lengths = bucket.cells["n_genes"][first:last][chosen].astype(np.int64)
                cells = *(take_ranges(values, starts[chosen], lengths) for values in (genes, counts)), lengths
                writer.append(*cells)
                fingerprints[split].append(records(*cells, task.fingerprint_genes))
    obs = bucket.obs()
    for split, writer in enumerate(writers):
        if writer is not None:
            chosen = np.flatnonzero(bucket.split == split)
            table = bucket.table(obs, chosen)
            writer.finish(table)
            made = np.concatenate(fingerprints[split])
            made["content"] = table["content_hash"].to_numpy()
            made["barcode"] = barcode_hashes(table["original_id"].to_pylist())
            made["measured"] = table["measured"].to_numpy()
            np.save(directory / SPLITS[split] / FINGERPRINTS_FILE, made)
    sources = len(task.sources)
    kept = bucket.split >= 0
    return {
        "shards": shards,
        "duplicates": np.bincount(bucket.source[bucket.good & ~kept], minlength=sources).tolist(),
        "kept": np.bincount(bucket.source[kept], minlength=sources).tolist(),
    }


class _Bucket:
    """The cells of a bucket in the store's order.

    Attributes
    ----------
    cells
        CELL [cells], sorted by word, then (for equal contents) n_genes, total, source and row.
    source
        int64 [cells], number of the input.
    good
        bool [cells], not of a dataset that is left out.
    split
        int8 [cells], index into SPLITS; −1 for a duplicate and for a cell that is not good.
    """

    def __init__(self, task: GatherTask):
        self._task = task
        bounds = [_read(run.stem.with_suffix(".buckets"), np.int64, task.bucket, 2) for run in task.runs]
        self._first = np.array([low for low, _ in bounds], dtype=np.int64)  # of each run's slice
        sizes = np.array([high - low for low, high in bounds], dtype=np.int64)
        cells = np.concatenate([np.zeros(0, dtype=CELL), *(
            _read(run.stem.with_suffix(".cells"), CELL, int(first), int(size))
            for run, first, size in zip(task.runs, self._first, sizes, strict=True)
        )])
        run = np.repeat(np.arange(len(task.runs)), sizes)
        source = np.array([run.source for run in task.runs], dtype=np.int64)[run]
        words = shuffle_words(cells["content_hash"], task.seed)
        self._order = np.lexsort((cells["row"], source, cells["total"], cells["n_genes"], words))
        self.cells = cells[self._order]
        self._run = run[self._order]
        self.source = source[self._order]
        self.good = ~np.isin(self.cells["measured"], task.bad_sets)
        self.split = self._assign()

    def _assign(self) -> np.ndarray:
        cells, task = self.cells[self.good], self._task
        if task.split_of_group is not None:
            groups, inverse = np.unique(cells["group"], return_inverse=True)
            split = np.array([task.split_of_group[int(group)] for group in groups], dtype=np.int8)[inverse]
        else:
            by_content = split_by_word if task.one_of_parts else split_cells
            split = by_content(cells["content_hash"], task.shares, task.seed)
        kept = keep_once(cells["content_hash"], cells["n_genes"], cells["total"], split)
        result = np.full(len(self.cells), -1, dtype=np.int8)
        result[self.good] = np.where(kept, split, np.int8(-1))
        return result

    def segments(self) -> Iterator[tuple[int, np.ndarray, np.ndarray, np.ndarray]]:
        """The tokens, some cells at a time: (first cell's number, genes [nnz], counts [nnz], each cell's start in them)."""
        ends = np.cumsum(self.cells["n_genes"], dtype=np.int64)
        first = 0
        while first < len(ends):
            before = ends[first - 1] if first else 0
            last = max(first + 1, int(np.searchsorted(ends, before + SEGMENT_TOKENS, side="right")))
            starts = np.zeros(last - first, dtype=np.int64)
            genes, counts = [], []
            read = 0
            # a run is in the store's order too, so its cells of this segment lie side by side
            for number in np.unique(self._run[first:last]):
                run = self._task.runs[number]
                mine = np.flatnonzero(self._run[first:last] == number)
                cells = self.cells[first:last][mine]
                tokens = int(cells["n_genes"].sum(dtype=np.int64))
                token = int(cells["first_token"][0])
                genes.append(_read(run.stem.with_suffix(".genes"), run.genes, token, tokens))
                counts.append(_read(run.stem.with_suffix(".counts"), run.counts, token, tokens))
                starts[mine] = cells["first_token"] - token + read
                read += tokens
            yield first, np.concatenate(genes), np.concatenate(counts), starts
            first = last

    def obs(self) -> pa.Table:
        """original_id and the kept columns of obs of each cell, in order."""
        tables = []
        sizes = np.bincount(self._run, minlength=len(self._task.runs))
        for run, first, size in zip(self._task.runs, self._first, sizes, strict=True):
            with pa.memory_map(str(run.stem.with_suffix(".obs"))) as file:
                tables.append(pa.ipc.open_file(file).read_all().slice(int(first), int(size)))
        return pa.concat_tables(tables).take(self._order)

    def table(self, obs: pa.Table, chosen: np.ndarray) -> pa.Table:
        """cells.parquet of the cells `chosen`."""
        cells = self.cells[chosen]
        source = pa.DictionaryArray.from_arrays(self.source[chosen].astype(np.int32), list(self._task.sources))
        obs = obs.take(chosen)
        columns = {
            "source": source.cast(pa.string()),
            "measured": cells["measured"],
            "original_id": obs["original_id"],
            "content_hash": cells["content_hash"],
            "n_genes": cells["n_genes"],
            "total": cells["total"].astype(self._task.totals),
        }
        columns |= {name: obs[name] for name in obs.column_names if name not in columns}
        return pa.table(columns)


def _read(path: Path, dtype: np.dtype | str, first: int, length: int) -> np.ndarray:
    """`length` elements of a file from element `first`, read rather than mapped: mapped pages would count as memory."""
    dtype = np.dtype(dtype)
    return np.fromfile(path, dtype=dtype, count=length, offset=first * dtype.itemsize)
