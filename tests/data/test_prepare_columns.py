"""prepare from counts that are stored by columns: the store of the same counts by rows, out of one pass over the file."""

import hashlib
import os
import signal

import anndata
import h5py
import numpy as np
import pytest
import scipy.sparse as sp

from scbench import Vocabulary, merge, prepare
from scbench.data import plan as plan_module
from scbench.data.sources import matrix, row_order
from scbench.data.sources.row_order import RowFiles, write_rows
from scbench.errors import UserError


def some_counts(n_cells=500, n_genes=40, seed=0):
    rng = np.random.default_rng(seed)
    counts = rng.poisson(2.0, (n_cells, n_genes)) * (rng.random((n_cells, n_genes)) < 0.5)
    counts[7] = 0
    return counts


@pytest.fixture(autouse=True)
def small_pieces(monkeypatch):
    monkeypatch.setattr(plan_module, "TASK_CELLS", 100)
    monkeypatch.setattr(plan_module, "SHARD_CELLS", 150)
    monkeypatch.setattr(matrix, "CSC_STREAM", 333)
    monkeypatch.setattr(row_order, "RANGE_BYTES", 6_000)


@pytest.fixture
def two_layouts(tmp_path):
    """write(values) -> paths of one h5ad by rows and one by columns, each in a folder of its own."""

    def write(values, **options):
        paths = []
        for folder, layout in (("rows", sp.csr_matrix), ("columns", sp.csc_matrix)):
            (tmp_path / folder).mkdir(exist_ok=True)
            adata = anndata.AnnData(layout(values))
            adata.obs_names = [f"cell-{i}" for i in range(len(values))]
            adata.var_names = [f"g{i}" for i in range(values.shape[1])]
            adata.write_h5ad(tmp_path / folder / "a.h5ad", **options)
            paths.append(tmp_path / folder / "a.h5ad")
        return paths

    return write


def shard_files(store):
    """SHA-256 of every file but the manifest, which names the SHA-256 of the input."""
    files = [path for path in store.path.rglob("*") if path.is_file() and not path.name.startswith("manifest")]
    return {str(path.relative_to(store.path)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


@pytest.mark.parametrize(("workers", "dtype"), [(1, "uint16"), (2, "float32")])
def test_the_store_is_that_of_the_rows(workers, dtype, two_layouts, tmp_path):
    by_rows, by_columns = two_layouts(some_counts().astype(dtype), compression="gzip")
    expected = prepare(by_rows, tmp_path / "expected", workers=1)
    store = prepare(by_columns, tmp_path / "store", workers=workers)
    assert shard_files(store) == shard_files(expected)
    assert store.manifest["sources"][0]["kept"] == 499
    assert not list(tmp_path.glob(".*"))


def test_recovered_counts(two_layouts, tmp_path):
    counts = some_counts()
    counts[:, 1] = 1
    scaled = np.log1p(counts / counts.sum(axis=1, keepdims=True) * 1e4).astype(np.float32)
    by_rows, by_columns = two_layouts(scaled)
    stores = [prepare(path, tmp_path / path.parent.name / "store", workers=1, recover_counts=True)
              for path in (by_rows, by_columns)]
    assert shard_files(stores[0]) == shard_files(stores[1])
    assert stores[1].manifest["sources"][0]["recovered_counts"]["cells"] == 500


def test_the_file_is_streamed_once(two_layouts, tmp_path, monkeypatch):
    passes, stream = [], matrix.CSCMatrix.stream
    monkeypatch.setattr(matrix.CSCMatrix, "stream", lambda self: passes.append(1) or stream(self))
    loads, load = [], matrix.CSCMatrix._load
    monkeypatch.setattr(matrix.CSCMatrix, "_load", lambda self, start: loads.append(start) or load(self, start))
    prepare(two_layouts(some_counts())[1], tmp_path / "store", workers=1)
    assert len(passes) == 1
    assert loads == [0]  # the rows on which the file is tested for counts, before


def test_parts_write_their_rows_only(two_layouts, tmp_path, monkeypatch):
    by_rows, by_columns = two_layouts(some_counts())
    Vocabulary.build([f"g{i}" for i in range(40)]).save(tmp_path / "vocabulary.json")
    asked, write = [], row_order.write_rows
    from scbench.data.sources import anndata as anndata_module

    monkeypatch.setattr(anndata_module, "write_rows", lambda m, start, stop, *a, **o: asked.append((start, stop))
                        or write(m, start, stop, *a, **o))
    stores = {}
    for path in (by_rows, by_columns):
        parts = [prepare(path, path.parent / f"part-{i}", part=f"{i}/2", vocabulary=tmp_path / "vocabulary.json", workers=1)
                 for i in (1, 2)]
        stores[path] = merge([part.path for part in parts], path.parent / "store")
    assert shard_files(stores[by_rows]) == shard_files(stores[by_columns])
    assert asked == [(0, 200), (200, 500)]


@pytest.mark.parametrize(("start", "stop"), [(0, 300), (120, 121), (40, 300), (0, 1)])
def test_rows_in_any_order(start, stop, two_layouts, tmp_path):
    values = some_counts(300).astype(np.float64)
    with h5py.File(two_layouts(values)[1]) as file:
        columns = matrix.open_matrix(file["X"])
        (tmp_path / "out").mkdir()
        write_rows(columns, start, stop, tmp_path / "out", recovering=False)
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["about.json", "columns", "offsets.npy", "values"]
    rows = RowFiles(tmp_path / "out")
    assert rows.shape == (300, 40)
    for first, last in [(start, stop), (stop - 1, stop), (start, start), (start, start + 1)]:
        read = rows.read(first, last)
        dense = np.zeros((last - first, 40))
        dense[np.repeat(np.arange(last - first), np.diff(read.offsets)), read.columns] = read.values
        np.testing.assert_array_equal(dense, values[first:last])


def test_an_entry_of_no_row(two_layouts, tmp_path):
    path = two_layouts(some_counts())[1]
    with h5py.File(path, "r+") as file:
        file["X/indices"][1000] = -3
    with pytest.raises(UserError, match=r"a\.h5ad is damaged or not an h5ad file"):
        prepare(path, tmp_path / "store", workers=1)
    assert not (tmp_path / "store").exists() and not list(tmp_path.glob(".*"))


def test_killed_while_rows_are_written(two_layouts, tmp_path):
    by_columns = two_layouts(some_counts())[1]
    expected = shard_files(prepare(by_columns, tmp_path / "expected", workers=1))
    # forking is safe as long as only children use TensorStore, or they die before they do
    child = os.fork()
    if child == 0:
        original, calls = np.fromfile, []

        def die(*arguments, **options):
            calls.append(1)
            if len(calls) == 3:
                os.kill(os.getpid(), signal.SIGKILL)
            return original(*arguments, **options)

        row_order.np.fromfile = die
        prepare(by_columns, tmp_path / "store", workers=1)
        os._exit(0)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL
    assert list((tmp_path / ".prepare-store" / "rows").iterdir())
    assert shard_files(prepare(by_columns, tmp_path / "store", workers=1)) == expected
