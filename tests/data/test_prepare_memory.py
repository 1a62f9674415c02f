"""Memory and speed of prepare on many real cells."""

import os
import subprocess
import sys
import time
from pathlib import Path

import h5py
import numpy as np
import pytest

from scbench import Store, Vocabulary

DATA = os.environ.get("SCBENCH_TEST_DATA")


def write_repeated(path: Path, source: Path, n_cells: int) -> None:
    """An h5ad of `n_cells` cells: those of `source` (CSR) over and over; copy number k has k more counts of its first gene."""
    import anndata

    cells = anndata.read_h5ad(source)
    cells.X.sort_indices()
    offsets = cells.X.indptr.astype(np.int64)
    empty = anndata.AnnData(cells.X[:0], obs=cells.obs[["cell_type"]].iloc[:0].astype(str), var=cells.var)
    empty.write_h5ad(path)
    copies = -(-n_cells // cells.n_obs)
    with h5py.File(path, "r+") as file:
        for name in ("data", "indices", "indptr"):
            del file["X"][name]
        lengths = np.tile(np.diff(offsets), copies)[:n_cells]
        indptr = np.concatenate([[0], np.cumsum(lengths)])
        file["X"].create_dataset("indptr", data=indptr)
        file["X"].attrs["shape"] = [n_cells, cells.n_vars]
        indices = file["X"].create_dataset("indices", (indptr[-1],), "i4", chunks=(1 << 18,))
        data = file["X"].create_dataset("data", (indptr[-1],), "f4", chunks=(1 << 18,))
        for copy in range(copies):
            rows = min(cells.n_obs, n_cells - copy * cells.n_obs)
            values = cells.X.data[: offsets[rows]].astype(np.float32)
            values[offsets[:rows]] += copy
            low = indptr[copy * cells.n_obs]
            indices[low : low + len(values)] = cells.X.indices[: len(values)]
            data[low : low + len(values)] = values
        names = [f"{cells.obs_names[i % cells.n_obs]}-{i // cells.n_obs}" for i in range(n_cells)]
        labels = np.tile(cells.obs["cell_type"].astype(str), copies)[:n_cells]
        for name, values in ((file["obs"].attrs["_index"], names), ("cell_type", labels)):
            del file["obs"][name]
            column = file["obs"].create_dataset(name, data=np.array(values, dtype=object), dtype=h5py.string_dtype())
            column.attrs.update({"encoding-type": "string-array", "encoding-version": "0.2.0"})


def peak_memory(command: list, processes: int) -> tuple[int, int]:
    """Run `command` and look at the resident memory of its processes every 20 ms.

    Returns the largest sum at one moment, and the sum of the own peaks of the `processes` largest, which doesn't depend on
    whose peaks happen to coincide. Bytes.
    """
    process = subprocess.Popen(command, start_new_session=True)
    together, page = 0, os.sysconf("SC_PAGE_SIZE")
    peaks: dict[str, int] = {}
    while process.poll() is None:
        resident = 0
        for entry in Path("/proc").glob("[0-9]*"):
            try:
                if int((entry / "stat").read_text().rpartition(")")[2].split()[3]) == process.pid:
                    size = int((entry / "statm").read_text().split()[1]) * page
                    resident += size
                    peaks[entry.name] = max(size, peaks.get(entry.name, 0))
            except (OSError, ValueError, IndexError):
                continue  # it ended meanwhile
        together = max(together, resident)
        time.sleep(0.02)
    assert process.returncode == 0
    return together, sum(sorted(peaks.values())[-processes:])


@pytest.mark.full
@pytest.mark.skipif(DATA is None, reason="SCBENCH_TEST_DATA is not set: no real cells")
def test_memory_is_bounded_and_does_not_grow_with_the_cells(tmp_path):
    together, apart = {}, {}
    for n_cells in (200_000, 400_000):
        file, output = tmp_path / f"{n_cells}.h5ad", tmp_path / f"store-{n_cells}"
        write_repeated(file, Path(DATA) / "pbmc3k.h5ad", n_cells)
        start = time.monotonic()
        command = [sys.executable, "-m", "scbench", "prepare", file, "-o", output, "--workers", "2", "--keep-obs", "cell_type"]
        together[n_cells], apart[n_cells] = peak_memory(command, processes=5)  # two workers a pass, and their parent
        seconds = time.monotonic() - start
        print(f"{n_cells:,} cells: peak {together[n_cells] / 1e9:.2f} GB (the five processes' own peaks: "
              f"{apart[n_cells] / 1e9:.2f} GB), {n_cells / seconds:,.0f} cells/s")
        assert sum(shard.cells for shard in Store.open(output).shards) == n_cells
        file.unlink()
    assert max(together.values()) < 2e9
    assert apart[400_000] <= 1.05 * apart[200_000]


@pytest.mark.full
@pytest.mark.skipif(DATA is None, reason="SCBENCH_TEST_DATA is not set: no real cells")
def test_memory_of_columns_and_of_merge(tmp_path):
    """Counts by columns take no more than counts by rows; merge holds a few bytes a cell."""
    import anndata

    n_cells = 100_000
    write_repeated(tmp_path / "rows.h5ad", Path(DATA) / "pbmc3k.h5ad", n_cells)
    adata = anndata.read_h5ad(tmp_path / "rows.h5ad")
    Vocabulary.build(adata.var_names).save(tmp_path / "vocabulary.json")
    adata.X = adata.X.tocsc()
    adata.write_h5ad(tmp_path / "columns.h5ad")
    del adata
    scbench = [sys.executable, "-m", "scbench"]
    for i in (1, 2):
        command = [*scbench, "prepare", tmp_path / "columns.h5ad", "-o", tmp_path / f"part-{i}", "--workers", "2",
                   "--part", f"{i}/2", "--vocabulary", tmp_path / "vocabulary.json"]
        together, _ = peak_memory(command, processes=5)
        print(f"part {i} of 2, by columns: peak {together / 1e9:.2f} GB")
        assert together < 2e9
    parts = [tmp_path / "part-1", tmp_path / "part-2"]
    together, _ = peak_memory([*scbench, "merge", *parts, "-o", tmp_path / "store"], processes=1)
    print(f"merge: peak {together / 1e9:.2f} GB")
    assert together < 0.5e9
    assert sum(shard.cells for shard in Store.open(tmp_path / "store").shards) == n_cells
