"""prepare against a dense oracle: what goes in comes out, once, whatever the sizes, sources and processes."""

import hashlib
import itertools
import json
from dataclasses import replace

import numpy as np
import pytest

from scbench import Vocabulary, prepare
from scbench.config import PrepareConfig
from scbench.data import plan as plan_module
from scbench.data import prepare as prepare_module
from scbench.errors import UserError
from scbench.kernels import cells as native


def random_counts(n_cells, n_genes=40, seed=0, density=0.3):
    rng = np.random.default_rng(seed)
    return rng.poisson(3.0, (n_cells, n_genes)) * (rng.random((n_cells, n_genes)) < density)


def oracle(counts, genes=None):
    """{gene: count} of each row that has a gene."""
    genes = [f"g{i}" for i in range(counts.shape[1])] if genes is None else genes
    return [{gene: int(count) for gene, count in zip(genes, row, strict=True) if count} for row in counts]


def digest(store):
    """SHA-256 of every file of a store by name."""
    files = sorted(path for path in store.path.rglob("*") if path.is_file())
    return {str(path.relative_to(store.path)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def key(content):
    return tuple(sorted(content.items()))


@pytest.mark.parametrize("n_cells", [1, 2, 63, 64, 65, 129, 700])
def test_every_cell_comes_back_with_its_counts(n_cells, write_cells, stored_cells, tmp_path):
    counts = random_counts(n_cells, 60, density=0.5)
    counts[0] = np.arange(1, 61)  # a cell with every gene
    cells = stored_cells(prepare(write_cells("a.h5ad", counts), tmp_path / "store", workers=1))
    by_id = {cell["original_id"]: cell for cell in cells}
    assert len(by_id) == len(cells) == n_cells
    for row, content in enumerate(oracle(counts)):
        cell = by_id[f"a:{row}"]
        assert cell["content"] == content
        assert cell["source"] == "a.h5ad"
        assert cell["n_genes"] == len(content)
        assert cell["total"] == counts[row].sum()
    assert len({cell["content_hash"] for cell in cells}) == n_cells


def test_cells_are_shuffled_over_the_store_and_the_sources(write_cells, stored_cells, tmp_path):
    files = [write_cells(f"{name}.h5ad", random_counts(400, seed=seed, density=0.9)) for seed, name in enumerate("ab")]
    store = prepare(files, tmp_path / "store", workers=1)
    train = [cell["source"] for cell in stored_cells(store) if cell["split"] == "train"]
    runs = 1 + sum(first != second for first, second in itertools.pairwise(train))
    assert 300 < runs < 420  # 720 draws of two kinds change about 360 times
    other = [cell["original_id"] for cell in stored_cells(prepare(files, tmp_path / "other", workers=1, seed=1))]
    assert other != [cell["original_id"] for cell in stored_cells(store)]


def test_sources_with_different_genes_are_joined(write_cells, stored_cells, tmp_path):
    first, second = random_counts(50, 20, 1), random_counts(30, 20, 2)
    a = write_cells("a.h5ad", first, genes=[f"gene{i}" for i in range(20)])
    b = write_cells("b.h5ad", second, genes=[f"gene{i}" for i in range(10, 30)])
    store = prepare([a, b], tmp_path / "store", workers=1)
    expected = {f"a:{i}": c for i, c in enumerate(oracle(first, [f"gene{i}" for i in range(20)]))}
    expected |= {f"b:{i}": c for i, c in enumerate(oracle(second, [f"gene{i}" for i in range(10, 30)]))}
    assert {cell["original_id"]: cell["content"] for cell in stored_cells(store)} == {k: v for k, v in expected.items() if v}
    assert set(store.vocabulary.tokens) == {f"gene{i}" for i in range(30)} | {"<pad>", "<cls>", "<eoc>"}
    assert [source["name"] for source in store.manifest["sources"]] == ["a.h5ad", "b.h5ad"]
    for source, path in zip(store.manifest["sources"], [a, b], strict=True):
        assert source["sha256"] == hashlib.sha256(path.read_bytes()).hexdigest()


def test_files_of_one_name_are_told_apart(write_cells, tmp_path):
    paths = []
    for folder in ("one", "two"):
        (tmp_path / folder).mkdir()
        paths.append(write_cells(f"{folder}.h5ad", random_counts(20, seed=len(paths))).rename(tmp_path / folder / "x.h5ad"))
    store = prepare(paths, tmp_path / "store", workers=1)
    assert [source["name"] for source in store.manifest["sources"]] == ["one/x.h5ad", "two/x.h5ad"]
    assert str(tmp_path) not in (store.path / "manifest.json").read_text()


def test_empty_cells_and_small_cells_are_dropped_and_counted(write_cells, stored_cells, tmp_path):
    counts = random_counts(100, density=0.9)
    counts[3] = 0
    counts[7] = 0
    counts[11, 1:] = 0
    counts[11, 0] = 5
    path = write_cells("a.h5ad", counts)
    store = prepare(path, tmp_path / "one", workers=1)
    source = store.manifest["sources"][0]
    assert source["dropped"] == {"below_min_genes": 2, "duplicates": 0}
    assert source["cells"] == 100 and source["kept"] == 98
    assert {"a:3", "a:7"}.isdisjoint(cell["original_id"] for cell in stored_cells(store))
    assert prepare(path, tmp_path / "two", workers=1, min_genes=2).manifest["sources"][0]["kept"] == 97
    kept = stored_cells(prepare(path, tmp_path / "zero", workers=1, min_genes=0))
    assert [cell["content"] for cell in kept if cell["original_id"] in ("a:3", "a:7")] == [{}]  # two empty cells are equal


def test_exact_duplicates_are_dropped_and_counted_by_source(write_cells, stored_cells, tmp_path):
    first, second = random_counts(200, seed=1, density=0.9), random_counts(100, seed=2, density=0.9)
    first[50] = first[10]
    second[:20] = first[100:120]
    store = prepare([write_cells("a.h5ad", first), write_cells("b.h5ad", second)], tmp_path / "store", workers=1)
    assert [source["dropped"]["duplicates"] for source in store.manifest["sources"]] == [1, 20]
    contents = [key(cell["content"]) for cell in stored_cells(store)]
    assert len(contents) == len(set(contents)) == 279
    ids = {cell["original_id"] for cell in stored_cells(store)}
    assert "a:10" in ids and "a:50" not in ids  # the first of equal cells stays
    assert not {f"b:{i}" for i in range(20)} & ids


@pytest.mark.parametrize(("largest", "dtype"), [(255, "uint8"), (256, "uint16"), (65_535, "uint16"), (65_536, "uint32")])
def test_counts_have_the_smallest_dtype_that_holds_them(largest, dtype, write_cells, stored_cells, tmp_path):
    counts = random_counts(30)
    counts[4, 4] = largest
    store = prepare(write_cells("a.h5ad", counts), tmp_path / "store", split="1,0,0", workers=1)
    extent = store.split("train").read_extent(0)
    assert extent.counts.dtype == dtype and extent.counts.max() == largest
    assert extent.genes.dtype == "uint16"
    assert {key(cell["content"]) for cell in stored_cells(store)} == {key(content) for content in oracle(counts) if content}


def test_a_large_vocabulary_needs_uint32(write_cells, stored_cells, tmp_path):
    tokens = {f"x{i}": i for i in range(70_000)} | {f"g{i}": 70_000 + i for i in range(40)}
    tokens |= {"<pad>": 70_040, "<cls>": 70_041, "<eoc>": 70_042}
    Vocabulary(tokens).save(tmp_path / "vocabulary.json")
    counts = random_counts(70)
    store = prepare(write_cells("a.h5ad", counts), tmp_path / "store", vocabulary=tmp_path / "vocabulary.json", workers=1)
    assert store.split("train").read_extent(0).genes.dtype == np.uint32
    assert store.vocabulary.tokens == tokens
    assert {key(cell["content"]) for cell in stored_cells(store)} == {key(content) for content in oracle(counts) if content}


def test_genes_outside_the_vocabulary_count_in_the_total(write_cells, stored_cells, tmp_path):
    counts = random_counts(60, 10, density=0.9)
    Vocabulary.build([f"g{i}" for i in range(8)]).save(tmp_path / "vocabulary.json")
    store = prepare(write_cells("a.h5ad", counts), tmp_path / "store", vocabulary=tmp_path / "vocabulary.json", workers=1)
    for cell in stored_cells(store):
        row = counts[int(cell["original_id"].split(":")[1])]
        assert cell["total"] == row.sum()
        assert cell["content"] == oracle(row[None, :8])[0]
    source = store.manifest["sources"][0]
    assert (source["genes"], source["genes_matched"]) == (10, 8)
    assert (source["counts"], source["counts_matched"]) == (counts.sum(), counts[:, :8].sum())


def test_split_by_cell_gives_the_shares(write_cells, tmp_path):
    counts = random_counts(200, 60, density=0.5)
    store = prepare(write_cells("a.h5ad", counts), tmp_path / "store", split=".7,.2,.1", workers=1)
    assert [store.split(name).n_cells for name in ("train", "validation", "test")] == [140, 40, 20]


def test_split_by_keeps_groups_whole(write_cells, stored_cells, tmp_path):
    donors = [f"d{i % 10}" for i in range(300)]
    batch = [i % 2 for i in range(300)]
    path = write_cells("a.h5ad", random_counts(300, 60, density=0.5), donor=donors, batch=batch)
    store = prepare(path, tmp_path / "store", split=".6,.2,.2", split_by="donor", workers=1)
    groups = {}
    for cell in stored_cells(store):
        groups.setdefault(cell["donor"], set()).add(cell["split"])
    assert sorted(groups) == sorted(set(donors))
    assert all(len(splits) == 1 for splits in groups.values())
    sizes = {name: store.split(name).n_cells for name in ("train", "validation", "test")}
    assert sizes == {"train": 180, "validation": 60, "test": 60}
    both = prepare(path, tmp_path / "both", split=".6,.2,.2", split_by=["donor", "batch"], workers=1)
    assert both.manifest["obs_columns"] == ["donor", "batch"]


def test_a_duplicate_in_a_group_of_another_split_stays_once(write_cells, stored_cells, tmp_path):
    counts = np.repeat(random_counts(40, 60, density=0.5), 3, axis=0)
    path = write_cells("a.h5ad", counts, donor=[f"d{(i // 3 + i % 3) % 3}" for i in range(120)])
    store = prepare(path, tmp_path / "store", split=".4,.3,.3", split_by="donor", workers=1, seed=0)
    contents = [key(cell["content"]) for cell in stored_cells(store)]
    assert len(contents) == len(set(contents)) == 40
    assert store.manifest["sources"][0]["dropped"]["duplicates"] == 80


def test_one_content_is_never_in_two_splits_even_with_other_totals(write_cells, stored_cells, tmp_path):
    counts = np.repeat(random_counts(60, 12, density=0.9), 2, axis=0)
    counts[:, 10:] = 0
    counts[1::2, 11] = 1  # a gene outside the vocabulary tells the pairs apart
    Vocabulary.build([f"g{i}" for i in range(11)]).save(tmp_path / "vocabulary.json")
    path = write_cells("a.h5ad", counts, donor=[f"d{(i // 2 + i % 2) % 6}" for i in range(120)])
    for name, split_by in (("cells", ()), ("groups", ("donor",))):
        store = prepare(path, tmp_path / name, vocabulary=tmp_path / "vocabulary.json", split=".5,.25,.25",
                        split_by=split_by, workers=1)
        splits = {}
        for cell in stored_cells(store):
            splits.setdefault(cell["content_hash"], set()).add(cell["split"])
        assert all(len(where) == 1 for where in splits.values())


def test_kept_columns_come_back_with_their_types(write_cells, stored_cells, tmp_path):
    obs = {"kind": ["x", None, "y"], "age": [1, 2, 3], "score": [0.5, np.nan, 2.0], "flag": [True, False, True]}
    obs["mixed"] = [1, 2, 3]
    obs["absent"] = [np.nan] * 3  # in one input
    other = obs | {"mixed": [0.5, 1, 2], "absent": ["p", "q", "r"]}
    a = write_cells("a.h5ad", random_counts(3, density=0.9), **obs)
    b = write_cells("b.h5ad", random_counts(3, seed=1, density=0.9), **other)
    store = prepare([a, b], tmp_path / "store", keep_obs=list(obs), split="1,0,0", workers=1)
    table = store.split("train").cells().set_index("original_id")
    assert table["age"].dtype == np.int64 and table["score"].dtype == np.float64
    assert table.loc[["a:0", "a:1", "a:2"], "age"].tolist() == [1, 2, 3]
    assert table.loc["a:0", "kind"] == "x" and table.loc[["a:1"], "kind"].isna().all()
    assert table.loc["a:0", "flag"] == "True"
    assert np.isnan(table.loc["a:1", "score"])
    assert table.loc[["a:1", "b:0"], "mixed"].tolist() == [2.0, 0.5]
    assert table.loc["a:1", "absent"] is None and table.loc["b:1", "absent"] == "q"
    assert list(store.split("train").cells(["age"]).columns) == ["age"]


def test_the_bytes_depend_on_nothing_but_the_input(write_cells, tmp_path, monkeypatch):
    monkeypatch.setattr(plan_module, "SHARD_CELLS", 100)
    files = [write_cells("a.h5ad", random_counts(350, seed=1)), write_cells("b.h5ad", random_counts(200, seed=2))]
    one = prepare(files, tmp_path / "one", workers=1)
    assert len(one.shards) > 6
    monkeypatch.setattr(plan_module, "TASK_CELLS", 64)
    two = prepare(files, tmp_path / "deep" / "two", workers=2)
    assert digest(one) == digest(two)
    assert one.fingerprint == two.fingerprint
    assert not list(tmp_path.glob(".*")) and not list((tmp_path / "deep").glob(".*"))


def test_numpy_writes_the_bytes_that_the_c_code_writes(write_cells, tmp_path, monkeypatch):
    path = write_cells("a.h5ad", random_counts(350, seed=1), genes=[f"gene{i * 7 % 40}" for i in range(40)])
    ours = prepare(path, tmp_path / "ours", workers=1)
    monkeypatch.setattr(native, "library", lambda: None)
    assert digest(prepare(path, tmp_path / "numpys", workers=1)) == digest(ours)


def test_a_script_without_a_main_guard_can_use_workers(write_cells, tmp_path, run_python):
    write_cells("a.h5ad", random_counts(300))
    script = tmp_path / "script.py"
    script.write_text(
        "from scbench.data import plan, prepare\n"
        "plan.TASK_CELLS = 100\n"
        "print('started')\n"
        "print(prepare.prepare('a.h5ad', 'store', workers=2).split('train').n_cells)\n"
    )
    done = run_python(script, cwd=tmp_path)
    assert done.stdout.split() == ["started", "270"], done.stderr


class TestBadInput:
    def fails(self, match, inputs, tmp_path, **options):
        with pytest.raises(UserError, match=match):
            prepare(inputs, tmp_path / "store", **{"workers": 1, **options})
        assert not (tmp_path / "store").exists()
        assert not list(tmp_path.glob(".p*"))

    def test_output_exists(self, write_cells, tmp_path):
        (tmp_path / "there").mkdir()
        (tmp_path / "there" / "file").touch()
        with pytest.raises(UserError, match="exists already"):
            prepare(write_cells("a.h5ad", random_counts(5)), tmp_path / "there")

    def test_same_file_twice(self, write_cells, tmp_path):
        path = write_cells("a.h5ad", random_counts(5))
        self.fails("given twice", [path, tmp_path / "." / "a.h5ad"], tmp_path)
        copy = tmp_path / "copy.h5ad"
        copy.write_bytes(path.read_bytes())
        self.fails("are the same file", [path, copy], tmp_path)

    def test_missing_columns(self, write_cells, tmp_path):
        path = write_cells("a.h5ad", random_counts(5), donor=list("abcde"))
        self.fails("--keep-obs nothing: obs of a.h5ad has no such column; it has donor", path, tmp_path, keep_obs="nothing")
        self.fails("--split-by nothing: obs of a.h5ad has no such column", path, tmp_path, split_by="nothing")
        other = write_cells("b.h5ad", random_counts(5, seed=1))
        self.fails("--split-by donor: obs of b.h5ad has .* it has none", [path, other], tmp_path, split_by="donor")

    def test_column_with_a_name_of_the_store(self, write_cells, tmp_path):
        path = write_cells("a.h5ad", random_counts(5), total=[1] * 5)
        self.fails("has a column 'total' of its own", path, tmp_path, keep_obs="total")

    def test_one_group(self, write_cells, tmp_path):
        path = write_cells("a.h5ad", random_counts(5), donor=["a"] * 5, pair=list("aabbb"))
        self.fails("all cells have the same value", path, tmp_path, split_by="donor")
        self.fails("gives 2 groups for 3 splits", path, tmp_path, split_by="pair")

    @pytest.mark.parametrize("missing", ["", None, "nan"])
    def test_group_without_a_value(self, missing, write_cells, tmp_path):
        path = write_cells("a.h5ad", random_counts(5), donor=["a", "b", missing, "c", "d"])
        self.fails("cell 'a:2' of a.h5ad has no value", path, tmp_path, split_by="donor")

    def test_no_cell_left(self, write_cells, tmp_path):
        self.fails("no cell is left", write_cells("a.h5ad", random_counts(5)), tmp_path, min_genes=1000)

    def test_too_few_counts_match(self, write_cells, tmp_path):
        Vocabulary.build(["g0", "g1"]).save(tmp_path / "vocabulary.json")
        counts = random_counts(20, 40, density=0.9)
        self.fails("of the counts of a.h5ad", write_cells("a.h5ad", counts), tmp_path, vocabulary=tmp_path / "vocabulary.json")

    def test_options(self, write_cells, tmp_path):
        path = write_cells("a.h5ad", random_counts(5))
        self.fails("--workers is 0", path, tmp_path, workers=0)
        self.fails("--min-genes is -1", path, tmp_path, min_genes=-1)
        self.fails("not three shares", path, tmp_path, split=".5,.5")
        self.fails("there is no input", [], tmp_path)
        self.fails("there is no file", tmp_path / "nowhere.h5ad", tmp_path)

    def test_fractional_value_in_a_worker_process(self, write_cells, tmp_path, monkeypatch):
        counts = random_counts(2000, density=0.9).astype(float)
        counts[1500, 3] = 0.5
        monkeypatch.setattr(plan_module, "TASK_CELLS", 1000)
        self.fails("fractional values .* in cell 'a:1500'", write_cells("a.h5ad", counts), tmp_path, workers=2)

    def test_full_disk(self, write_cells, tmp_path, monkeypatch):
        from scbench.data import gather

        def full(*_):
            raise OSError(28, "No space left on device")

        path = write_cells("a.h5ad", random_counts(50))
        monkeypatch.setattr(gather.ShardWriter, "append", full)
        with pytest.raises(UserError, match="the disk is full"):
            prepare(path, tmp_path / "store", workers=1)
        assert not (tmp_path / "store").exists()
        monkeypatch.undo()
        prepare(path, tmp_path / "store", workers=1)  # the same command goes on
        assert not list(tmp_path.glob(".p*"))


def test_the_verb_says_what_came_of_it(write_cells, tmp_path, capsys):
    counts = random_counts(100)
    counts[5] = 0
    config = PrepareConfig(inputs=(write_cells("a.h5ad", counts),), output=tmp_path / "store", workers=1)
    result = prepare_module.run_prepare(config)
    said = capsys.readouterr().out
    assert "99 cells (train 89, validation 5, test 5)" in said
    assert "a.h5ad: 99 of 100 cells kept; 40 of 40 genes and 100.0% of the counts matched (counts in X)" in said
    assert "dropped 1: below min genes" in said
    assert json.loads(json.dumps(result))["splits"]["train"]["cells"] == 89
    prepare_module.run_prepare(replace(config, output=tmp_path / "json", json=True))
    assert capsys.readouterr().out == ""
