"""info and verify."""

import shutil

import numpy as np
import pytest

from scbench import Store, prepare
from scbench.config import InfoConfig, VerifyConfig
from scbench.data.inspect import info, run_info, run_verify, verify
from scbench.data.manifest import file_facts, write_manifest
from scbench.errors import UserError


@pytest.fixture(scope="module")
def good_store(tmp_path_factory, cells_file):
    path = tmp_path_factory.mktemp("good") / "store"
    prepare(cells_file, path, workers=1, keep_obs="cell_type", split=".5,.3,.2")
    return path


@pytest.fixture
def store(good_store, tmp_path):
    return shutil.copytree(good_store, tmp_path / "store")


def test_info(good_store, capsys):
    store = Store.open(good_store)
    facts = run_info(InfoConfig(store=good_store))
    said = capsys.readouterr().out
    for name in ("train", "validation", "test"):
        split = store.split(name)
        assert facts["splits"][name]["cells"] == split.n_cells
        assert facts["splits"][name]["tokens"] == split.n_tokens
        assert facts["splits"][name]["median_genes"] == np.median(split.cells()["n_genes"])
        assert f"{name}: {split.n_cells} cells, {split.n_tokens:,} tokens" in said
    manifest_files = {"manifest.json", "manifest.sha256"}
    size = sum(path.stat().st_size for path in good_store.rglob("*") if path.is_file() and path.name not in manifest_files)
    assert facts["bytes"] == size
    assert facts["vocabulary"]["tokens"] == 123
    assert "from cells.h5ad" in said and "counts in X, 120 genes measured" in said
    assert "kept of obs: cell_type" in said
    run_info(InfoConfig(store=good_store, json=True))
    assert capsys.readouterr().out == ""


def test_info_of_a_store_with_an_empty_split(write_cells, tmp_path):
    store = prepare(write_cells("a.h5ad", np.eye(5, 7) + 1), tmp_path / "store", split="1,0,0", workers=1)
    assert info(store)["splits"]["test"] == {"cells": 0, "tokens": 0, "shards": 0, "extents": 0, "median_genes": 0.0}


def test_verify_a_good_store(good_store, capsys):
    facts = run_verify(VerifyConfig(store=good_store))
    assert facts["unknown_files"] == []
    assert facts["cells"] == info(Store.open(good_store))["splits"]["train"]["cells"] * 2
    assert ": OK (" in capsys.readouterr().out


def test_verify_names_files_that_do_not_belong(store, capsys):
    (store / "shard-00000" / "notes.txt").write_text("mine")
    assert run_verify(VerifyConfig(store=store))["unknown_files"] == ["shard-00000/notes.txt"]
    assert "not part of the store: shard-00000/notes.txt" in capsys.readouterr().out


def test_verify_finds_a_flipped_bit_in_every_kind_of_file(store):
    shard = store / "shard-00001"
    names = [path for path in shard.rglob("*") if path.is_file()]
    assert len(names) == 10  # four arrays of a header and a chunk, the table, the fingerprints
    for path in [*names, store / "vocabulary.json"]:
        good = path.read_bytes()
        bad = bytearray(good)
        bad[len(bad) // 2] ^= 1
        path.write_bytes(bad)
        with pytest.raises(UserError, match=str(path.relative_to(store))):
            verify(Store.open(store))
        path.write_bytes(good)
    verify(Store.open(store))


def test_verify_finds_cells_that_make_no_sense(store):
    """Damage that the digests were made of: the checks behind them speak."""
    chunk = store / "shard-00000" / "counts" / "c" / "0"
    content = bytearray(chunk.read_bytes())
    content[10] = 0
    chunk.write_bytes(content)
    opened = Store.open(store)
    facts = file_facts(chunk.parent)[chunk.name]
    files = opened.manifest["files"] | {"shard-00000/counts/c/0": facts}
    write_manifest(store, opened.manifest | {"files": files})
    with pytest.raises(UserError, match=r"block 0 of .*shard-00000 is damaged"):
        verify(Store.open(store))


@pytest.mark.parametrize(
    ("genes", "counts", "problem"),
    [
        ([3, 1, 2], [1, 1, 1], "genes out of order"),
        ([1, 1, 2], [1, 1, 1], "genes out of order"),
        ([1, 2, 1000], [1, 1, 1], "a gene outside the vocabulary"),
        ([1, 2, 3], [1, 0, 1], "a count of 0"),
    ],
)
def test_verify_looks_into_the_cells(genes, counts, problem, good_store, monkeypatch):
    from scbench.data.store import Extent, Split

    def read_extent(split, number):
        size = split.extent_sizes[number]
        offsets = np.concatenate([np.zeros(size // 2 + 1), np.full(size - size // 2, 3)]).astype(np.int64)
        return Extent(np.array(genes, dtype=np.uint16), np.array(counts, dtype=np.uint8), offsets)

    monkeypatch.setattr(Split, "read_extent", read_extent)
    with pytest.raises(UserError, match=problem):
        verify(Store.open(good_store))


def test_new_cells_may_start_anywhere(good_store):
    from scbench.data.inspect import _check_extent
    from scbench.data.store import Extent

    offsets = np.array([0, 0, 2, 2, 2, 5, 5])
    extent = Extent(np.array([5, 9, 1, 2, 8], dtype=np.uint16), np.ones(5, dtype=np.uint8), offsets)
    _check_extent(Store.open(good_store), extent, 10, "here")
