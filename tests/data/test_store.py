"""Shards written and read back, and what opening and reading say of a damaged store."""

import hashlib
import itertools
import json
import shutil
import threading

import google_crc32c
import numpy as np
import pyarrow as pa
import pytest
import tensorstore as ts

from scbench import Store, prepare
from scbench.data.inspect import verify
from scbench.data.manifest import file_facts, write_manifest
from scbench.data.shard_format import CELLS_FILE, CHUNK_BYTES, ShardInfo, new_array_spec
from scbench.data.shard_writer import ShardWriter
from scbench.data.store import Split
from scbench.errors import UserError


def random_shard(n_cells, mean_genes=30, vocabulary_size=1000, largest=200, seed=0):
    """genes, counts, lengths of random cells; some are empty."""
    rng = np.random.default_rng(seed)
    lengths = np.minimum(rng.poisson(mean_genes, n_cells), vocabulary_size)
    lengths[rng.random(n_cells) < 0.1] = 0
    genes = [np.sort(rng.choice(vocabulary_size, n, replace=False)) for n in lengths]
    return np.concatenate([np.zeros(0, dtype=np.int64), *genes]), rng.integers(1, largest + 1, lengths.sum()), lengths


def write_shard(directory, genes, counts, lengths, pieces, vocabulary_size=1000):
    """Write a shard in `pieces` calls of append; the Split that reads it."""
    info = ShardInfo.plan(split="train", cells=len(lengths), nnz=len(genes),
                          counts=str(np.min_scalar_type(int(counts.max(initial=0)))), vocabulary_size=vocabulary_size)
    writer = ShardWriter(directory / "shard-00000", info)
    ends = np.cumsum(lengths)
    cuts = np.linspace(0, len(lengths), pieces + 1).astype(int)
    for low, high in itertools.pairwise(cuts):
        tokens = slice(ends[low - 1] if low else 0, ends[high - 1] if high else 0)
        writer.append(genes[tokens], counts[tokens], lengths[low:high])
    writer.finish(pa.table({"n_genes": lengths}))
    return Split(directory, "train", [ShardInfo(**{**info.__dict__, "name": "shard-00000"})], file_facts(directory))


@pytest.mark.parametrize("n_cells", [1, 63, 64, 65, 200, 1000])
@pytest.mark.parametrize("pieces", [1, 7])
def test_a_shard_comes_back(n_cells, pieces, tmp_path, monkeypatch):
    monkeypatch.setattr("scbench.data.shard_format.EXTENT_BYTES", 20_000)
    monkeypatch.setattr("scbench.data.shard_format.CHUNK_BYTES", 3_000)
    genes, counts, lengths = random_shard(n_cells)
    split = write_shard(tmp_path, genes, counts, lengths, pieces)
    extents = [split.read_extent(number) for number in range(len(split.extent_sizes))]
    assert [len(extent.offsets) - 1 for extent in extents] == split.extent_sizes.tolist()
    assert split.extent_sizes.sum() == split.n_cells == n_cells
    assert (split.extent_sizes[:-1] % 64 == 0).all()
    assert np.array_equal(np.concatenate([extent.genes for extent in extents]), genes)
    assert np.array_equal(np.concatenate([extent.counts for extent in extents]), counts)
    assert np.array_equal(np.concatenate([np.diff(extent.offsets) for extent in extents]), lengths)
    for extent in extents:
        assert extent.offsets[0] == 0 and extent.offsets.dtype == np.int64
        assert extent.genes.flags.writeable and extent.counts.flags.writeable  # memory of its own
    assert all(path.stat().st_size <= 3_000 for path in tmp_path.rglob("c/*"))


def test_extents_are_about_eight_megabytes(tmp_path):
    genes, counts, lengths = random_shard(3000, mean_genes=2000, vocabulary_size=40_000)
    split = write_shard(tmp_path, genes, counts, lengths, 3, vocabulary_size=40_000)
    sizes = [3 * len(split.read_extent(number).genes) for number in range(len(split.extent_sizes))]
    assert len(sizes) == 2
    assert all(7e6 < size < 10e6 for size in sizes)


def test_the_arrays_are_plain_zarr_and_the_checksums_plain_crc32c(tmp_path):
    """What any other zarr reader sees: chunks that, joined, are the array, and a checksum that a few lines recompute."""
    genes, counts, lengths = random_shard(130)
    write_shard(tmp_path, genes, counts, lengths, 2)
    shard = tmp_path / "shard-00000"
    assert json.loads((shard / "genes" / "zarr.json").read_text())["codecs"] == [
        {"name": "bytes", "configuration": {"endian": "little"}}
    ]

    def values(name, dtype):
        return np.frombuffer((shard / name / "c" / "0").read_bytes(), dtype)

    offsets = values("offsets", "<i8")
    assert np.array_equal(np.diff(offsets), lengths)
    assert np.array_equal(values("genes", "<u2"), genes)
    for block in range(3):
        low, high = block * 64, min(block * 64 + 64, 130)
        content = genes[offsets[low] : offsets[high]].astype("<u2").tobytes()
        content += counts[offsets[low] : offsets[high]].astype("u1").tobytes()
        content += (offsets[low : high + 1] - offsets[low]).astype("<i8").tobytes()
        assert google_crc32c.value(content) == values("block_crc", "<u4")[block]


def test_chunks_stay_under_the_limit_without_padding():
    for length in (0, 1, 3_999_999, 4_000_001, 9_000_000):
        spec = new_array_spec("x", "uint16", length)["metadata"]
        chunk = spec["chunk_grid"]["configuration"]["chunk_shape"][0]
        assert chunk * 2 <= CHUNK_BYTES
        files = -(-length // chunk)
        assert files * chunk - length <= files


def test_a_shard_of_empty_cells_only(tmp_path):
    none = np.zeros(0, dtype=np.int64)
    split = write_shard(tmp_path, none, none, np.zeros(70, dtype=np.int64), 1)
    extent = split.read_extent(0)
    assert len(extent.genes) == 0 and extent.offsets.tolist() == [0] * 71


def test_split_edges(tmp_path):
    split = write_shard(tmp_path, *random_shard(10), 1)
    with pytest.raises(IndexError):
        split.read_extent(1)
    with pytest.raises(IndexError):
        split.read_extent(-1)
    empty = Split(tmp_path, "test", [], {})
    assert (empty.n_cells, empty.n_tokens, len(empty.extent_sizes)) == (0, 0, 0)
    assert empty.extent_sizes.dtype == np.int64


def test_threads_read_one_split(tmp_path, monkeypatch):
    monkeypatch.setattr("scbench.data.shard_format.EXTENT_BYTES", 10_000)
    genes, counts, lengths = random_shard(1000)
    split = write_shard(tmp_path, genes, counts, lengths, 1)
    found = {}

    def read(number):
        found[number] = split.read_extent(number).genes

    threads = [threading.Thread(target=read, args=(number,)) for number in range(len(split.extent_sizes))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert np.array_equal(np.concatenate([found[number] for number in range(len(threads))]), genes)


def test_reading_touches_its_range_only(tmp_path, monkeypatch):
    """An extent can be read when the files of all others are gone: nothing of size O(cells) is loaded."""
    monkeypatch.setattr("scbench.data.shard_format.EXTENT_BYTES", 20_000)
    monkeypatch.setattr("scbench.data.shard_format.CHUNK_BYTES", 2_000)
    genes, counts, lengths = random_shard(2000)
    split = write_shard(tmp_path, genes, counts, lengths, 1)
    split.read_extent(0)  # the first use of an array looks whether its files are there
    for name in ("genes", "counts", "offsets"):
        chunks = sorted((tmp_path / "shard-00000" / name / "c").iterdir(), key=lambda path: int(path.name))
        for chunk in chunks[len(chunks) // 2 :]:
            chunk.unlink()
    assert np.array_equal(split.read_extent(0).genes, genes[: lengths[: split.extent_sizes[0]].sum()])


# --- stores -----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def good_store(tmp_path_factory, cells_file):
    path = tmp_path_factory.mktemp("good") / "store"
    prepare(cells_file, path, workers=1, keep_obs="cell_type")
    return path


@pytest.fixture
def store(good_store, tmp_path):
    """A store to damage."""
    return shutil.copytree(good_store, tmp_path / "store")


def flip(path, position=None):
    content = bytearray(path.read_bytes())
    content[len(content) // 2 if position is None else position] ^= 0x10
    path.write_bytes(content)


def test_open(store, good_store):
    opened = Store.open(str(store))
    assert opened.fingerprint == hashlib.sha256((store / "manifest.json").read_bytes()).hexdigest()
    assert opened.fingerprint == Store.open(good_store).fingerprint
    digest, name = (store / "manifest.sha256").read_text().split()
    assert (digest, name) == (opened.fingerprint, "manifest.json")
    assert opened.vocabulary.fingerprint == opened.manifest["vocabulary"]["fingerprint"]
    with pytest.raises(ValueError, match="unknown split"):
        opened.split("training")


def test_no_store(tmp_path, store):
    with pytest.raises(UserError, match="there is no store"):
        Store.open(tmp_path / "nowhere")
    (store / "manifest.json").unlink()
    with pytest.raises(UserError, match="not a store, or an unfinished one"):
        Store.open(store)


def test_manifest_damaged(store):
    flip(store / "manifest.json")
    with pytest.raises(UserError, match=r"manifest\.json is damaged"):
        Store.open(store)


@pytest.mark.parametrize("content", ["", "[]", "{}", '{"format_version": 1}', "\x00"])
def test_manifest_of_something_else(content, store):
    (store / "manifest.json").write_text(content)
    with pytest.raises(UserError, match=r"manifest\.json is damaged"):
        Store.open(store)


def test_digest_missing_or_damaged(store):
    flip(store / "manifest.sha256", 3)
    with pytest.raises(UserError, match=r"manifest\.json is damaged|manifest\.sha256 is missing or damaged"):
        Store.open(store)
    (store / "manifest.sha256").unlink()
    with pytest.raises(UserError, match=r"manifest\.sha256 is missing or damaged"):
        Store.open(store)


def test_newer_format(store):
    manifest = json.loads((store / "manifest.json").read_text())
    write_manifest(store, manifest | {"format_version": 2})
    with pytest.raises(UserError, match=r"has format 2.*upgrade scbench"):
        Store.open(store)


def test_missing_shard_and_missing_file(store):
    (store / "shard-00001" / "genes" / "c" / "0").unlink()
    validation = Store.open(store).split("validation")  # that of shard-00001
    with pytest.raises(UserError, match=r"shard-00001/genes/c/0 is missing"):
        validation.read_extent(0)
    with pytest.raises(UserError, match=r"shard-00001/genes/c/0 is missing"):
        verify(Store.open(store))
    shutil.rmtree(store / "shard-00001")
    with pytest.raises(UserError, match=r"^shard-00001 is missing from the store"):
        Store.open(store)


@pytest.mark.parametrize("name", ["genes/c/0", "counts/c/0", "offsets/c/0", "block_crc/c/0", "genes/zarr.json", CELLS_FILE])
def test_truncated_file(name, store):
    path = store / "shard-00000" / name
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(UserError, match=rf"{name} has \d+ bytes instead of \d+"):
        Store.open(store).split("train").read_extent(0)


@pytest.mark.parametrize("name", ["genes", "counts", "offsets", "block_crc"])
@pytest.mark.parametrize("part", ["first", "middle", "last"])
def test_a_flipped_byte_is_found_when_its_extent_is_read(name, part, store):
    path = store / "shard-00000" / name / "c" / "0"
    size = path.stat().st_size
    flip(path, {"first": 0, "middle": size // 2, "last": size - 8 if name == "offsets" else size - 1}[part])
    split = Store.open(store).split("train")
    with pytest.raises(UserError, match=r"block \d+ of .*shard-00000 is damaged.*scbench verify"):
        for number in range(len(split.extent_sizes)):
            split.read_extent(number)


def test_the_damaged_block_is_named(store):
    split = Store.open(store).split("train")
    blocks = -(-split.n_cells // 64)
    assert blocks >= 4
    ends = np.cumsum([0, *np.diff(split.read_extent(0).offsets)])
    flip(store / "shard-00000" / "genes" / "c" / "0", int(ends[64 * 2]) * 2)
    with pytest.raises(UserError, match=r"block 2 of"):
        Store.open(store).split("train").read_extent(0)


def test_an_array_that_is_not_the_manifests(store):
    path = store / "shard-00000" / "genes" / "zarr.json"
    path.write_text(path.read_text().replace("uint16", "int16 "))
    with pytest.raises(UserError, match=r"zarr\.json is damaged"):
        Store.open(store).split("train").read_extent(0)
    # digests that were made of the damage: TensorStore's own check speaks
    manifest = json.loads((store / "manifest.json").read_text())
    manifest["files"]["shard-00000/genes/zarr.json"] = file_facts(path.parent)["zarr.json"]
    write_manifest(store, manifest)
    with pytest.raises(UserError, match=r"cannot be read.*scbench verify"):
        Store.open(store).split("train").read_extent(0)


def test_another_vocabulary(store):
    text = (store / "vocabulary.json").read_text()
    (store / "vocabulary.json").write_text(text.replace("ENSG00000000001", "ENSG00000000999"))
    with pytest.raises(UserError, match="not the vocabulary of this store"):
        _ = Store.open(store).vocabulary


def test_a_damaged_table(store):
    flip(store / "shard-00000" / "cells.parquet", -6)
    with pytest.raises(UserError, match="scbench verify"):
        Store.open(store).split("train").cells()


def test_other_tensorstore_users_see_the_same(good_store):
    """No option of ours is needed to open an array."""
    spec = {"driver": "zarr3", "kvstore": {"driver": "file", "path": str(good_store / "shard-00000" / "counts")}}
    array = ts.open(spec, open=True).result()
    extent = Store.open(good_store).split("train").read_extent(0)
    assert np.array_equal(array[: len(extent.counts)].read().result(), extent.counts)


def in_padding(store, path, position):
    """Whether a byte lies behind the end of its array: a last chunk is as long as the others."""
    header = path.parent.parent / "zarr.json"
    if path.parent.name != "c":
        return False
    metadata = json.loads(header.read_text())
    chunk = metadata["chunk_grid"]["configuration"]["chunk_shape"][0]
    element = int(path.name) * chunk + position // np.dtype(metadata["data_type"]).itemsize
    return element >= metadata["shape"][0]


def read_all(store):
    opened = Store.open(store)
    _ = opened.vocabulary
    for name in ("train", "validation", "test"):
        split = opened.split(name)
        for extent in range(len(split.extent_sizes)):
            split.read_extent(extent)


def test_a_hundred_flipped_bytes_are_found(good_store, tmp_path):
    """One at a time, in files of every kind: by verify, and by whoever opens and reads the store for training."""
    store = shutil.copytree(good_store, tmp_path / "store")
    read_all(store)
    files = sorted(path for path in store.rglob("*") if path.is_file())
    unread = {"cells.parquet", "fingerprints.npy", "measured_genes.npy"}  # training opens none of them
    rng = np.random.default_rng(5)
    read = 0
    for number in range(100):
        path = files[number] if number < len(files) else files[rng.integers(len(files))]
        good = path.read_bytes()
        position = int(rng.integers(len(good)))
        path.write_bytes(good[:position] + bytes([good[position] ^ int(rng.integers(1, 256))]) + good[position + 1 :])
        with pytest.raises(UserError, match=r"damaged|changed"):
            verify(Store.open(store))
        if path.name not in unread and not in_padding(store, path, position):
            with pytest.raises(UserError, match=r"damaged|changed"):
                read_all(store)
            read += 1
        path.write_bytes(good)
    assert read > 50
    verify(Store.open(store))
