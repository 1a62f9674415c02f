"""Does a store of 10⁸ cells open and load as one of 10⁵ does? Time to the first batch, and memory, over the number of cells.

    python benchmarks/scale.py --json scale.json
    python benchmarks/scale.py --cells 100000 100000000 --folder FOLDER

Each store has the files of a real one, of real sizes (10⁸ cells: 10⁵ files, 0.5 TB), but `genes` and `counts` are holes that
read as zeros: made in a minute, a few GB on the disk. Checksums, offsets and headers are real, so everything that opening
and reading check is checked. What zeros can't show is the disk's speed and the sampling of genes: every cell expresses token
0 many times with count 0. Each measurement is a fresh process that has imported scbench; rounds go over all stores, so that
a busy machine is unfair to all alike. The files' directory entries are in the page cache.
"""

import multiprocessing
import sys
import tempfile
import time
from dataclasses import asdict, dataclass, replace
from functools import lru_cache
from itertools import islice
from pathlib import Path

import machine
import numpy as np
import tensorstore as ts
import tyro
from cells import MASK_RATIO, SPREAD_GENES
from record import percentiles, print_table, write

from scbench.config import InputLaw
from scbench.data.fingerprints import FINGERPRINTS_FILE, RECORD
from scbench.data.loader import Loader
from scbench.data.manifest import write_manifest
from scbench.data.plan import SHARD_CELLS
from scbench.data.shard_format import BLOCK_CELLS, CELLS_FILE, FORMAT_VERSION, ShardInfo, block_checksums, new_array_spec
from scbench.data.store import MANIFEST_FILE, VOCABULARY_FILE, Store
from scbench.data.vocabulary import Vocabulary
from scbench.errors import UserError
from scbench.files import sha256

SHARES = {"train": 0.9, "validation": 0.05, "test": 0.05}
VOCABULARY_SIZE = 60_697
CELL_BYTES = 40  # of cells.parquet, about
LAW = InputLaw(512)


@dataclass(frozen=True, kw_only=True)
class ScaleOptions:
    """Measure opening and loading over the number of cells."""

    cells: tuple[int, ...] = (10**5, 10**6, 10**7, 10**8)
    """Sizes of the stores."""
    genes: int = 1500
    """Expressed genes of a cell: the median of a log-normal."""
    batch_cells: int = 512
    """Cells a batch."""
    batches: int = 200
    """Batches of each measurement."""
    rounds: int = 3
    """Measurements of each store."""
    folder: Path | None = None
    """Where to make the stores (removed afterwards); its file system must know sparse files."""
    json: Path | None = None
    """File for the rows; a long CSV is written beside it."""

    def __post_init__(self) -> None:
        for name in ("genes", "batch_cells", "batches", "rounds"):
            if getattr(self, name) < 1:
                raise UserError(f"--{name.replace('_', '-')} is {getattr(self, name)}: it must be at least 1.")
        if not self.cells or min(self.cells) < 100:
            raise UserError("--cells: name one size or more, each at least 100.")
        if self.json is not None and self.json.suffix == ".csv":
            raise UserError(f"--json {self.json} would be overwritten by the CSV beside it: name it .json.")


def make_store(path: Path, cells: int, genes: int) -> None:
    """A store of `cells` cells in `path`, as prepare lays it out, with holes for genes and counts."""
    path.mkdir()
    vocabulary = Vocabulary.build(f"gene-{i:06d}" for i in range(VOCABULARY_SIZE - 3))
    vocabulary.save(path / VOCABULARY_FILE)
    files = {VOCABULARY_FILE: _facts(path / VOCABULARY_FILE)}
    shards = []
    for split, share in SHARES.items():
        left = round(cells * share)
        while left > 0:
            size = min(left, round(SHARD_CELLS * share))
            info = replace(_template(split, size, genes)[0], name=f"shard-{len(shards):05d}")
            files |= _write_shard(path, info, genes)
            shards.append(asdict(info))
            left -= size
    write_manifest(path, {
        "format_version": FORMAT_VERSION,
        "vocabulary": {"fingerprint": vocabulary.fingerprint, "tokens": len(vocabulary.tokens)},
        "shards": shards,
        "files": dict(sorted(files.items())),
    })


@lru_cache(maxsize=8)
def _template(split: str, cells: int, genes: int) -> tuple[ShardInfo, np.ndarray, np.ndarray]:
    """A shard of `cells` cells: what the manifest says of it, its offsets, and the checksums of its zeros."""
    lengths = np.exp(SPREAD_GENES * np.random.default_rng(0).standard_normal(cells)) * genes
    offsets = np.concatenate([[0], np.cumsum(np.clip(lengths.astype(np.int64), 1, VOCABULARY_SIZE - 3))])
    info = ShardInfo.plan(
        split=split, cells=cells, nnz=int(offsets[-1]), counts="uint8", vocabulary_size=VOCABULARY_SIZE
    )
    zeros = (np.zeros(info.nnz, dtype=dtype) for dtype in (info.genes, info.counts))
    return info, offsets, block_checksums(*zeros, offsets)


def _write_shard(path: Path, info: ShardInfo, genes: int) -> dict[str, dict]:
    """Write a shard; what the manifest says of its files."""
    _, offsets, checksums = _template(info.split, info.cells, genes)
    directory = path / info.name
    sparse = {directory / CELLS_FILE: info.cells * CELL_BYTES, directory / FINGERPRINTS_FILE: info.cells * RECORD.itemsize}
    for name, (dtype, length) in info.arrays.items():
        spec = new_array_spec(directory / name, dtype, length)
        array = ts.open(spec, create=True).result()
        if name == "offsets":
            array.write(offsets).result()
        elif name == "block_crc":
            array.write(checksums).result()
        else:
            (directory / name / "c").mkdir()
            chunk, = array.chunk_layout.write_chunk.shape
            sparse |= {directory / name / "c" / str(i): chunk * np.dtype(dtype).itemsize for i in range(-(-length // chunk))}
    for file, size in sparse.items():
        with open(file, "wb") as hole:
            hole.truncate(size)
    return {file.relative_to(path).as_posix(): _facts(file) for file in directory.rglob("*") if file.is_file()}


def _facts(file: Path) -> dict:
    """Its size, and its SHA-256 if it is a header, which reading checks."""
    return {"bytes": file.stat().st_size, "sha256": sha256(file) if file.suffix == ".json" else "0" * 64}


def measure_once(path: Path, batch_cells: int, batches: int) -> dict[str, float]:
    """Open and load, in this process."""
    start, imported = time.perf_counter(), machine.resident_bytes()
    store = Store.open(path)
    opened, resident = time.perf_counter(), machine.resident_bytes()
    with Loader(
        store.split("train"), store.vocabulary, LAW, seed=0, batch_cells=batch_cells, micro_batch_cells=None,
        mask_ratio=MASK_RATIO, weighted_share=0.5, lanes=None,
    ) as loader:
        next(loader)
        first = time.perf_counter()
        for window in islice(loader, batches - 1):
            assert window[0].n_cells == batch_cells
    return {
        "open_seconds": opened - start, "first_batch_seconds": first - start,
        "open_bytes": resident - imported, "peak_bytes": machine.resident_bytes("VmHWM"),
    }


def measure(options: ScaleOptions) -> list[dict]:
    """A row a size."""
    with tempfile.TemporaryDirectory(dir=options.folder, prefix="scale-") as folder:
        stores = {cells: Path(folder) / str(cells) for cells in options.cells}
        for cells, path in stores.items():
            make_store(path, cells, options.genes)
        results: dict[int, list[dict]] = {cells: [] for cells in stores}
        for _ in range(options.rounds):
            for cells, path in stores.items():
                with multiprocessing.get_context("spawn").Pool(1) as pool:  # a fresh process
                    results[cells].append(pool.apply(measure_once, (path, options.batch_cells, options.batches)))
        return [_row(cells, path, results[cells], options) for cells, path in stores.items()]


def _row(cells: int, path: Path, results: list[dict], options: ScaleOptions) -> dict:
    files = Store.open(path).manifest["files"]
    return {
        "cells": cells,
        **{name: percentiles([result[name] for result in results]) for name in results[0]},
        "manifest_bytes": (path / MANIFEST_FILE).stat().st_size,
        "files": len(files),
        "store_bytes": sum(facts["bytes"] for facts in files.values()),
        "settings": {
            "genes": options.genes, "max_genes": LAW.max_genes, "batch_cells": options.batch_cells,
            "batches": options.batches, "rounds": options.rounds, "block_cells": BLOCK_CELLS,
            "contents": "holes: token 0, count 0", "cache": "warm",
        },
    }


def main(arguments: list[str] | None = None) -> None:
    """Measure, print, write."""
    options = tyro.cli(ScaleOptions, args=arguments, description=__doc__)
    rows = measure(options)
    medians = ("open_seconds", "first_batch_seconds", "open_bytes", "peak_bytes")
    print_table(["cells", "open s", "first batch s", "opened MB", "peak MB", "manifest MB", "files", "store GB"], [
        [f"{row['cells']:,}", *(f"{row[name]['median']:.3f}" for name in medians[:2]),
         *(f"{row[name]['median'] / 1e6:,.0f}" for name in medians[2:]),
         f"{row['manifest_bytes'] / 1e6:.1f}", f"{row['files']:,}", f"{row['store_bytes'] / 1e9:,.1f}"] for row in rows
    ])
    if options.json is not None:
        write(options.json, rows, machine.describe(), ("cells",))


if __name__ == "__main__":
    try:
        main()
    except UserError as error:
        print(f"scale.py: {error}", file=sys.stderr)
        raise SystemExit(2) from None
