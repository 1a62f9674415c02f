"""prepare --part and merge against the store of one run: the same cells, each once, in one split, and nothing copied."""

import hashlib
import json
import os
import shutil

import numpy as np
import pytest

from scbench import Store, Vocabulary, merge, prepare
from scbench.cli import main
from scbench.data import plan as plan_module
from scbench.data.inspect import verify
from scbench.errors import UserError

GENES = 40


def random_counts(n_cells, seed):
    rng = np.random.default_rng(seed)
    return rng.poisson(2.0, (n_cells, GENES)) * (rng.random((n_cells, GENES)) < 0.6)


def digest(store):
    files = sorted(path for path in store.path.rglob("*") if path.is_file())
    return {str(path.relative_to(store.path)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


@pytest.fixture
def inputs(write_cells, tmp_path, monkeypatch):
    """Two files of 350 and 200 cells of five donors, some of them copies, to be read in pieces of 64 cells."""
    monkeypatch.setattr(plan_module, "TASK_CELLS", 64)
    monkeypatch.setattr(plan_module, "SHARD_CELLS", 100)
    first, second = random_counts(350, 1), random_counts(200, 2)
    first[340] = first[3]  # in two parts of one file
    second[:30] = first[100:130]
    second[150] = 0
    Vocabulary.build([f"g{i}" for i in range(GENES)]).save(tmp_path / "vocabulary.json")
    donors = np.array(list("vwxyz"))
    return [write_cells(name, counts, donor=donors[np.arange(len(counts)) * 7 % 5])
            for name, counts in (("a.h5ad", first), ("b.h5ad", second))]


@pytest.fixture
def parts(inputs, tmp_path):
    """make(n, **options) -> the stores of n parts."""

    def make(of, **options):
        options = {"vocabulary": tmp_path / "vocabulary.json", "workers": 1, **options}
        return [prepare(inputs, tmp_path / f"part-{i}-of-{of}", part=f"{i}/{of}", **options).path for i in range(1, of + 1)]

    return make


def facts(cells):
    return {cell["original_id"]: (cell["source"], cell["n_genes"], cell["total"], cell["content"]) for cell in cells}


@pytest.mark.parametrize("split_by", [(), ("donor",)])
def test_the_cells_are_those_of_one_run(split_by, inputs, parts, stored_cells, tmp_path):
    whole = prepare(inputs, tmp_path / "whole", vocabulary=tmp_path / "vocabulary.json", workers=1, split_by=split_by,
                    split=".6,.2,.2")
    merged = merge(parts(4, split_by=split_by, split=".6,.2,.2")[::-1], tmp_path / "merged")
    cells = stored_cells(merged)
    assert facts(cells) == facts(stored_cells(whole))
    assert len(cells) == len({cell["content_hash"] for cell in cells}) == 550 - 30 - 1 - 1
    for name in ("cells", "kept", "dropped", "counts", "counts_matched", "sha256", "genes_matched", "layer"):
        joined, expected = ([source[name] for source in store.manifest["sources"]] for store in (merged, whole))
        assert joined == expected, name
    assert merged.manifest["parts"] == 4 and "part" not in merged.manifest
    checked = verify(Store.open(merged.path))
    assert checked["cells"] == 518 and checked["unknown_files"] == []
    if split_by:  # groups of one size in obs: the donors are where one run puts them
        assert {c["donor"]: c["split"] for c in cells} == {c["donor"]: c["split"] for c in stored_cells(whole)}
    assert not list(tmp_path.glob(".*"))


def test_the_split_of_a_content_is_the_same_in_all_parts(inputs, parts, stored_cells):
    where = {}
    for part in parts(5, split=".5,.3,.2"):
        for cell in stored_cells(Store.open(part)):
            where.setdefault(cell["content_hash"], set()).add(cell["split"])
    assert len(where) == 518 and all(len(splits) == 1 for splits in where.values())


def test_one_part_of_one_is_the_store_of_one_run(inputs, parts, tmp_path):
    whole = prepare(inputs, tmp_path / "whole", vocabulary=tmp_path / "vocabulary.json", workers=1)
    assert digest(merge(parts(1), tmp_path / "merged")) == digest(whole)


def test_files_are_linked_and_shards_alternate(parts, tmp_path):
    paths = parts(3)
    merged = merge(paths, tmp_path / "merged")
    linked = [file for file in merged.path.rglob("*") if file.is_file() and file.stat().st_nlink > 1]
    assert len(linked) > 0.5 * len(merged.manifest["files"])
    owner = {file.stat().st_ino: number for number, part in enumerate(paths) for file in part.rglob("zarr.json")}
    shards = [owner.get((merged.path / shard.name / "genes" / "zarr.json").stat().st_ino)
              for shard in merged.split("train").shards]
    known = [part for part in shards[:3] if part is not None]  # None: written again
    assert len(set(known)) == len(known)
    before = digest(merged)
    for part in paths:
        shutil.rmtree(part)
    assert digest(merged) == before


def test_a_part_reads_and_hashes_its_files_only(inputs, parts):
    manifests = [Store.open(part).manifest for part in parts(9)]  # 10 pieces
    digests = [[source["sha256"] for source in manifest["sources"]] for manifest in manifests]
    assert digests[0][1] is None and digests[-1][0] is None and digests[0][0] == digests[1][0]
    assert [source["cells"] for source in manifests[0]["sources"]] == [64, 0]


def test_a_merge_that_was_killed_goes_on(inputs, parts, tmp_path, run_python):
    paths = parts(3)
    fresh = digest(merge(paths, tmp_path / "fresh"))
    script = tmp_path / "killed.py"
    script.write_text(f"""
import os, signal
from scbench.data import merge, merge_duplicates

PARTS = {[str(path) for path in paths]}
for module, name, call in [(merge_duplicates, "_kept", 3), (merge, "_link", 40), (merge, "write_manifest", 1),
                           (merge, "publish_store", 1)]:
    child = os.fork()
    if child == 0:
        original, calls = getattr(module, name), []
        def replacement(*arguments):
            calls.append(1)
            if len(calls) == call:
                os.kill(os.getpid(), signal.SIGKILL)
            return original(*arguments)
        setattr(module, name, replacement)
        os.cpu_count = lambda: 1
        merge.merge(PARTS, "merged")
        os._exit(0)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL, name
    assert not os.path.exists("merged")
""")
    done = run_python(script, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / ".merge-merged").exists()
    assert digest(merge(paths, tmp_path / "merged")) == fresh
    assert not list(tmp_path.glob(".*"))


class TestBadInput:
    def fails(self, match, paths, tmp_path, capsys):
        with pytest.raises(SystemExit) as stop:
            main(["merge", *map(str, paths), "-o", str(tmp_path / "merged")])
        said = capsys.readouterr().err
        assert stop.value.code == 2
        assert match in said, said
        assert not (tmp_path / "merged").exists() and not list(tmp_path.glob(".[mp]*"))

    def test_sets_of_parts(self, inputs, parts, tmp_path, capsys):
        one, two, three = parts(3)
        self.fails("part 2 of 3 missing", [one, three], tmp_path, capsys)
        self.fails("parts 1, 3 of 3 missing", [two], tmp_path, capsys)
        self.fails("part 2/3 is given twice", [one, two, three, two], tmp_path, capsys)
        copy = shutil.copytree(two, tmp_path / "copy")
        self.fails("part 2/3 is given twice", [one, two, three, copy], tmp_path, capsys)
        self.fails("there is no store", [one, two, tmp_path / "nowhere"], tmp_path, capsys)
        whole = prepare(inputs, tmp_path / "whole", workers=1).path
        self.fails("is no part of a store", [one, two, whole], tmp_path, capsys)
        self.fails("one is of 3 parts and the other of 2", [one, *parts(2)], tmp_path, capsys)

    @pytest.mark.parametrize(("options", "match"), [
        ({"seed": 1}, "--seed is 0 in one and 1 in the other"),
        ({"keep_obs": "donor"}, "--keep-obs is [] in one and ['donor'] in the other"),
        ({"vocabulary": "other.json"}, "their vocabularies differ"),
    ])
    def test_other_plans(self, options, match, inputs, parts, tmp_path, capsys, monkeypatch):
        monkeypatch.chdir(tmp_path)
        Vocabulary.build([f"g{i}" for i in range(GENES + 1)]).save(tmp_path / "other.json")
        one, _ = parts(2)
        options = {"vocabulary": tmp_path / "vocabulary.json", "workers": 1, **options}
        other = prepare(inputs, tmp_path / "other", part="2/2", **options).path
        self.fails(match, [one, other], tmp_path, capsys)

    def test_other_inputs(self, inputs, parts, write_cells, tmp_path, capsys):
        one, _ = parts(2)
        options = {"vocabulary": tmp_path / "vocabulary.json", "workers": 1, "part": "2/2"}
        fewer = prepare(inputs[:1], tmp_path / "fewer", **options).path
        self.fails("their inputs or the versions of scbench differ", [one, fewer], tmp_path, capsys)
        write_cells("a.h5ad", random_counts(350, 5), donor=["v"] * 350)
        changed = prepare(inputs, tmp_path / "changed", **options).path
        self.fails("a.h5ad changed between the parts (its sha256 differs)", [one, changed], tmp_path, capsys)

    def test_damaged_and_unfinished_parts(self, parts, tmp_path, capsys):
        one, two = parts(2)
        table = two / "shard-00000" / "cells.parquet"
        whole = table.read_bytes()
        table.write_bytes(whole[:-9] + bytes([whole[-9] ^ 1]) + whole[-8:])
        self.fails("is damaged (wrong SHA-256)", [one, two], tmp_path, capsys)
        table.write_bytes(whole)
        genes = next((two / "shard-00000" / "genes").rglob("0"))
        os.truncate(genes, 10)
        self.fails("has 10 bytes instead of", [one, two], tmp_path, capsys)
        (two / "manifest.json").unlink()
        self.fails("unfinished", [one, two], tmp_path, capsys)

    def test_no_links(self, parts, tmp_path, capsys, monkeypatch):
        def refuse(*_):
            raise OSError(18, "Invalid cross-device link")

        paths = parts(2)
        monkeypatch.setattr(os, "link", refuse)
        self.fails("cannot be hard-linked", paths, tmp_path, capsys)

    @pytest.mark.parametrize(("part", "options", "match"), [
        ("0/3", {}, "is not i/n"), ("4/3", {}, "is not i/n"), ("half", {}, "is not i/n"),
        ("1/99", {}, "there can be 10 parts at most"),
        ("1/3", {"vocabulary": None}, "--part needs --vocabulary"),
        ("1/3", {"skip_bad_sources": True}, "--part and --skip-bad-sources"),
    ])
    def test_part(self, part, options, match, inputs, tmp_path):
        options = {"vocabulary": tmp_path / "vocabulary.json", "workers": 1, **options}
        with pytest.raises(UserError, match=match):
            prepare(inputs, tmp_path / "store", part=part, **options)
        assert not list(tmp_path.glob(".p*"))


def test_the_verbs_say_what_came_of_it(inputs, parts, tmp_path, capsys):
    paths = [str(path) for path in parts(2)]
    main(["info", paths[0]])
    assert "part 1 of 2" in capsys.readouterr().out
    main(["merge", *paths, "-o", str(tmp_path / "merged")])
    assert "518 cells of 2 parts (train" in capsys.readouterr().out
    main(["info", str(tmp_path / "merged")])
    assert "merged from 2 parts" in capsys.readouterr().out
    main(["merge", *paths, "-o", str(tmp_path / "json"), "--json"])
    assert json.loads(capsys.readouterr().out)["splits"]["train"]["cells"] > 400
