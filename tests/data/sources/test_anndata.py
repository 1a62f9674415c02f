"""The AnnData source: every layout gives the same counts, and bad input gives one clear sentence."""

import os
from pathlib import Path

import anndata
import h5py
import numpy as np
import pandas as pd
import pytest
from anndata import AnnData
from scipy import sparse

from scbench.data.sources import matrix
from scbench.data.sources.anndata import AnnDataSource
from scbench.errors import UserError

DATA = os.environ.get("SCBENCH_TEST_DATA")
real_cells = pytest.mark.skipif(DATA is None, reason="SCBENCH_TEST_DATA is not set: no real cells to test on")
CELLS, GENES = 70, 13


@pytest.fixture
def counts():
    rng = np.random.default_rng(0)
    counts = rng.poisson(rng.gamma(0.3, 4, size=GENES), size=(CELLS, GENES))
    counts[3] = counts[-1] = 0  # cells without a gene
    counts[:, 4] = 0
    return counts


def make(values, **slots):
    adata = AnnData(
        values,
        obs=pd.DataFrame({"label": [f"l{i % 3}" for i in range(CELLS)]}, index=[f"cell{i}" for i in range(CELLS)]),
        var=pd.DataFrame({"note": range(GENES)}, index=[f"G{i}" for i in range(GENES)]),
    )
    for place, layer in slots.items():
        adata.layers[place] = layer
    return adata


def dense(source, step=CELLS):
    """All counts as a matrix, read `step` rows at a time."""
    result = np.zeros((source.n_cells, len(source.identity.ids)), dtype=np.int64)
    for start in range(0, source.n_cells, step):
        read = source.read(start, min(start + step, source.n_cells))
        assert [array.dtype for array in read[:3]] == [np.int64, np.uint32, np.int64]
        assert read.offsets[0] == 0 and read.offsets[-1] == len(read.columns) == len(read.counts)
        rows = np.repeat(np.arange(start, start + len(read.offsets) - 1), np.diff(read.offsets))
        np.add.at(result, (rows, read.columns), read.counts)
    return result


LAYOUTS = {
    "csr": lambda counts: sparse.csr_matrix(counts.astype(np.float32)),
    "csc": lambda counts: sparse.csc_matrix(counts.astype(np.int32)),
    "csr_array": lambda counts: sparse.csr_array(counts.astype(np.uint16)),
    "dense": lambda counts: counts.astype(np.float64),
}


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("compression", [None, "gzip"])
@pytest.mark.parametrize("step", [1, 7, CELLS])
def test_files_of_every_layout(tmp_path, counts, layout, compression, step):
    make(LAYOUTS[layout](counts)).write_h5ad(tmp_path / "a.h5ad", compression=compression)
    with AnnDataSource(tmp_path / "a.h5ad") as source:
        assert (source.name, source.n_cells, source.layer, source.recovered) == ("a.h5ad", CELLS, "X", None)
        assert source.obs_names.tolist() == [f"cell{i}" for i in range(CELLS)]
        assert source.obs["label"].tolist() == [f"l{i % 3}" for i in range(CELLS)]
        assert source.identity.symbols == [f"G{i}" for i in range(GENES)]
        np.testing.assert_array_equal(dense(source, step), counts)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("kind", ["memory", "view", "backed", "backed view"])
def test_objects_of_every_kind(tmp_path, counts, layout, kind):
    adata = make(LAYOUTS[layout](counts))
    rows = np.arange(CELLS)
    if kind.startswith("backed"):
        adata.write_h5ad(tmp_path / "a.h5ad")
        adata = anndata.read_h5ad(tmp_path / "a.h5ad", backed="r")
    if kind.endswith("view"):
        rows = np.arange(5, CELLS, 2)
        adata = adata[rows]
        assert adata.is_view
    with AnnDataSource(adata) as source:
        assert source.name == "AnnData"
        assert source.obs_names.tolist() == [f"cell{i}" for i in rows]
        np.testing.assert_array_equal(dense(source, 9), counts[rows])
    assert adata.is_view == kind.endswith("view")  # reading did not make a copy of it
    if kind.startswith("backed"):
        assert adata.isbacked
        adata.file.close()


def test_view_of_genes_and_of_raw(counts):
    adata = make(sparse.csr_matrix(np.log1p(counts)))
    adata.raw = make(sparse.csr_matrix(counts))
    view = adata[10:30, ::2]
    with AnnDataSource(view) as source:  # raw has all genes of its own
        assert source.layer == "raw"
        assert len(source.identity.symbols) == GENES
        np.testing.assert_array_equal(dense(source, 6), counts[10:30])


def test_views_in_any_order(counts):
    for layout in LAYOUTS:
        adata = make(LAYOUTS[layout](counts))
        rows, columns = [60, 2, 3, 40, 2], [5, 0, 7]
        with AnnDataSource(adata[rows][:, columns]) as source:
            assert source.identity.symbols == ["G5", "G0", "G7"]
            np.testing.assert_array_equal(dense(source, 2), counts[rows][:, columns])


def test_csc_files_are_read_in_bounded_ranges(tmp_path, counts, monkeypatch):
    make(LAYOUTS["csc"](counts)).write_h5ad(tmp_path / "a.h5ad")
    monkeypatch.setattr(matrix, "CSC_BUFFER_BYTES", 8 * 40)  # 40 entries at once
    monkeypatch.setattr(matrix, "CSC_STREAM", 17)
    for step in (1, 10, CELLS):
        with AnnDataSource(tmp_path / "a.h5ad") as source:
            np.testing.assert_array_equal(dense(source, step), counts)
            assert len(source._matrix._buffer._data) <= 40
    with AnnDataSource(tmp_path / "a.h5ad") as source:  # and backwards
        for row in (60, 5, 61, 3):
            assert source.read(row, row + 1).counts.sum() == counts[row].sum()


def test_dense_blocks(tmp_path, counts, monkeypatch):
    monkeypatch.setattr(matrix, "DENSE_BLOCK", 3 * GENES)
    make(counts.astype(np.float32)).write_h5ad(tmp_path / "a.h5ad", compression="gzip")
    with AnnDataSource(tmp_path / "a.h5ad") as source:
        np.testing.assert_array_equal(dense(source, 10), counts)


def test_empty_ranges(tmp_path, counts):
    for layout in LAYOUTS:
        make(LAYOUTS[layout](counts)).write_h5ad(tmp_path / f"{layout}.h5ad")
        with AnnDataSource(tmp_path / f"{layout}.h5ad") as source:
            assert source.read(5, 5).offsets.tolist() == [0]


# --- where the counts are --------------------------------------------------------------------------------------------


def test_counts_are_looked_for_in_order(tmp_path, counts):
    logs = sparse.csr_matrix(np.log1p(counts))
    raw = make(sparse.csr_matrix(counts * 2))
    adata = make(sparse.csr_matrix(counts * 3), counts=sparse.csr_matrix(counts), logs=logs)
    adata.raw = raw
    adata.write_h5ad(tmp_path / "all.h5ad")
    adata.layers["counts"] = logs
    adata.write_h5ad(tmp_path / "raw.h5ad")
    adata.raw = make(logs)
    adata.write_h5ad(tmp_path / "x.h5ad")
    for name, layer, factor in (("all", "counts", 1), ("raw", "raw", 2), ("x", "X", 3)):
        with AnnDataSource(tmp_path / f"{name}.h5ad") as source:
            assert source.layer == layer
            np.testing.assert_array_equal(dense(source), counts * factor)
    for layer, factor in (("counts", 1), ("raw", 2), ("X", 3)):
        with AnnDataSource(tmp_path / "all.h5ad", layer=layer) as source:
            np.testing.assert_array_equal(dense(source), counts * factor)


def test_raw_has_genes_of_its_own(tmp_path, counts):
    adata = make(sparse.csr_matrix(np.log1p(counts)))
    adata.raw = adata.copy()
    adata.raw = make(sparse.csr_matrix(counts))
    adata = adata[:, :4].copy()
    adata.write_h5ad(tmp_path / "a.h5ad")
    with AnnDataSource(tmp_path / "a.h5ad") as source:
        assert len(source.identity.symbols) == GENES
        np.testing.assert_array_equal(dense(source), counts)
    with AnnDataSource(adata) as source:
        np.testing.assert_array_equal(dense(source), counts)


def test_a_file_without_x(tmp_path, counts):
    adata = make(None, counts=sparse.csr_matrix(counts))
    adata.write_h5ad(tmp_path / "a.h5ad")
    for given in (tmp_path / "a.h5ad", adata):
        with AnnDataSource(given) as source:
            np.testing.assert_array_equal(dense(source), counts)
        with pytest.raises(UserError, match=r"has no layer 'X' \(there are: counts\)"):
            AnnDataSource(given, layer="X")


# --- what is no count ------------------------------------------------------------------------------------------------


def spoil(counts, value, row=5):
    spoiled = counts.astype(np.float64)
    spoiled[row, 2] = value
    return sparse.csr_matrix(spoiled)


@pytest.mark.parametrize(
    ("value", "reason"),
    [(-1, "negative values such as -1"), (np.nan, "NaN"), (np.inf, "infinite values"), (0.5, "fractional values such as 0.5"),
     (2.0**32, "values over 2³²−1")],
)  # fmt: skip
def test_what_is_no_count(tmp_path, counts, value, reason):
    make(spoil(counts, value)).write_h5ad(tmp_path / "a.h5ad")
    with pytest.raises(UserError) as error:
        AnnDataSource(tmp_path / "a.h5ad")
    assert f"no raw counts were found in a.h5ad: X holds {reason}" in str(error.value)
    assert "in cell 'cell5'" in str(error.value)
    assert "--recover-counts" in str(error.value)


def test_every_candidate_is_named_and_so_is_a_layer_with_integers(tmp_path, counts):
    layers = {"counts": np.zeros((CELLS, GENES)), "spliced": sparse.csr_matrix(counts), "other": spoil(counts, 0.5)}
    adata = make(spoil(counts, -1), **layers)
    adata.raw = make(spoil(counts, 0.5))
    adata.write_h5ad(tmp_path / "a.h5ad")
    with pytest.raises(UserError) as error:
        AnnDataSource(tmp_path / "a.h5ad")
    assert str(error.value) == (
        "no raw counts were found in a.h5ad: layer 'counts' holds nothing but zeros; raw holds fractional values such as "
        "0.5 in cell 'cell5'; X holds negative values such as -1 in cell 'cell5'; there are integers in layer 'spliced': give "
        "--layer spliced."
    )
    with AnnDataSource(tmp_path / "a.h5ad", layer="spliced") as source:
        np.testing.assert_array_equal(dense(source), counts)
    with pytest.raises(UserError, match=r"layer 'other' holds fractional values"):
        AnnDataSource(tmp_path / "a.h5ad", layer="other")
    with pytest.raises(UserError, match=r"a\.h5ad has no layer 'unspliced' \(there are: counts, other, spliced, raw, X\)"):
        AnnDataSource(tmp_path / "a.h5ad", layer="unspliced")


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_range_is_tested(tmp_path, layout):
    counts = np.ones((2000, 3))
    counts[1003, 1] = 1.5  # between the rows of the sample
    AnnData(LAYOUTS[layout](counts) if layout == "dense" else sparse.csr_matrix(counts)).write_h5ad(tmp_path / "a.h5ad")
    with AnnDataSource(tmp_path / "a.h5ad") as source:
        source.read(0, 1000)
        with pytest.raises(UserError, match=r"X of a\.h5ad holds fractional values \(1\.5 in cell '1003'\)"):
            source.read(1000, 2000)


def test_counts_beyond_the_first_rows_are_found(tmp_path):
    counts = np.zeros((3000, 2))
    counts[2990, 1] = 7
    for values in (counts, sparse.csr_matrix(counts), sparse.csc_matrix(counts)):
        AnnData(values).write_h5ad(tmp_path / "a.h5ad")
        with AnnDataSource(tmp_path / "a.h5ad") as source:
            assert source.read(2980, 3000).counts.tolist() == [7]
    AnnData(np.zeros((3000, 2))).write_h5ad(tmp_path / "a.h5ad")
    with pytest.raises(UserError, match="X holds nothing but zeros"):
        AnnDataSource(tmp_path / "a.h5ad")


# --- recovery --------------------------------------------------------------------------------------------------------


def normalised(counts, dtype=np.float32):
    totals = np.maximum(counts.sum(1, keepdims=True), 1)
    return np.log1p(counts / totals * 1e4).astype(dtype)


@pytest.mark.parametrize("layout", ["csr", "dense"])
def test_counts_are_recovered_only_when_asked(tmp_path, counts, layout):
    counts[:, 0] = 1  # so that the smallest value is one count
    values = normalised(counts)
    make(values if layout == "dense" else sparse.csr_matrix(values)).write_h5ad(tmp_path / "a.h5ad")
    with pytest.raises(UserError, match="--recover-counts"):
        AnnDataSource(tmp_path / "a.h5ad")
    with AnnDataSource(tmp_path / "a.h5ad", recover_counts=True) as source:
        np.testing.assert_array_equal(dense(source, 11), counts)
        assert source.recovered["layer"] == "X"
        assert source.recovered["cells"] == CELLS
        assert source.recovered["values"] == np.count_nonzero(counts)
        assert source.recovered["inexact_share"] == 0
        assert source.recovered["median_unit"] == pytest.approx(np.median(1e4 / counts.sum(1)), rel=1e-5)


def test_real_counts_are_never_recovered(counts):
    with AnnDataSource(make(counts), recover_counts=True) as source:
        assert source.recovered is None
        np.testing.assert_array_equal(dense(source), counts)


def test_values_that_cannot_be_recovered(counts):
    rng = np.random.default_rng(0)
    adata = make(rng.normal(size=counts.shape), counts=rng.uniform(0.5, 3, size=counts.shape))
    with pytest.raises(UserError, match=r"no counts can be recovered from AnnData: layer 'counts' holds values that are no "
                                        r"multiples of a unit \(\d+\.\d% .*; X holds negative values"):  # fmt: skip
        AnnDataSource(adata, recover_counts=True)
    adata.layers["counts"][3, 3] = np.nan
    with pytest.raises(UserError, match=r"layer 'counts' holds NaN in cell 'cell3'"):
        AnnDataSource(adata, recover_counts=True)


def test_values_that_cannot_be_recovered_beyond_the_sample(tmp_path):
    rng = np.random.default_rng(0)
    values = np.tile(np.log1p([1.0, 2, 3, 4]), (8000, 1))
    start = np.linspace(0, 8000 - 8, 32).astype(int)
    unseen = np.setdiff1d(np.arange(8000), (start[:, None] + np.arange(8)).ravel())
    values[unseen] = rng.uniform(0.5, 3, size=(len(unseen), 4))
    AnnData(values).write_h5ad(tmp_path / "a.h5ad")
    wrong = pytest.raises(UserError, match=r"the counts of a\.h5ad cannot be recovered from X: \d+\.\d% of the values")
    with AnnDataSource(tmp_path / "a.h5ad", recover_counts=True) as source, wrong:
        _ = source.recovered


@real_cells
def test_real_counts_come_back_from_log_normalised_values(tmp_path):
    adata = anndata.read_h5ad(Path(DATA) / "pbmc3k.h5ad")
    counts = adata.X.copy()
    totals = np.asarray(counts.sum(1)).ravel()
    adata.X = sparse.csr_matrix(sparse.diags(1e4 / totals) @ counts).log1p().astype(np.float32)
    adata.write_h5ad(tmp_path / "a.h5ad", compression="gzip")
    with AnnDataSource(tmp_path / "a.h5ad", recover_counts=True) as source:
        read = source.read(0, source.n_cells)
        assert (sparse.csr_matrix((read.counts, read.columns, read.offsets), shape=counts.shape) != counts).nnz == 0
        assert source.recovered["inexact_values"] == 0


@real_cells
def test_real_files_are_read_exactly():
    for name in ("pbmc3k", "heart_san"):
        expected = anndata.read_h5ad(Path(DATA) / f"{name}.h5ad")
        with AnnDataSource(Path(DATA) / f"{name}.h5ad") as source:
            read = [source.read(start, min(start + 300, source.n_cells)) for start in range(0, source.n_cells, 300)]
            shapes = [(len(rows.offsets) - 1, expected.n_vars) for rows in read]
            parts = [sparse.csr_matrix((r.counts, r.columns, r.offsets), shape) for r, shape in zip(read, shapes, strict=True)]
            assert (sparse.vstack(parts) != expected.X).nnz == 0
            assert source.obs_names.tolist() == expected.obs_names.tolist()


# --- files that are none ---------------------------------------------------------------------------------------------


def message(path, **options):
    with pytest.raises(UserError) as error:
        AnnDataSource(path, **options)
    assert "\n" not in str(error.value)
    return str(error.value)


def test_files_that_cannot_be_opened(tmp_path, counts):
    assert "there is no file" in message(tmp_path / "none.h5ad")
    assert "is a directory" in message(tmp_path)
    (tmp_path / "empty.h5ad").touch()
    assert "is empty (0 bytes)" in message(tmp_path / "empty.h5ad")
    (tmp_path / "text.h5ad").write_text("gene,cell\n" * 1000)
    assert "cannot be read as an h5ad (HDF5) file" in message(tmp_path / "text.h5ad")
    make(sparse.csr_matrix(counts)).write_h5ad(tmp_path / "whole.h5ad")
    whole = (tmp_path / "whole.h5ad").read_bytes()
    for share in (0.1, 0.5, 0.99):
        (tmp_path / "cut.h5ad").write_bytes(whole[: int(len(whole) * share)])
        assert "is truncated" in message(tmp_path / "cut.h5ad")
    with h5py.File(tmp_path / "other.h5ad", "w") as file:
        file["data"] = [1, 2]
    assert "not an h5ad file: it has no obs and no var" in message(tmp_path / "other.h5ad")
    with h5py.File(tmp_path / "old.h5ad", "w") as file:
        file["obs"] = file["var"] = np.zeros(2, dtype=[("index", "S3"), ("n", int)])
    assert "layout from before 2020" in message(tmp_path / "old.h5ad")


def test_files_that_are_broken_inside(tmp_path, counts):
    path = tmp_path / "a.h5ad"

    def broken(change):
        make(sparse.csr_matrix(counts)).write_h5ad(path)
        with h5py.File(path, "r+") as file:
            change(file)

    def shorten(file):
        data = file["X/data"][:-1]
        del file["X/data"]
        file["X/data"] = data

    def widen(file):
        file["X/indices"][0] = GENES

    def lengthen(file):
        indptr = file["X/indptr"][:]
        del file["X/indptr"]
        file["X/indptr"] = indptr[:-1]

    def shrink(file):
        file["X"].attrs["shape"] = (CELLS, GENES + 1)

    broken(shorten)
    assert "X of a.h5ad is no matrix that can be read" in message(path)
    broken(lengthen)
    assert "X of a.h5ad is no matrix that can be read" in message(path)
    broken(shrink)
    assert f"a.h5ad is broken: X is {CELLS} × {GENES + 1}, but there are {CELLS} cells and {GENES} genes" in message(path)
    broken(lambda file: file.pop("X"))
    assert "it has no matrix" in message(path)
    broken(widen)
    with AnnDataSource(path) as source, pytest.raises(UserError, match="names a gene that does not exist"):
        source.read(0, 5)


def test_damaged_chunks(tmp_path):
    counts = np.random.default_rng(0).integers(0, 50, size=(4000, 20))
    AnnData(sparse.csr_matrix(counts)).write_h5ad(tmp_path / "a.h5ad", compression="gzip")
    with h5py.File(tmp_path / "a.h5ad") as file:
        chunk = file["X/data"].id.get_chunk_info(2)
    with open(tmp_path / "a.h5ad", "r+b") as file:
        file.seek(chunk.byte_offset + 10)
        file.write(b"\0" * (chunk.size - 20))
    with pytest.raises(UserError, match=r"a\.h5ad is damaged"), AnnDataSource(tmp_path / "a.h5ad") as source:
        source.read(0, 4000)


def test_empty_sources(tmp_path):
    for shape, reason in (((0, 3), "has no cells"), ((3, 0), "has no genes")):
        adata = AnnData(sparse.csr_matrix(shape, dtype=np.float32))
        adata.write_h5ad(tmp_path / "a.h5ad")
        assert message(tmp_path / "a.h5ad") == f"a.h5ad {reason}."
        assert message(adata) == f"AnnData {reason}."


def test_a_missing_genes_column(tmp_path, counts):
    make(counts).write_h5ad(tmp_path / "a.h5ad")
    missing = r"a\.h5ad has no column 'gene' in var \(it has 'note'\)"
    with AnnDataSource(tmp_path / "a.h5ad", genes_column="gene") as source, pytest.raises(UserError, match=missing):
        source.identity  # noqa: B018 - the access is the test
