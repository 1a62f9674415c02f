"""prepare's first pass: cells of the inputs, mapped to tokens, scattered over the buckets of the shuffle.

A task reads a range of rows of one input and writes *runs*: files of cells sorted by their keyed word. A bucket (an
interval of words) is then one slice of each run, and the second pass (gather.py) never looks at the inputs again.
"""

from collections import Counter
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from scbench.data.cells import CellTokens, content_hash, take_ranges, to_tokens, wide
from scbench.data.gene_identity import GeneMap
from scbench.data.obs import Obs, ObsColumn, obs_table
from scbench.data.parts import finished_part
from scbench.data.runs import CELL, bucket_bounds, shuffle_words
from scbench.data.shard_format import counts_dtype, too_small_dtypes
from scbench.data.sources.anndata import AnnDataSource
from scbench.data.sources.census import CensusSource
from scbench.data.sources.inputs import SourceOptions, open_obs, open_source
from scbench.data.sources.parquet import ParquetSource
from scbench.data.splits import Group, group_id
from scbench.errors import RetryError, UserError

FIRST_ROWS = 256  # read at first, to learn how many values a cell has
SET_FACTS = (
    "cells", "below_min_genes", "counts", "counts_matched", "inexact_counts", "fractional_values", "fractional_distance",
)
READ_VALUES = 1 << 18  # values read at once after that: mapping them takes about 80 bytes each, little more than a cache
RUN_TOKENS = 1 << 24  # tokens in memory before a run is written
WRITE_TOKENS = 1 << 17  # tokens brought into order at once


@dataclass(frozen=True, kw_only=True)
class ScatterTask:
    """Rows `start` … `stop`−1 of an input, to go into the directory `part`."""

    part: Path
    source: SourceOptions
    gene_map: GeneMap
    start: int
    stop: int
    min_genes: int
    seed: int
    buckets: int
    genes_dtype: str
    obs_columns: tuple[ObsColumn, ...]
    skip_bad: bool  # give what is wrong with the input as a fact, "problem", instead of raising it
    split_by: tuple[str, ...]
    first_set: int  # number of the input's first set of measured genes
    datasets: tuple[str, ...]  # of a census, in the order of its sets; () for others, which have one


@lru_cache(maxsize=1)
def _open_source(options: SourceOptions) -> AnnDataSource | ParquetSource | CensusSource:
    """The input, kept open in this process for its next task."""
    return open_source(options)


@lru_cache(maxsize=1)
def _open_obs(options: SourceOptions) -> Obs:
    return open_obs(options)


def close_sources() -> None:
    """Close what this process keeps open for its next task."""
    _open_source.cache_clear()
    _open_obs.cache_clear()


def scatter(task: ScatterTask) -> dict:
    """Do a task. Facts: "runs", their cells and counts dtypes; "sets", for each set of measured genes SET_FACTS and the
    cells of each group; "bad", for each set that is left out, what is wrong with its dataset."""
    return finished_part(task.part, lambda directory: _scatter_unless_bad(task, directory), durable=False)


def _scatter_unless_bad(task: ScatterTask, directory: Path) -> dict:
    try:
        return _scatter(task, directory)
    except RetryError:
        raise
    except UserError as error:
        if not task.skip_bad:
            raise
        for file in directory.iterdir():
            file.unlink()
        return {"problem": str(error)}


def _scatter(task: ScatterTask, directory: Path) -> dict:
    source, obs = _open_source(task.source), _open_obs(task.source)
    writer = _RunWriter(task, obs, directory)
    sets: dict[int, dict] = {}
    bad: dict[int, str] = {}
    start, rows = task.start, FIRST_ROWS
    while start < task.stop:
        measured, stop = _one_set(task, obs, start, min(start + rows, task.stop))
        if measured not in bad:
            try:
                counts = source.read(start, stop)
            except RetryError:
                raise
            except UserError as error:
                if not (task.skip_bad and task.datasets):
                    raise
                bad[measured] = str(error)
            else:
                rows = max(1, READ_VALUES * (stop - start) // max(1, len(counts.counts)))
                tokens = to_tokens(counts, task.gene_map)
                keep = np.diff(tokens.offsets) >= task.min_genes
                facts = sets.setdefault(measured, dict.fromkeys(SET_FACTS, 0))
                facts["cells"] += len(keep)
                facts["below_min_genes"] += int(np.count_nonzero(~keep))
                facts["counts"] += tokens.totals.sum().item()
                facts["counts_matched"] += wide(tokens.counts).sum().item()
                facts["inexact_counts"] += int(np.count_nonzero(counts.counts > source.exact_up_to))
                facts["fractional_values"] += counts.fractional
                facts["fractional_distance"] = max(facts["fractional_distance"], counts.distance)
                writer.append(tokens, np.flatnonzero(keep), start, measured)
        start = stop
    writer.flush()
    for measured, facts in sets.items():
        facts["groups"] = [[list(group), cells] for (of, group), cells in sorted(writer.groups.items()) if of == measured]
    return {"runs": writer.runs, "sets": sets, "bad": bad}


def _one_set(task: ScatterTask, obs: Obs, start: int, stop: int) -> tuple[int, int]:
    """The set of measured genes of cell `start`, and where the cells from there to `stop` have another: a read stays in one
    dataset of a census, so that one bad dataset is told from the others."""
    if not task.datasets:
        return task.first_set, stop
    datasets = obs.read("dataset_id", start, stop)
    same = pc.equal(datasets, datasets[0]).to_numpy(zero_copy_only=False)
    return task.first_set + task.datasets.index(datasets[0].as_py()), stop if same.all() else start + int(same.argmin())


class _RunWriter:
    """Collects kept cells and writes them, sorted, as run-0, run-1, … of a part."""

    def __init__(self, task: ScatterTask, source_obs: Obs, directory: Path):
        self.runs: list[dict] = []
        self.groups: Counter[tuple[int, Group]] = Counter()  # cells of each set of measured genes and group
        self._task, self._source_obs, self._directory = task, source_obs, directory
        self._clear()

    def _clear(self) -> None:
        self._cells: list[np.ndarray] = []
        self._genes: list[np.ndarray] = []
        self._counts: list[np.ndarray] = []
        self._tokens = 0

    def append(self, tokens: CellTokens, keep: np.ndarray, first_row: int, measured: int) -> None:
        """Add the cells `keep` (positions in `tokens`, whose first cell is row `first_row`), of one set of measured genes."""
        cells = np.zeros(len(keep), dtype=CELL)
        lengths = np.diff(tokens.offsets)
        cells["content_hash"] = content_hash(tokens.genes, tokens.counts, tokens.offsets)[keep]
        cells["row"] = first_row + keep
        cells["total"] = tokens.totals[keep]
        cells["first_token"] = self._tokens + tokens.offsets[keep]
        cells["n_genes"] = lengths[keep]
        cells["measured"] = measured
        too_small = too_small_dtypes(tokens.counts, tokens.offsets)
        cells["too_small"] = too_small[keep]
        self._cells.append(cells)
        self._genes.append(tokens.genes.astype(self._task.genes_dtype, copy=False))
        self._counts.append(tokens.counts.astype(counts_dtype(too_small), copy=False))
        self._tokens += len(tokens.genes)
        if self._tokens >= RUN_TOKENS:
            self.flush()

    def flush(self) -> None:
        """Write the collected cells as a run."""
        cells = np.concatenate([np.zeros(0, dtype=CELL), *self._cells])
        if len(cells) == 0:
            self._clear()
            return
        first_row = int(cells["row"][0])
        obs = obs_table(self._source_obs, first_row, int(cells["row"][-1]) + 1, self._task.obs_columns)
        obs = obs.take(cells["row"] - first_row)
        if self._task.split_by:
            groups = list(zip(*(obs[column].cast(pa.string()).to_pylist() for column in self._task.split_by), strict=True))
            self.groups.update(zip(cells["measured"].tolist(), groups, strict=True))
            ids = {group: group_id(group) for group in set(groups)}
            cells["group"] = [ids[group] for group in groups]
        words = shuffle_words(cells["content_hash"], self._task.seed)
        order = np.lexsort((cells["row"], cells["total"], cells["n_genes"], words))  # the store's own order
        cells, words = cells[order], words[order]
        lengths = cells["n_genes"].astype(np.int64)
        starts = cells["first_token"].copy()
        cells["first_token"] = np.cumsum(lengths) - lengths
        dtype = counts_dtype(cells["too_small"])
        run = self._directory / f"run-{len(self.runs)}"
        bounds = np.searchsorted(words, bucket_bounds(self._task.buckets))
        _write(run.with_suffix(".cells"), cells)
        _write(run.with_suffix(".buckets"), np.concatenate([[0], bounds, [len(cells)]]).astype(np.int64))
        genes, counts = np.concatenate(self._genes), np.concatenate(self._counts)
        self._genes, self._counts = [], []
        with open(run.with_suffix(".genes"), "wb") as to_genes, open(run.with_suffix(".counts"), "wb") as to_counts:
            for piece in np.array_split(np.arange(len(cells)), -(-self._tokens // WRITE_TOKENS) or 1):
                to_genes.write(take_ranges(genes, starts[piece], lengths[piece]))
                to_counts.write(take_ranges(counts, starts[piece], lengths[piece]).astype(dtype, copy=False))
        obs = obs.take(order).combine_chunks()
        with pa.OSFile(str(run.with_suffix(".obs")), "wb") as file, pa.ipc.new_file(file, obs.schema) as writer:
            writer.write_table(obs)
        self.runs.append({"cells": len(cells), "counts": dtype})
        self._clear()


def _write(path: Path, array: np.ndarray) -> None:
    path.write_bytes(array)  # not tofile: its error on a full disk has no errno
