"""`scbench prepare` beside the ways of making training files that are in use: cells a second, memory, bytes a cell.

    python benchmarks/prepare.py DATA/heart_san.h5ad DATA/pbmc3k.h5ad --json prepare.json

reference          the reference's way: a file in memory, then in Python for each cell its dense row, the non-zero genes, their
                   ids, log1p, appended to a list; a pandas frame to parquet (lists of float32). Written after its files and
                   its description, with NumPy inside a cell
plain_rows         the same over the rows of the sparse matrix as they are: no dense row
plain_vectorised   the best of plain pandas and pyarrow: no loop over cells at all
scbench            prepare, which also hashes every cell, drops copies, splits, shuffles globally, and can be killed; --workers

Real cells are repeated and thinned up to --cells and written as h5ad, CSR and CSC. First, what each wrote is read again and
compared, cell by cell: who fails gets no number. Each measurement is a fresh process that has imported its packages; the input
is in the page cache, outputs are written through it, and scbench flushes its files to the disk. Rounds go over all builders.
"""

import contextlib
import multiprocessing
import shutil
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Mapping
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, NamedTuple

import anndata
import machine
import numpy as np
import pandas as pd
import psutil
import pyarrow as pa
import pyarrow.parquet as pq
import scipy.sparse as sp
import tyro
from record import percentiles, print_table, write
from thinned import read_cells, repeat
from tyro.conf import Positional

from scbench.data.cells import content_hash
from scbench.data.prepare import prepare
from scbench.data.shard_format import SPLITS
from scbench.data.store import Store
from scbench.data.vocabulary import Vocabulary
from scbench.errors import UserError

IDENTITY = ("builder", "matrix", "workers")
POLL_SECONDS = 0.05
Matrix = Literal["csr", "csc"]


@dataclass(frozen=True, kw_only=True)
class PrepareOptions:
    """Time the making of training files."""

    inputs: Positional[tuple[Path, ...]]
    """h5ad files with raw counts in X."""
    cells: int = 50_000
    """Cells to have at least."""
    matrices: tuple[Matrix, ...] = ("csr", "csc")
    """How the input is stored."""
    workers: tuple[int, ...] = (1, 2)
    """Processes of scbench."""
    rounds: int = 3
    """Measurements of each builder."""
    seed: int = 0
    """Of the cells."""
    work: Path | None = None
    """Where to put the files (removed afterwards)."""
    json: Path | None = None
    """File for the rows; a long CSV is written beside it."""

    def __post_init__(self) -> None:
        if not self.inputs or not self.matrices or not self.workers:
            raise UserError("name one h5ad file or more, and at least one of --matrices and of --workers.")
        if self.rounds < 1 or min(self.workers) < 1:
            raise UserError("--rounds and --workers must be at least 1.")
        if self.json is not None and self.json.suffix == ".csv":
            raise UserError(f"--json {self.json} would be overwritten by the CSV beside it: name it .json.")


def build_reference(files: list[Path], vocabulary: Path, output: Path, workers: int) -> None:
    """As the reference does."""
    del workers
    _build_by_row(files, vocabulary, output, _dense_row)


def build_plain_rows(files: list[Path], vocabulary: Path, output: Path, workers: int) -> None:
    """Cell by cell, but from the sparse matrix."""
    del workers
    _build_by_row(files, vocabulary, output, _sparse_row)


def _dense_row(counts: sp.csr_matrix, cell: int) -> tuple[np.ndarray, np.ndarray]:
    row = counts[cell].toarray().ravel()
    columns = np.nonzero(row)[0]
    return columns, row[columns]


def _sparse_row(counts: sp.csr_matrix, cell: int) -> tuple[np.ndarray, np.ndarray]:
    row = slice(counts.indptr[cell], counts.indptr[cell + 1])
    return counts.indices[row], counts.data[row]


def _build_by_row(files: list[Path], vocabulary: Path, output: Path, read_row: Callable) -> None:
    output.mkdir()
    tokens = Vocabulary.load(vocabulary).tokens
    for number, file in enumerate(files):
        cells = anndata.read_h5ad(file)
        counts = cells.X.tocsr()
        ids = _ids(cells, tokens)
        rows = []
        for cell in range(cells.n_obs):
            columns, values = read_row(counts, cell)
            genes = ids[columns]
            known = genes >= 0
            rows.append({"genes": genes[known], "expressions": np.log1p(values[known])})
        pd.DataFrame(rows).to_parquet(output / f"combined_data_{number}.parquet")


def build_plain_vectorised(files: list[Path], vocabulary: Path, output: Path, workers: int) -> None:
    """The same files without a loop over cells."""
    del workers
    output.mkdir()
    tokens = Vocabulary.load(vocabulary).tokens
    for number, file in enumerate(files):
        cells = anndata.read_h5ad(file)
        counts = cells.X.tocsr()
        genes = _ids(cells, tokens)[counts.indices]
        known = genes >= 0
        offsets = pa.array(np.concatenate([[0], np.cumsum(known)])[counts.indptr].astype(np.int32))
        table = pa.table({
            "genes": pa.ListArray.from_arrays(offsets, pa.array(genes[known])),
            "expressions": pa.ListArray.from_arrays(offsets, pa.array(np.log1p(counts.data[known]))),
        })
        pq.write_table(table, output / f"combined_data_{number}.parquet")


def _ids(cells: anndata.AnnData, tokens: Mapping[str, int]) -> np.ndarray:
    """The token of each column, float32 as the reference stores them; −1 for genes that are none."""
    return np.array([tokens.get(name, -1) for name in cells.var_names], dtype=np.float32)


def build_scbench(files: list[Path], vocabulary: Path, output: Path, workers: int) -> None:
    """Ours."""
    prepare(files, output, vocabulary=vocabulary, workers=workers)


BUILDERS = {
    "reference": build_reference, "plain_rows": build_plain_rows, "plain_vectorised": build_plain_vectorised,
    "scbench": build_scbench,
}


class Built(NamedTuple):
    """One measurement."""

    seconds: float
    peak_bytes: int


def build(name: str, files: list[Path], vocabulary: Path, output: Path, workers: int) -> Built:
    """Run a builder in a fresh process; its memory is looked at from here, that of its children included."""
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
        process = psutil.Process(pool.submit(_process_id).result())
        peak, done = [0], threading.Event()
        watching = threading.Thread(target=_watch, args=(process, peak, done))
        watching.start()
        try:
            seconds = pool.submit(_timed, name, files, vocabulary, output, workers).result()
        finally:
            done.set()
            watching.join()
    return Built(seconds, peak[0])


def _process_id() -> int:
    return psutil.Process().pid


def _timed(name: str, *arguments) -> float:
    start = time.perf_counter()
    BUILDERS[name](*arguments)
    return time.perf_counter() - start


def _watch(process: psutil.Process, peak: list[int], done: threading.Event) -> None:
    """The largest sum of resident memory over a process and its descendants."""
    while True:
        resident = 0
        with contextlib.suppress(psutil.Error):  # a child may end meanwhile: the next look finds the others
            resident = sum(one.memory_info().rss for one in [process, *process.children(recursive=True)])
        peak[0] = max(peak[0], resident)
        if done.wait(POLL_SECONDS):
            return


def parquet_hashes(folder: Path) -> np.ndarray:
    """The content hash of every cell of parquet files, sorted."""
    hashes = []
    for file in sorted(folder.glob("*.parquet")):
        table = pq.read_table(file).combine_chunks()
        genes, expressions = (table[name].chunk(0) for name in ("genes", "expressions"))
        counts = np.rint(np.expm1(expressions.values.to_numpy().astype(np.float64)))
        tokens = (array.astype(np.uint32) for array in (genes.values.to_numpy(), counts))
        hashes.append(content_hash(*tokens, genes.offsets.to_numpy().astype(np.int64)))
    return np.sort(np.concatenate(hashes))


def store_hashes(path: Path) -> np.ndarray:
    """The same of a store: taken of what its extents hold."""
    hashes = []
    for split in map(Store.open(path).split, SPLITS):
        hashes += [content_hash(*split.read_extent(extent)) for extent in range(len(split.extent_sizes))]
    return np.sort(np.concatenate(hashes))


def failure(got: np.ndarray, expected: np.ndarray) -> str | None:
    """What is wrong with a builder's cells, or None. Copies may be gone."""
    wanted = np.unique(expected)
    if np.array_equal(np.unique(got), wanted):
        return None
    return f"failed: {len(np.setxor1d(got, wanted))} cells differ from those of the reference"


def _write_inputs(options: PrepareOptions, folder: Path) -> tuple[dict[Matrix, list[Path]], Path, float]:
    """The files of each matrix, the vocabulary of their genes, and the median number of genes a cell."""
    rng = np.random.default_rng(options.seed)
    inputs = [read_cells(file) for file in options.inputs]
    copies = -(-options.cells // sum(cells.n_obs for cells in inputs))
    files: dict[Matrix, list[Path]] = {matrix: [] for matrix in options.matrices}
    lengths = []
    for number, cells in enumerate(inputs):
        cells = repeat(cells, copies, rng)
        lengths.append(np.diff(cells.X.indptr))
        for matrix in options.matrices:
            files[matrix].append(folder / f"{matrix}-{number}.h5ad")
            stored = cells.X if matrix == "csr" else cells.X.tocsc()
            anndata.AnnData(stored, obs=cells.obs, var=cells.var).write_h5ad(files[matrix][-1])
    vocabulary = folder / "vocabulary.json"
    Vocabulary.build(gene for cells in inputs for gene in cells.var_names).save(vocabulary)
    return files, vocabulary, float(np.median(np.concatenate(lengths)))


def measure(options: PrepareOptions) -> list[dict]:
    """A row for each builder, matrix and number of workers."""
    with tempfile.TemporaryDirectory(dir=options.work, prefix="prepare-") as name:
        folder = Path(name)
        inputs, vocabulary, median_genes = _write_inputs(options, folder)
        keys = [(builder, matrix, workers) for matrix in options.matrices for builder in BUILDERS
                for workers in (options.workers if builder == "scbench" else (1,))]
        built: dict[tuple, list[Built]] = {key: [] for key in keys}
        status: dict[tuple, str] = {}
        sizes: dict[tuple, int] = {}
        expected = None
        for round_number in range(options.rounds):
            for key in keys:
                builder, matrix, workers = key
                output = folder / f"{builder}-{matrix}-{workers}-{round_number}"
                built[key].append(build(builder, inputs[matrix], vocabulary, output, workers))
                if round_number == 0:
                    sizes[key] = sum(file.stat().st_size for file in output.rglob("*") if file.is_file())
                    hashes = store_hashes(output) if builder == "scbench" else parquet_hashes(output)
                    expected = hashes if expected is None else expected
                    status[key] = failure(hashes, expected) or "ok"
                shutil.rmtree(output)
    cells = len(expected)
    settings = {
        "inputs": [file.name for file in options.inputs], "cells": cells, "median_genes": median_genes,
        "rounds": options.rounds, "seed": options.seed, "cache": "warm",
    }
    rows = []
    for key in keys:
        good = status[key] == "ok"
        rows.append({
            **dict(zip(IDENTITY, key, strict=True)),
            "status": status[key],
            "cells_per_second": percentiles([cells / one.seconds for one in built[key]]) if good else None,
            "peak_bytes": max(one.peak_bytes for one in built[key]) if good else None,
            "bytes_per_cell": sizes[key] / cells if good else None,
            "settings": settings,
        })
    return rows


def main(arguments: list[str] | None = None) -> None:
    """Measure, print, write."""
    options = tyro.cli(PrepareOptions, args=arguments, description=__doc__)
    rows = measure(options)
    base = {row["matrix"]: row["cells_per_second"] for row in rows if row["builder"] == "reference"}
    lines = []
    for row in rows:
        speed = row["cells_per_second"]
        numbers = [row["status"], "", "", ""] if speed is None else [
            f"{speed['median']:,.0f} ({speed['p20']:,.0f}-{speed['p80']:,.0f})",
            f"{speed['median'] / base[row['matrix']]['median']:.2f}",
            f"{row['peak_bytes'] / 1e6:,.0f}", f"{row['bytes_per_cell']:,.0f}",
        ]
        lines.append([row["builder"], row["matrix"], str(row["workers"]), *numbers])
    print_table(["builder", "matrix", "workers", "cells/s (p20-p80)", "x reference", "peak MB", "bytes a cell"], lines)
    if options.json is not None:
        write(options.json, rows, machine.describe(), IDENTITY)


if __name__ == "__main__":
    try:
        main()
    except UserError as error:
        print(f"prepare.py: {error}", file=sys.stderr)
        raise SystemExit(2) from None
