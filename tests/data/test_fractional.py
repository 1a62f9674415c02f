"""Counts that are not whole: what is taken for counts, how they are hashed and stored, and that all of the data path works."""

import os
from pathlib import Path

import anndata
import numpy as np
import pytest
from test_prepare import digest, random_counts

from scbench import Vocabulary, prepare
from scbench.config import InputLaw
from scbench.data.cells import content_hash
from scbench.data.fractional import accept_counts
from scbench.data.inspect import info, verify
from scbench.data.loader import Loader, validation_batches
from scbench.data.shard_format import COUNTS_DTYPES, counts_dtype, too_small_dtypes
from scbench.data.sources.anndata import AnnDataSource
from scbench.data.values import library_sizes, quantile_bins
from scbench.errors import UserError

DATA = os.environ.get("SCBENCH_TEST_DATA")


def rows(matrix):
    """Values and offsets of a dense matrix."""
    return matrix[matrix != 0], np.concatenate([[0], np.cumsum((matrix != 0).sum(axis=1))])


def corrected(counts, seed=0):
    """Counts less a share of ambient RNA, as SoupX gives them."""
    return np.maximum(0, counts - np.random.default_rng(seed).uniform(0, 0.3, counts.shape) * (counts > 0))


def test_what_becomes_of_fractional_values():
    values, offsets = np.array([1.0, 2.5, 3.5, 0.4, 0.0, 7.0]), np.array([0, 3, 6])
    accepted, problem = accept_counts(values, offsets, "refuse")
    assert accepted is None and (problem.reason, problem.position) == ("fractional values", 1)
    accepted, _ = accept_counts(values, offsets, "round")
    assert accepted.counts.dtype == np.uint32 and accepted.counts.tolist() == [1, 2, 4, 0, 0, 7]  # half to even
    assert (accepted.fractional, accepted.distance) == (3, 0.5)
    accepted, _ = accept_counts(values, offsets, "keep")
    assert accepted.counts.dtype == np.float64 and accepted.counts.tolist() == values.tolist()
    accepted, _ = accept_counts(values[[0, 5]], np.array([0, 2]), "keep")
    assert accepted.counts.dtype == np.uint32 and (accepted.fractional, accepted.distance) == (0, 0.0)


@pytest.mark.parametrize("fractional", ["round", "keep"])
@pytest.mark.parametrize(("bad", "reason"), [
    (np.nan, "NaN"), (np.inf, "infinite values"), (-0.5, "negative values"), (2.0**32 + 0.5, "values over 2³²−1"),
])
def test_what_is_refused_whatever_is_asked(fractional, bad, reason):
    accepted, problem = accept_counts(np.array([0.5, 1.0, bad]), np.array([0, 3]), fractional)
    assert accepted is None and (problem.reason, problem.position) == (reason, 2)


def scaled(counts):
    return counts / np.maximum(counts.sum(axis=1, keepdims=True), 1) * 1e4


NORMALISED = {
    "log-normalised values": lambda counts: np.log1p(scaled(counts)),
    "log2-normalised values": lambda counts: np.log2(1 + scaled(counts)),
    "values scaled cell by cell": scaled,
}


@pytest.mark.parametrize("form", NORMALISED)
@pytest.mark.parametrize("part", ["all genes", "some genes", "fractional counts"])
def test_normalised_values_are_no_counts(form, part):
    counts = np.random.default_rng(1).poisson(np.random.default_rng(0).gamma(0.5, 4, 400), (40, 400)).astype(np.float64)
    values = NORMALISED[form](corrected(counts) if part == "fractional counts" else counts)
    if part == "some genes":
        values = values[:, ::5]  # sums tell nothing any more
    accepted, problem = accept_counts(*rows(values.astype(np.float32)), "keep")
    assert accepted is None and problem.reason == form


@pytest.mark.parametrize("make", [
    corrected, lambda counts: counts / 2, lambda counts: counts / 3,  # reads shared by two and three genes
    lambda counts: np.where(np.random.default_rng(3).random(counts.shape) < 0.01, counts / 2, counts),
    lambda counts: counts * np.random.default_rng(4).uniform(0.9, 1, counts.shape),
], ids=["ambient", "halves", "thirds", "few halves", "expectations"])
def test_fractional_counts_are_taken(make):
    counts = np.random.default_rng(1).poisson(np.random.default_rng(0).gamma(0.5, 4, 400), (40, 400)).astype(np.float64)
    values, offsets = rows(make(counts))
    for fractional in ("round", "keep"):
        accepted, problem = accept_counts(values, offsets, fractional)
        assert problem is None and accepted.fractional == np.count_nonzero(values != np.rint(values))


def test_a_whole_count_has_one_hash_and_a_fraction_its_own():
    genes, offsets = np.array([3, 5, 9, 3, 5, 9]), np.array([0, 3, 6])
    whole = np.array([1, 2**24 + 1, 2**32 - 1, 4, 1, 1], dtype=np.uint32)
    assert content_hash(genes, whole, offsets).tolist() == content_hash(genes, whole.astype(np.float64), offsets).tolist()
    part = np.array([1, 2.5, 7, 1, 2.25, 7])
    hashes = content_hash(genes, part, offsets)
    assert hashes[0] != hashes[1]
    assert hashes.tolist() == content_hash(genes, part.astype(np.float32), offsets).tolist()  # exact there: the same number
    one, bounds = np.array([2.5]), np.array([0, 1])
    assert content_hash(genes[:1], one.view(np.int64), bounds) != content_hash(genes[:1], one, bounds)


@pytest.mark.parametrize(("counts", "dtype"), [
    ([[1, 255], [3]], "uint8"), ([[256], [1]], "uint16"), ([[65_536], [1]], "uint32"), ([[2**32 - 1]], "uint32"),
    ([[1.5], [65_536]], "float32"), ([[0.1]], "float64"), ([[1.5], [2**24 + 1]], "float64"), ([[1.5, 2**24 + 2]], "float32"),
    ([[], [7]], "uint8"), ([[], []], "uint8"),
])
def test_the_smallest_dtype_that_holds_the_counts(counts, dtype):
    offsets = np.concatenate([[0], np.cumsum([len(cell) for cell in counts])])
    values = np.concatenate([np.zeros(0), *map(np.asarray, counts)])
    assert counts_dtype(too_small_dtypes(values, offsets)) == dtype
    assert np.array_equal(values.astype(dtype).astype(np.float64), values)
    if (values == np.rint(values)).all():
        assert counts_dtype(too_small_dtypes(values.astype(np.uint32), offsets)) == dtype
    with np.errstate(invalid="ignore"):
        assert dtype == next(d for d in COUNTS_DTYPES if np.array_equal(values.astype(d).astype(np.float64), values))


def test_values_of_fractional_counts():
    counts, offsets = np.array([0.5, 0.25, 2.0, 0.5, 1.75]), np.array([0, 4, 5])
    assert library_sizes(counts, offsets).tolist() == [3.25, 1.75]
    assert quantile_bins(counts, offsets).tolist() == quantile_bins(np.array([2, 1, 8, 2, 7]), offsets).tolist()


@pytest.fixture
def fractional_file(write_cells):
    return write_cells("a.h5ad", corrected(random_counts(300, density=0.5)))  # float32


def test_refused_by_default_and_it_says_what_to_do(fractional_file, tmp_path):
    with pytest.raises(UserError, match=r"X holds fractional values .* take them with --fractional round or keep\.$"):
        prepare(fractional_file, tmp_path / "store", workers=1)
    assert not (tmp_path / "store").exists()


def test_round(fractional_file, stored_cells, write_cells, tmp_path):
    values = anndata.read_h5ad(fractional_file).X.toarray()
    store = prepare(fractional_file, tmp_path / "store", workers=1, fractional="round")
    source = store.manifest["sources"][0]
    away = np.abs(values - np.rint(values))
    assert source["fractional_values"] == np.count_nonzero(away) and source["fractional_distance"] == float(away.max())
    assert source["counts"] == np.rint(values).sum() and {shard.counts for shard in store.shards} == {"uint8"}
    cells = {cell["original_id"]: cell for cell in stored_cells(store)}
    for row, cell in enumerate(np.rint(values)):
        assert cells[f"a:{row}"]["content"] == {f"g{i}": count for i, count in enumerate(cell) if count}
    whole = write_cells("b.h5ad", np.rint(values))
    other = prepare(whole, tmp_path / "other", workers=1, fractional="round")
    assert [file for name, file in digest(store).items() if "counts/c/" in name] == [
        file for name, file in digest(other).items() if "counts/c/" in name
    ]
    assert other.manifest["sources"][0]["fractional_values"] == 0


@pytest.mark.parametrize("double", [False, pytest.param(True, marks=pytest.mark.full)])
def test_keep(double, fractional_file, stored_cells, write_cells, tmp_path, monkeypatch):
    adata = anndata.read_h5ad(fractional_file)
    if double:
        adata.X = adata.X.astype(np.float64)
        adata.X.data -= 1e-9
        adata.write_h5ad(fractional_file)
    values = adata.X.toarray().astype(np.float64)
    whole = write_cells("whole.h5ad", random_counts(200, seed=9, density=0.9))
    store = prepare([fractional_file, whole], tmp_path / "store", workers=1, fractional="keep", keep_obs=())
    assert {shard.counts for shard in store.shards} == {"float64" if double else "float32"}
    cells = {cell["original_id"]: cell for cell in stored_cells(store)}
    assert len(cells) == 500
    for row, cell in enumerate(values):
        assert cells[f"a:{row}"]["content"] == {f"g{i}": count for i, count in enumerate(cell) if count}
        assert np.isclose(cells[f"a:{row}"]["total"], cell.sum(), rtol=1e-12, atol=0)
    alone = prepare(whole, tmp_path / "alone", workers=1)
    for cell in stored_cells(alone):
        assert cells[cell["original_id"]]["content_hash"] == cell["content_hash"]  # whole cells: as in a store of integers
    assert str(alone.split("train").cells()["total"].dtype) == "int64"
    assert verify(store)["cells"] == 500
    fractional, integers = info(store)["sources"]
    assert fractional["fractional_values"] == np.count_nonzero(values != np.rint(values)) and fractional["counts"] > 0
    assert integers["fractional_values"] == 0 and isinstance(integers["counts"], int)
    again = prepare([fractional_file, whole], tmp_path / "again", workers=2, fractional="keep")
    assert digest(again) == digest(store)


def test_the_loader_takes_kept_counts(fractional_file, tmp_path):
    store = prepare(fractional_file, tmp_path / "store", workers=1, fractional="keep")
    split = store.split("train")
    by_content = {}
    extent = split.read_extent(0)
    for cell in range(len(extent.offsets) - 1):
        tokens = slice(extent.offsets[cell], extent.offsets[cell + 1])
        by_content[cell] = dict(zip(extent.genes[tokens].tolist(), extent.counts[tokens].tolist(), strict=True))
    for preprocess in ("log1p", "bin"):
        law = InputLaw(12, preprocess=preprocess)
        loader = Loader(split, store.vocabulary, law, seed=0, batch_cells=32, micro_batch_cells=None, mask_ratio=0.4,
                        weighted_share=0.5, lanes=None)
        with loader:
            batches = [batch for _ in range(3) for batch in next(loader)]
        for batch in batches:
            offsets = batch.cell_offsets.tolist()
            cell_of = np.repeat(np.arange(batch.n_cells), np.diff(offsets))
            assert str(batch.target_counts.dtype) == "torch.float64"
            for position, target, count in zip(batch.masked.tolist(), batch.targets.tolist(), batch.target_counts.tolist(),
                                               strict=True):
                true = by_content[int(batch.cells[cell_of[position]])][int(batch.genes[position])]
                assert count == true and (preprocess == "bin" or np.isclose(target, np.log1p(true)))
            for cell, size in zip(batch.cells.tolist(), batch.library_sizes.tolist(), strict=True):
                assert np.isclose(size, sum(by_content[cell].values()))
    first = split.first(20)
    assert first.n_tokens == sum(len(by_content[cell]) for cell in range(20))
    assert sum(batch.n_cells for batch in validation_batches(
        first, store.vocabulary, InputLaw(12), seed=0, mask_ratio=0.4, max_cells=20, batch_cells=8)) == 20


def test_a_file_that_becomes_fractional_late(write_cells, tmp_path):
    counts = random_counts(3000, seed=2, density=0.4).astype(np.float64)
    counts[2999, :5] = 1.5
    path = write_cells("a.h5ad", counts)
    with AnnDataSource(path, fractional="keep") as source:
        assert source.read(0, 2000).counts.dtype == np.uint32 and source.read(2000, 3000).counts.dtype == np.float32
    store = prepare(path, tmp_path / "store", workers=1, fractional="keep")
    assert store.manifest["sources"][0]["fractional_values"] == 5 and store.manifest["sources"][0]["kept"] == 3000


def test_parquet_files_hold_fractional_counts_too(write_parquet, stored_cells, tmp_path):
    vocabulary = Vocabulary.build([f"g{i}" for i in range(40)])
    vocabulary.save(tmp_path / "vocabulary.json")
    counts = corrected(random_counts(100, density=0.5))
    path = write_parquet("a.parquet", counts)
    with pytest.raises(UserError, match="hold values whose expm1 is no whole number"):
        prepare(path, tmp_path / "store", vocabulary=tmp_path / "vocabulary.json", workers=1)
    store = prepare(path, tmp_path / "store", vocabulary=tmp_path / "vocabulary.json", workers=1, fractional="keep")
    got = {cell["original_id"]: cell["total"] for cell in stored_cells(store)}
    assert np.allclose([got[str(row)] for row in range(100)], counts.sum(axis=1), atol=0.01)  # near a whole: that
    path = write_parquet("b.parquet", scaled(random_counts(100, density=0.5)))
    with pytest.raises(UserError, match="values scaled cell by cell"):
        prepare(path, tmp_path / "other", vocabulary=tmp_path / "vocabulary.json", workers=1, fractional="keep")


@pytest.mark.skipif(DATA is None, reason="SCBENCH_TEST_DATA is not set: no real cells")
@pytest.mark.parametrize("name", [
    "onek1k_1000g", *(pytest.param(name, marks=pytest.mark.full) for name in ("pbmc3k", "schraivogel_tapseq_72g")),
])
def test_real_cells_normalised_are_never_taken_for_counts(name):
    adata = anndata.read_h5ad(Path(DATA) / f"{name}.h5ad")[:400]
    counts = np.asarray(adata.X.todense() if hasattr(adata.X, "todense") else adata.X, dtype=np.float64)
    counts = counts[:, counts.any(axis=0)]
    for form, normalise in NORMALISED.items():
        assert accept_counts(*rows(normalise(counts).astype(np.float32)), "keep")[1].reason == form
    assert accept_counts(*rows(corrected(counts).astype(np.float32)), "keep")[1] is None
