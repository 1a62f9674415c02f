"""prepare on the reference implementation's parquet files: the same store as from h5ad, by files and by directories."""

import hashlib
import os
from pathlib import Path

import anndata
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from scbench import Store, Vocabulary, prepare
from scbench.data import plan as plan_module
from scbench.data import prepare as prepare_module
from scbench.data import scatter as scatter_module
from scbench.errors import UserError

DATA = os.environ.get("SCBENCH_TEST_DATA")
GENES = 40


def random_counts(n_cells, seed=0):
    rng = np.random.default_rng(seed)
    return rng.poisson(3.0, (n_cells, GENES)) * (rng.random((n_cells, GENES)) < 0.5)


def digest(path):
    """SHA-256 of every file of a store by name."""
    files = sorted(file for file in path.rglob("*") if file.is_file())
    return {str(file.relative_to(path)): hashlib.sha256(file.read_bytes()).hexdigest() for file in files}


@pytest.fixture
def vocabulary(tmp_path):
    """A vocabulary of g0 … g39, the id of each its number: a row of counts by gene is one by token id."""
    tokens = {f"g{i}": i for i in range(GENES)} | {"<pad>": GENES, "<cls>": GENES + 1, "<eoc>": GENES + 2}
    Vocabulary(tokens).save(tmp_path / "vocabulary.json")
    return tmp_path / "vocabulary.json"


def test_the_store_is_that_of_the_same_cells_as_h5ad(write_cells, write_parquet, stored_cells, vocabulary, tmp_path):
    counts = random_counts(300)
    counts[0, 0] = 300_000
    counts[7] = counts[5]  # a duplicate
    donor, score = [f"d{i % 6}" for i in range(300)], np.where(counts[:, 0] > 1, 0.5, np.nan)
    obs = {"donor": donor, "age": np.arange(300), "score": score}
    options = {"vocabulary": vocabulary, "split": ".5,.25,.25", "split_by": "donor", "keep_obs": ["age", "score"]}
    h5ad = prepare(write_cells("a.h5ad", counts, **obs), tmp_path / "from-h5ad", workers=1, **options)
    columns = obs | {"donor": pa.array(donor).dictionary_encode(), "__index_level_0__": [f"a:{i}" for i in range(300)]}
    path = write_parquet("a.parquet", counts, row_group_size=70, **columns)
    parquet = prepare(path, tmp_path / "from-parquet", workers=1, **options)
    cells = stored_cells(parquet)
    assert len(cells) == 299 and {cell["source"] for cell in cells} == {"a.parquet"}
    # the records hold the content hash, the counts and the obs; compared as text, because NaN is not itself
    assert [str(cell | {"source": "a.h5ad"}) for cell in cells] == [str(cell) for cell in stored_cells(h5ad)]
    ours, theirs = digest(parquet.path), digest(h5ad.path)
    different = {Path(name).name for name in ours | theirs if ours.get(name) != theirs.get(name)}
    assert different == {"cells.parquet", "manifest.json", "manifest.sha256"}  # they name the source
    source = parquet.manifest["sources"][0]
    assert source["sha256"] == hashlib.sha256((tmp_path / "a.parquet").read_bytes()).hexdigest()
    assert (source["layer"], source["genes"], source["genes_matched"]) == ("expressions", GENES, GENES)
    assert source["counts"] == source["counts_matched"] == counts.sum()
    assert source["inexact_counts"] == h5ad.manifest["sources"][0]["inexact_counts"] == 0
    assert source["recovered_counts"] is None


def test_ids_are_taken_as_they_are_even_where_names_mean_one_gene(write_parquet, stored_cells, tmp_path):
    tokens = {"ENSG00000000003.1": 0, "TSPAN6": 1, "ENSG00000000003": 2, "<pad>": 3, "<cls>": 4, "<eoc>": 5}
    Vocabulary(tokens).save(tmp_path / "vocabulary.json")
    path = write_parquet("a.parquet", [[4, 2, 1]])
    store = prepare(path, tmp_path / "store", vocabulary=tmp_path / "vocabulary.json", split="1,0,0", workers=1)
    assert stored_cells(store)[0]["content"] == {"ENSG00000000003.1": 4, "TSPAN6": 2, "ENSG00000000003": 1}


def test_counts_that_float32_cannot_hold_are_reported(write_parquet, stored_cells, vocabulary, tmp_path, capsys):
    counts = random_counts(50)
    counts[3, 3], counts[9, :2] = 300_000, [300_001, 5_000_000]
    path = write_parquet("a.parquet", counts)
    store = prepare(path, tmp_path / "store", vocabulary=vocabulary, split="1,0,0", workers=1)
    assert store.manifest["sources"][0]["inexact_counts"] == 2
    by_id = {cell["original_id"]: cell["content"] for cell in stored_cells(store)}
    assert by_id["3"]["g3"] == 300_000
    assert by_id["9"]["g1"] == pytest.approx(5_000_000, rel=1e-6)
    prepare_module._say(store.path, store.manifest)
    assert "inexact counts: 2 (over 300,000, too large for log1p in float32)" in capsys.readouterr().out


def test_a_directory_goes_with_h5ad_and_in_natural_order(write_cells, write_parquet, stored_cells, vocabulary, tmp_path):
    parts = {number: random_counts(20, number) for number in (0, 2, 10)}
    for number in (10, 0, 2):
        write_parquet(f"pretrain/combined_data_{number}.parquet", parts[number])
    (tmp_path / "pretrain" / "notes.txt").write_text("not a cell")
    (tmp_path / "pretrain" / "._combined_data_0.parquet").write_text("not a cell either")
    other = random_counts(20, 99)
    h5ad = write_cells("a.h5ad", other)
    store = prepare([h5ad, tmp_path / "pretrain"], tmp_path / "store", vocabulary=vocabulary, workers=1)
    names = [source["name"] for source in store.manifest["sources"]]
    assert names == ["a.h5ad", "combined_data_0.parquet", "combined_data_2.parquet", "combined_data_10.parquet"]
    contents = {(cell["source"], cell["original_id"]): cell["content"] for cell in stored_cells(store)}
    expected = {("a.h5ad", f"a:{i}"): row for i, row in enumerate(other)}
    expected |= {(f"combined_data_{n}.parquet", str(i)): row for n, counts in parts.items() for i, row in enumerate(counts)}
    assert contents == {name: {f"g{i}": c for i, c in enumerate(row) if c} for name, row in expected.items()}


@pytest.fixture
def folder(write_parquet, monkeypatch, tmp_path):
    """Two files, one with a single row group and one with many, in parts of 64 cells and buckets of 100."""
    monkeypatch.setattr(plan_module, "SHARD_CELLS", 100)
    donors = [f"d{i % 5}" for i in range(350)]
    write_parquet("folder/a.parquet", random_counts(350, 1), donor=donors)
    write_parquet("folder/b.parquet", random_counts(350, 2), donor=donors, row_group_size=30)
    return tmp_path / "folder"


def test_the_bytes_depend_on_nothing_but_the_input(folder, vocabulary, tmp_path, monkeypatch):
    options = {"vocabulary": vocabulary, "keep_obs": "donor"}
    one = prepare(folder, tmp_path / "one", workers=1, **options)
    monkeypatch.setattr(plan_module, "TASK_CELLS", 64)
    two = prepare(folder, tmp_path / "two", workers=2, **options)
    assert len(one.shards) > 6
    assert digest(one.path) == digest(two.path)


def test_a_cut_off_run_goes_on(folder, vocabulary, tmp_path, monkeypatch):
    monkeypatch.setattr(plan_module, "TASK_CELLS", 64)
    options = {"vocabulary": vocabulary, "workers": 1}
    expected = digest(prepare(folder, tmp_path / "fresh", **options).path)
    parts = []
    work = scatter_module._scatter

    def cut_off_at_the_ninth(task, directory):
        parts.append(directory)
        if len(parts) == 9:
            raise KeyboardInterrupt
        return work(task, directory)

    monkeypatch.setattr(scatter_module, "_scatter", cut_off_at_the_ninth)
    with pytest.raises(KeyboardInterrupt):
        prepare(folder, tmp_path / "store", **options)
    assert digest(prepare(folder, tmp_path / "store", **options).path) == expected
    assert len(parts) == 9 + 4  # of 12 parts, 8 were there
    with pytest.raises(KeyboardInterrupt):
        parts.clear()
        prepare(folder, tmp_path / "other", **options)
    pq.write_table(pq.read_table(folder / "b.parquet").slice(0, 349), folder / "b.parquet")
    parts[:] = [None] * 9
    changed = prepare(folder, tmp_path / "other", **options)
    assert len(parts) == 9 + 12  # another file: nothing is used again
    assert sum(shard.cells for shard in changed.shards) == 699


class TestBadInput:
    def fails(self, match, inputs, tmp_path, **options):
        with pytest.raises(UserError, match=match):
            prepare(inputs, tmp_path / "store", **{"workers": 1, **options})
        assert not (tmp_path / "store").exists()
        assert not list(tmp_path.glob(".p*"))

    def test_no_vocabulary(self, write_cells, tmp_path):
        (tmp_path / "folder").mkdir()
        (tmp_path / "folder" / "unread.parquet").write_text("nothing is read before the refusal")
        match = "unread.parquet names genes by token ids, .* without the vocabulary .*: give that as --vocabulary"
        for inputs in ("folder", "folder/unread.parquet"):
            self.fails(match, tmp_path / inputs, tmp_path)
            self.fails(match, [tmp_path / "missing.h5ad", tmp_path / inputs], tmp_path)

    def test_directory_without_inputs(self, vocabulary, tmp_path):
        (tmp_path / "folder").mkdir()
        (tmp_path / "folder" / "a.csv").touch()
        self.fails("there is no .h5ad, .h5 or .parquet file and no .zarr store in the directory .*folder", tmp_path / "folder",
                   tmp_path, vocabulary=vocabulary)

    def test_same_file_twice(self, write_parquet, vocabulary, tmp_path):
        path = write_parquet("folder/a.parquet", random_counts(5))
        self.fails("a.parquet is given twice", [path.parent, path], tmp_path, vocabulary=vocabulary)
        (tmp_path / "folder" / "b.parquet").write_bytes(path.read_bytes())
        self.fails("are the same file", path.parent, tmp_path, vocabulary=vocabulary)

    @pytest.mark.parametrize("option", [{"layer": "X"}, {"genes_column": "name"}, {"recover_counts": True}])
    def test_options_about_h5ad(self, option, write_parquet, write_cells, vocabulary, tmp_path):
        path = write_parquet("a.parquet", random_counts(5))
        match = f"--{next(iter(option)).replace('_', '-')} is about h5ad files, and all inputs are parquet files"
        self.fails(match, path, tmp_path, vocabulary=vocabulary, **option)
        h5ad = write_cells("a.h5ad", random_counts(5, 1))
        if "layer" in option:  # which is then about the h5ad file
            prepare([h5ad, path], tmp_path / "both", vocabulary=vocabulary, workers=1, **option)

    def test_missing_columns(self, write_parquet, vocabulary, tmp_path):
        path = write_parquet("a.parquet", random_counts(5), donor=list("abcde"))
        match = "--keep-obs genes: obs of a.parquet has no such column; it has donor"
        self.fails(match, path, tmp_path, vocabulary=vocabulary, keep_obs="genes")

    def test_group_without_a_value(self, write_parquet, vocabulary, tmp_path):
        path = write_parquet("a.parquet", random_counts(4), donor=["a", None, "b", "c"])
        self.fails("cell '1' of a.parquet has no value", path, tmp_path, vocabulary=vocabulary, split_by="donor")

    def test_wrong_vocabulary_in_a_worker_process(self, write_parquet, vocabulary, tmp_path, monkeypatch):
        monkeypatch.setattr(plan_module, "TASK_CELLS", 1000)
        counts = np.zeros((2000, GENES + 1), dtype=int)
        counts[:, 0] = np.arange(2000) + 1
        counts[1500, GENES] = 1
        path = write_parquet("a.parquet", counts)
        match = "cell '1500' of a.parquet has the gene id 40, which is <pad>"
        self.fails(match, path, tmp_path, vocabulary=vocabulary, workers=2)

    def test_other_organism(self, write_parquet, write_cells, tmp_path):
        Vocabulary.build([f"ENSG{i:011d}" for i in range(1, 20)]).save(tmp_path / "vocabulary.json")
        mouse = write_cells("mouse.h5ad", random_counts(5), genes=[f"ENSMUSG{i:011d}" for i in range(GENES)])
        human = write_parquet("human.parquet", [[1, 2], [3, 4]])
        self.fails("different organisms", [mouse, human], tmp_path, vocabulary=tmp_path / "vocabulary.json")


@pytest.mark.skipif(DATA is None, reason="SCBENCH_TEST_DATA is not set: no real cells")
def test_real_cells_through_the_command_line(write_parquet, stored_cells, scbench_command, tmp_path):
    """300 PBMCs with the ids of the reference implementation's vocabulary: the store holds the counts of the h5ad."""
    vocabulary = Vocabulary.load(Path(DATA) / "vocabulary_60697.json")
    cells = anndata.read_h5ad(Path(DATA) / "pbmc3k.h5ad")[:300]
    known = [gene for gene in dict.fromkeys(cells.var_names) if gene in vocabulary.tokens]
    dense = np.zeros((300, vocabulary.size), dtype=np.int64)
    dense[:, [vocabulary.tokens[gene] for gene in known]] = cells[:, known].X.toarray()
    for part in range(2):
        write_parquet(f"pretrain/combined_data_{part}.parquet", dense[part * 150 : part * 150 + 150])
    done = scbench_command("prepare", tmp_path / "pretrain", "--vocabulary", Path(DATA) / "vocabulary_60697.json",
                           "-o", tmp_path / "store", "--workers", "1")
    assert done.returncode == 0, done.stderr
    assert "60,694 of 60,694 genes and 100.0% of the counts matched (counts in expressions)" in done.stdout
    stored = stored_cells(Store.open(tmp_path / "store"))
    assert len(stored) == 300
    for cell in stored:
        row = dense[int(cell["source"].split("_")[2][0]) * 150 + int(cell["original_id"])]
        assert cell["content"] == {vocabulary.names[i]: row[i] for i in np.flatnonzero(row)}
