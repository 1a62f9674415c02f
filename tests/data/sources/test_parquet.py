"""Parquet files of the reference implementation's format: what is in them comes back, wherever a read starts."""

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from scbench import Vocabulary
from scbench.data.sources import parquet as parquet_module
from scbench.data.sources.parquet import ParquetSource
from scbench.errors import UserError

GENES = 30
VOCABULARY = Vocabulary(
    {f"g{i}": i for i in range(10)} | {"<pad>": 10, "<cls>": 11, "<eoc>": 12} | {f"g{i}": i + 4 for i in range(10, GENES)}
)  # the specials stand between the genes, and no token has the id 13


def random_counts(n_cells, seed=0):
    rng = np.random.default_rng(seed)
    counts = rng.poisson(3.0, (n_cells, VOCABULARY.size)) * (rng.random((n_cells, VOCABULARY.size)) < 0.4)
    counts[:, 10:14] = 0
    return counts


def dense(read):
    result = np.zeros((len(read.offsets) - 1, VOCABULARY.size), dtype=np.int64)
    np.add.at(result, (np.repeat(np.arange(len(result)), np.diff(read.offsets)), read.columns), read.counts)
    return result


@pytest.fixture
def small_batches(monkeypatch):
    monkeypatch.setattr(parquet_module, "BATCH_ROWS", 16)


@pytest.mark.parametrize("row_group_size", [7, 64, 1000])
def test_any_range_can_be_read_in_any_order(row_group_size, write_parquet, small_batches):
    counts = random_counts(300)
    with ParquetSource(write_parquet("a.parquet", counts, row_group_size=row_group_size), VOCABULARY) as source:
        assert (source.name, source.n_cells, source.layer, source.recovered) == ("a.parquet", 300, "expressions", None)
        for start, stop in [(0, 300), (250, 251), (3, 90), (90, 91), (200, 300), (64, 64), (300, 300), (0, 1), (299, 300)]:
            read = source.read(start, stop)
            assert [array.dtype for array in read[:3]] == [np.int64, np.uint32, np.int64]
            assert np.array_equal(dense(read), counts[start:stop])


def test_reading_on_never_starts_anew(write_parquet, small_batches, monkeypatch):
    """The parts of one worker ascend: what lies between two of them is passed over, or skipped by row groups."""
    path = write_parquet("a.parquet", random_counts(300), row_group_size=100)
    started = []
    original = pq.ParquetFile.iter_batches

    def counted(self, *arguments, **options):
        started.append(options["row_groups"][0])
        return original(self, *arguments, **options)

    monkeypatch.setattr(pq.ParquetFile, "iter_batches", counted)
    with ParquetSource(path, VOCABULARY) as source:
        for start, stop in [(0, 20), (20, 30), (70, 110)]:
            source.read(start, stop)
        assert started == [0]
        source.read(200, 210)
        assert started == [0, 2]
        source.read(150, 160)
        assert started == [0, 2, 1]


def test_a_row_group_is_never_in_memory_whole(tmp_path):
    vocabulary = Vocabulary.build([f"g{i}" for i in range(60_000)])
    rng = np.random.default_rng(0)
    genes, counts = rng.integers(0, 60_000, (20_000, 500)), rng.integers(1, 60_000, (20_000, 500))
    table = {"genes": genes, "expressions": np.log1p(counts)}
    table = {name: pa.FixedSizeListArray.from_arrays(x.ravel().astype(np.float32), 500) for name, x in table.items()}
    pq.write_table(pa.table(table), tmp_path / "a.parquet", row_group_size=20_000)
    size = (tmp_path / "a.parquet").stat().st_size
    assert size > 40e6
    before, held = pa.total_allocated_bytes(), []
    with ParquetSource(tmp_path / "a.parquet", vocabulary) as source:
        for start in range(0, 20_000, 500):
            assert np.array_equal(source.read(start, start + 500).columns, genes[start : start + 500].ravel())
            held.append(pa.total_allocated_bytes() - before)
    assert max(held) < size / 4


@pytest.mark.parametrize(("genes", "expressions"), [
    ("int32", "double"), ("int64", "float"), ("uint16", "float"), ("double", "double"),
])
def test_other_number_types(genes, expressions, write_parquet):
    counts = random_counts(20)
    path = write_parquet("a.parquet", counts, genes=genes, expressions=expressions)
    assert np.array_equal(dense(ParquetSource(path, VOCABULARY).read(0, 20)), counts)


def write_lists(path, genes, expressions, kind=None, **columns):
    kind = kind or (lambda of: pa.list_(of))
    lists = {"genes": pa.array(genes, kind(pa.float32())), "expressions": pa.array(expressions, kind(pa.float32()))}
    pq.write_table(pa.table(lists | columns), path)
    return path


@pytest.mark.parametrize("kind", [pa.list_, pa.large_list, lambda of: pa.list_(of, 2)], ids=["list", "large", "fixed"])
def test_other_list_types(kind, tmp_path):
    path = write_lists(tmp_path / "a.parquet", [[1, 2], [2, 3]], np.log1p([[1, 2], [3, 4]]).tolist(), kind)
    read = ParquetSource(path, VOCABULARY).read(0, 2)
    assert (read.columns.tolist(), read.counts.tolist(), read.offsets.tolist()) == ([1, 2, 2, 3], [1, 2, 3, 4], [0, 2, 4])


def test_cells_without_genes_and_repeated_genes(tmp_path):
    log = np.log1p([1.0, 2.0, 5.0]).tolist()
    path = write_lists(tmp_path / "a.parquet", [[], [3, 1, 3], None], [[], log, None])
    read = ParquetSource(path, VOCABULARY).read(0, 3)
    assert read.offsets.tolist() == [0, 0, 3, 3]
    assert (read.columns.tolist(), read.counts.tolist()) == ([3, 1, 3], [1, 2, 5])


def test_cells_are_called_by_their_row_without_an_index(write_parquet):
    path = write_parquet("a.parquet", random_counts(5), donor=list("abcde"))
    with ParquetSource(path, VOCABULARY) as source:
        assert source.obs_names.tolist() == ["0", "1", "2", "3", "4"]
        assert source.obs.index.tolist() == ["0", "1", "2", "3", "4"]
        assert source.obs["donor"].tolist() == list("abcde")
        assert list(source.obs.columns) == ["donor"]


@pytest.mark.parametrize(("index", "names"), [
    (None, ["0", "1", "2"]),
    (pd.RangeIndex(5, 8), ["0", "1", "2"]),
    ([17, 3, 8], ["17", "3", "8"]),  # what sampling rows of a larger file leaves
    (pd.Index(["x", "y", "z"], name="barcode"), ["x", "y", "z"]),
    (pd.CategoricalIndex(["x", "y", "x"]), ["x", "y", "x"]),
])
def test_the_index_that_pandas_wrote_names_the_cells(index, names, tmp_path):
    lists = [np.array([1.0], dtype=np.float32)] * 3
    frame = pd.DataFrame({"genes": lists, "expressions": [np.log1p(x) for x in lists], "age": [1, 2, 3]}, index=index)
    frame.to_parquet(tmp_path / "a.parquet")
    with ParquetSource(tmp_path / "a.parquet", VOCABULARY) as source:
        assert source.obs_names.tolist() == names
        assert list(source.obs.columns) == ["age"]


def test_identity_is_the_vocabularys(write_parquet):
    human = Vocabulary.build([f"ENSG{i:011d}" for i in range(1, 40)])
    counts = np.zeros((2, human.size), dtype=int)
    counts[:, 5] = 1
    identity = ParquetSource(write_parquet("a.parquet", counts), human).identity
    assert identity.organism == "human" and identity.ids[:39] == human.names[:39]


class TestBadFiles:
    def fails(self, match, path):
        with pytest.raises(UserError, match=match):
            source = ParquetSource(path, VOCABULARY)
            source.read(0, source.n_cells)

    @pytest.mark.parametrize(("id_", "why"), [
        (34, r"the gene id 34, but the ids of the vocabulary are 0 … 33: give the vocabulary that the file was written with"),
        (-1, "the gene id -1, but the ids"),
        (np.inf, "the gene id inf, but the ids"),
        (2.5, "the gene id 2.5, which is no whole number"),
        (np.nan, "the gene id nan, which is no whole number"),
        (None, "the gene id nan, which is no whole number"),
        (10, "the gene id 10, which is <pad> in the vocabulary"),
        (11, "the gene id 11, which is <cls> in the vocabulary"),
        (13, "the gene id 13, which the vocabulary gives to no gene"),
    ])
    def test_ids_that_are_no_gene(self, id_, why, tmp_path):
        log = [float(np.log1p(1))] * 2
        self.fails(f"cell '1' of a.parquet has {why}", write_lists(tmp_path / "a.parquet", [[1, 2], [3, id_]], [log, log]))

    @pytest.mark.parametrize(("value", "what"), [
        (1.0, r"values whose expm1 is no whole number \(1 in cell '1'\): write the file again from raw counts"),
        (-0.5, r"negative values \(-0.5 in cell '1'\)"),
        (np.nan, r"NaN \(nan in cell '1'\)"),
        (None, r"NaN \(nan in cell '1'\)"),
        (np.inf, r"values over log1p\(2³²−1\) \(inf in cell '1'\)"),
    ])
    def test_values_that_are_no_log1p_of_counts(self, value, what, tmp_path):
        log = float(np.log1p(1))
        path = write_lists(tmp_path / "a.parquet", [[1, 2], [3, 4]], [[log, log], [log, value]])
        self.fails(f"the expressions of a.parquet are not log1p of raw counts, but hold {what}", path)

    def test_a_cell_far_in_is_named_by_its_index(self, tmp_path):
        values = [[float(np.log1p(2))]] * 600
        values[555] = [0.1]
        path = write_lists(tmp_path / "a.parquet", [[1]] * 600, values, __index_level_0__=[f"cell-{i}" for i in range(600)])
        self.fails("in cell 'cell-555'", path)

    def test_lists_of_different_length(self, tmp_path):
        path = write_lists(tmp_path / "a.parquet", [[1], [2, 3]], [[0.0], [0.0]])
        self.fails("cell '1' of a.parquet has 2 genes but 1 expressions: .* lists of one length", path)
        self.fails("cell '0' of b.parquet has 1 genes but 0 expr", write_lists(tmp_path / "b.parquet", [[1]], [None]))

    def test_no_cells(self, tmp_path):
        self.fails("a.parquet has no cells", write_lists(tmp_path / "a.parquet", [], []))

    def test_columns_that_are_missing_or_no_lists(self, tmp_path):
        path = tmp_path / "a.parquet"
        pq.write_table(pa.table({"genes": [[1.0]], "values": [[1.0]]}), path)
        self.fails(r"has no column 'expressions' \(it has genes, values\): give parquet files", path)
        pq.write_table(pa.table({"genes": [1.0], "expressions": [1.0]}), path)
        self.fails("the column 'genes' of .*a.parquet holds double values: it must hold a list of numbers a cell", path)
        pq.write_table(pa.table({"genes": [["CD4"]], "expressions": [[1.0]]}), path)
        self.fails("the column 'genes' of .*a.parquet holds list<.*string> values", path)

    def test_files_that_cannot_be_read(self, write_parquet, tmp_path):
        self.fails("there is no file", tmp_path / "nowhere.parquet")
        path = write_parquet("a.parquet", random_counts(500))
        content = path.read_bytes()
        path.write_bytes(b"")
        self.fails("cannot be read as a parquet file", path)
        path.write_bytes(content[:-100])
        self.fails("cannot be read as a parquet file", path)
        metadata = pq.read_metadata(write_parquet("b.parquet", random_counts(500)))
        damaged = bytearray(content)
        start = metadata.row_group(0).column(1).data_page_offset
        damaged[start : start + 40] = bytes(40)
        path.write_bytes(damaged)
        self.fails("a.parquet is damaged: ", path)
