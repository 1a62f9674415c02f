"""--stage-to: the copy is the store, or there is none."""

import errno
import multiprocessing

import numpy as np
import pytest

from scbench import prepare
from scbench.data import stage as staging
from scbench.data.inspect import verify
from scbench.data.stage import stage
from scbench.errors import UserError


@pytest.fixture
def store(write_cells, tmp_path):
    counts = np.random.default_rng(0).poisson(0.5, (300, 40))
    return prepare(write_cells("cells.h5ad", counts), tmp_path / "store", workers=1)


def test_the_copy_is_the_store_and_is_made_once(store, tmp_path, monkeypatch):
    local = tmp_path / "disk" / "local"
    staged = stage(store, local)
    assert staged.fingerprint == store.fingerprint and staged.path.parent == local
    assert verify(staged)["unknown_files"] == []
    monkeypatch.setattr(staging, "_copy", None)
    assert stage(store, local).path == staged.path


def test_processes_of_one_node_share_a_copy(store, tmp_path):
    spawn = multiprocessing.get_context("spawn")
    processes = [spawn.Process(target=stage, args=(store, tmp_path / "local")) for _ in range(3)]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
    assert [process.exitcode for process in processes] == [0, 0, 0]
    assert [path.name for path in (tmp_path / "local").glob("[!.]*")] == [f"store-{store.fingerprint[:16]}"]


def test_a_killed_copy_goes_on_with_whole_files_only(store, tmp_path, monkeypatch):
    local = tmp_path / "local"
    partial = local / f".partial-store-{store.fingerprint[:16]}"
    (partial / "shard-00000" / "genes" / "c").mkdir(parents=True)
    whole = (store.path / "vocabulary.json").read_bytes()
    (partial / "vocabulary.json").write_bytes(whole)
    torn = partial / "shard-00000" / "genes" / "c" / "0"
    torn.write_bytes((store.path / "shard-00000" / "genes" / "c" / "0").read_bytes()[:100])
    before = (partial / "vocabulary.json").stat().st_ino, (partial / "vocabulary.json").stat().st_mtime_ns
    staged = stage(store, local)
    after = (staged.path / "vocabulary.json").stat()
    assert (after.st_ino, after.st_mtime_ns) == before
    verify(staged)


def test_a_damaged_store_is_not_staged(store, tmp_path):
    chunk = store.path / "shard-00001" / "counts" / "c" / "0"
    content = bytearray(chunk.read_bytes())
    content[0] ^= 1
    chunk.write_bytes(content)
    with pytest.raises(UserError, match=r"shard-00001/counts/c/0 is damaged"):
        stage(store, tmp_path / "local")
    assert list((tmp_path / "local").glob("[!.]*")) == []


def test_a_disk_that_is_too_small_or_fills_up_or_is_no_directory(store, tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(staging.shutil, "disk_usage", lambda path: type("Usage", (), {"free": 1000}))
        with pytest.raises(UserError, match=r"--stage-to .*local has 0\.0 GB free, and the store takes"):
            stage(store, tmp_path / "local")

    def full(*arguments):
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(staging, "_copy_file", full)
        with pytest.raises(UserError, match="the disk is full"):
            stage(store, tmp_path / "local")
    assert list((tmp_path / "local").glob("[!.]*")) == []
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="cannot be copied there"):
        stage(store, tmp_path / "file")
