"""Reading a shard store: opening checks what costs little, every extent that is read is checked by its checksums.

The store is a directory of shards (shard_format.py) with manifest.json, manifest.sha256 and vocabulary.json beside them.
Nothing is written here. TensorStore starts threads that don't survive a fork: start worker processes by spawn.
"""

import copy
import hashlib
import itertools
import json
import os
import re
from collections.abc import Iterable, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import tensorstore as ts

from scbench.data.measured import MEASURED_FILE, unpack
from scbench.data.shard_format import BLOCK_CELLS, CELLS_FILE, FORMAT_VERSION, SPLITS, ShardInfo, array_spec, block_checksums
from scbench.data.vocabulary import Vocabulary
from scbench.errors import UserError
from scbench.files import sha256

if TYPE_CHECKING:
    import pandas as pd

# Raw chunks are copied straight out of the page cache's map. What TensorStore "caches" of them is the map itself, no copy;
# to map a chunk anew for each extent that it holds a part of costs more than the copying (measured: 3 to 4 times the time).
_MAPS = ts.Context({"file_io_mode": {"mode": "memmap"}, "cache_pool": {"total_bytes_limit": 1 << 30}})
MANIFEST_FILE = "manifest.json"
DIGEST_FILE = "manifest.sha256"
DIGEST_LINE = f"{{}}  {MANIFEST_FILE}\n"  # as sha256sum writes it
VOCABULARY_FILE = "vocabulary.json"
OPEN_ARRAYS = 1024  # that a split keeps open: each takes 7 kB, and a store of 10⁸ cells has 6,000


class Extent(NamedTuple):
    """A run of consecutive cells, in memory of its own."""

    genes: np.ndarray  # uint16 or uint32 [nnz], token ids, ascending in a cell
    counts: np.ndarray  # one of COUNTS_DTYPES [nnz], raw counts > 0; floating only where fractional counts were kept
    offsets: np.ndarray  # int64 [cells + 1], from 0


class Store:
    """An opened store. Make one with `Store.open`.

    Attributes
    ----------
    path
        Its directory.
    manifest
        The parsed manifest.json.
    fingerprint
        SHA-256 of manifest.json, hexadecimal; it covers every byte of the store.
    shards
        What the manifest says of each shard, in order.
    """

    def __init__(self, path: Path, manifest: dict, fingerprint: str):
        self.path = path
        self.manifest = manifest
        self.fingerprint = fingerprint
        self.shards = [ShardInfo(**shard) for shard in manifest["shards"]]

    @classmethod
    def open(cls, path: Path | str) -> "Store":
        """Open the store in `path` and check its manifest, and the presence and size of the files of every shard but those
        of its arrays: they are checked when the array is first used.

        Raises
        ------
        UserError
            If it is not a store, unfinished, of a newer format, or if a file is missing or has another size.
        """
        path = Path(path)
        if not path.is_dir():
            raise UserError(f"there is no store {path}: make one with `scbench prepare`.")
        try:
            content = (path / MANIFEST_FILE).read_bytes()
        except FileNotFoundError:
            raise UserError(f"{path} is not a store, or an unfinished one: it has no {MANIFEST_FILE}.") from None
        manifest = _checked_manifest(path, content)
        # a store of 10⁸ cells has 10⁵ files, all but a tenth of them in arrays
        _check_files(path, manifest["files"], (name for name in manifest["files"] if name.count("/") < 2))
        return cls(path, manifest, hashlib.sha256(content).hexdigest())

    def check_files(self) -> None:
        """UserError unless every file is there with its size, those of the arrays too."""
        _check_files(self.path, self.manifest["files"], self.manifest["files"])

    @cached_property
    def vocabulary(self) -> Vocabulary:
        """The store's vocabulary; UserError if it is not the one that the manifest names."""
        file = self.path / VOCABULARY_FILE
        if sha256(file) != self.manifest["files"][VOCABULARY_FILE]["sha256"]:
            raise UserError(f"{file} is not the vocabulary of this store: it was changed.")
        return Vocabulary.load(file)

    @cached_property
    def measured_genes(self) -> np.ndarray:
        """Which tokens each set of genes holds, bool [sets, vocabulary]; the column `measured` of the cells names their set.

        The manifest's "measured" says which source, or dataset of a census, each set is of. A gene that is not in a cell's
        set is unknown there, not zero.

        Raises
        ------
        UserError
            If the store was prepared before there were such sets, or the file was changed.
        """
        file = self.path / MEASURED_FILE
        if "measured" not in self.manifest:
            raise UserError(f"{self.path} does not say which genes its sources measured: prepare it again.")
        if sha256(file) != self.manifest["files"][MEASURED_FILE]["sha256"]:
            raise UserError(f"{file} is not what this store was made with: restore it or prepare the store again.")
        return unpack(np.load(file, allow_pickle=False), self.vocabulary.size)

    def split(self, name: str) -> "Split":
        """The cells of "train", "validation" or "test"; a split may be empty."""
        if name not in SPLITS:
            raise ValueError(f"unknown split {name!r}: choose one of {', '.join(SPLITS)}")
        shards = [shard for shard in self.shards if shard.split == name]
        return Split(self.path, name, shards, self.manifest["files"])

    def __repr__(self) -> str:
        return f"Store({str(self.path)!r}, {sum(shard.cells for shard in self.shards)} cells, {self.fingerprint[:12]})"


class Split:
    """The cells of one split: a sequence of extents.

    A cell's number in the split is the sum of the sizes of the extents before its own, plus its index in that one.

    Attributes
    ----------
    name, n_cells, n_tokens
        "train", "validation" or "test"; its cells; their expressed genes in all.
    extent_sizes
        int64 [extents]: the cells of each extent, in order.
    """

    def __init__(self, path: Path, name: str, shards: Sequence[ShardInfo], files: Mapping[str, dict]):
        self.name = name
        self.shards = list(shards)
        self.n_cells = sum(shard.cells for shard in shards)
        self.n_tokens = sum(shard.nnz for shard in shards)
        self._path = path
        self._files = files  # of the manifest
        self._arrays: dict[tuple[str, str], ts.TensorStore] = {}
        # cells stay on the disk; a shard takes one number here, and an extent one of extent_sizes
        extents = [-(-shard.blocks // shard.blocks_per_extent) for shard in shards]
        self._first_extent = np.concatenate([[0], np.cumsum(extents, dtype=np.int64)]).astype(np.int64)
        sizes = [np.zeros(0, dtype=np.int64)]
        for shard, count in zip(shards, extents, strict=True):
            full = np.full(count, shard.blocks_per_extent * BLOCK_CELLS, dtype=np.int64)
            full[-1] = shard.cells - full[:-1].sum()
            sizes.append(full)
        self.extent_sizes = self._stored_sizes = np.concatenate(sizes)

    def __getstate__(self) -> dict:
        return self.__dict__ | {"_arrays": {}}  # a spawned process opens its own

    def first(self, n_cells: int) -> "Split":
        """The split's first cells only (the store is shuffled: a random sample). At most all."""
        part = copy.copy(self)
        part.n_cells = min(n_cells, self.n_cells)
        sizes = np.diff(np.minimum(np.cumsum(self.extent_sizes), part.n_cells), prepend=0)
        part.extent_sizes = sizes[sizes > 0]
        part.n_tokens, left = 0, part.n_cells
        for shard in self.shards:
            if left >= shard.cells:
                part.n_tokens += shard.nnz
            elif left > 0:
                part.n_tokens += int(self._array(shard, "offsets")[left].read().result())
            left -= shard.cells
        return part

    def read_extent(self, extent: int) -> Extent:
        """Read extent number `extent`, touching only its range of each array, and check its checksums. (The last extent of
        a split's `first` cells comes whole.)

        Raises
        ------
        UserError
            If a block doesn't match its checksum; names the shard and the block.
        """
        if not 0 <= extent < len(self.extent_sizes):
            raise IndexError(f"extent {extent} of {len(self.extent_sizes)}")
        number = int(np.searchsorted(self._first_extent, extent, side="right")) - 1
        shard = self.shards[number]
        first_block = (extent - int(self._first_extent[number])) * shard.blocks_per_extent
        last_block = min(first_block + shard.blocks_per_extent, shard.blocks)
        first_cell = first_block * BLOCK_CELLS
        cells = slice(first_cell, first_cell + int(self._stored_sizes[extent]) + 1)
        try:
            stored = self._array(shard, "block_crc")[first_block:last_block].read()
            offsets = self._array(shard, "offsets")[cells].read().result()
            # offsets decide what else is read, so they are looked at before their own checksum can be taken
            bad = np.flatnonzero((np.diff(offsets) < 0) | (offsets[:-1] < 0) | (offsets[1:] > shard.nnz))
            if len(bad):
                raise _damaged(self._path, shard, first_block + int(bad[0]) // BLOCK_CELLS)
            tokens = slice(int(offsets[0]), int(offsets[-1]))
            genes = self._array(shard, "genes")[tokens].read()
            counts = self._array(shard, "counts")[tokens].read()
            result = Extent(genes.result(), counts.result(), offsets - offsets[0])
            stored = stored.result()
        except ValueError as error:  # what TensorStore raises for every failure to open or read
            raise UserError(
                f"{self._path / shard.name} cannot be read ({str(error)[:200]}): "
                f"`scbench verify {self._path}` names the damaged file."
            ) from error
        bad = np.flatnonzero(block_checksums(*result) != stored)
        if len(bad):
            raise _damaged(self._path, shard, first_block + int(bad[0]))
        return result

    def cells(self, columns: Sequence[str] | None = None) -> "pd.DataFrame":
        """The table of the split's cells, one row a cell in cell order.

        Columns: source, original_id, content_hash (uint64), n_genes, total (counts before mapping), and the kept columns
        of obs; `columns` picks some. O(cells) memory: the training loader never calls this.
        """
        import pyarrow as pa
        import pyarrow.parquet as pq

        if not self.shards:
            raise UserError(f"the {self.name} split of {self._path} is empty.")
        try:
            tables = [pq.read_table(self._path / shard.name / CELLS_FILE, columns=columns) for shard in self.shards]
        except (OSError, pa.ArrowInvalid) as error:
            raise UserError(f"a {CELLS_FILE} of {self._path} cannot be read ({error}): run `scbench verify`.") from error
        # totals are whole in some shards and fractional in others if such parts were merged
        return pa.concat_tables(tables, promote_options="permissive").slice(0, self.n_cells).to_pandas()

    def cells_at(self, numbers: np.ndarray, columns: Sequence[str]) -> "pd.DataFrame":
        """Rows of that table: of the cells with these numbers in the split (int64 [n], any order). Memory: a shard's rows."""
        import pandas as pd
        import pyarrow.parquet as pq

        starts = np.concatenate([[0], np.cumsum([shard.cells for shard in self.shards])])
        rows = pd.DataFrame(index=range(len(numbers)), columns=list(columns), dtype=object)
        owners = np.searchsorted(starts, numbers, side="right") - 1
        for owner in np.unique(owners):
            here = np.flatnonzero(owners == owner)
            table = pq.read_table(self._path / self.shards[owner].name / CELLS_FILE, columns=list(columns))
            rows.iloc[here] = table.take(numbers[here] - starts[owner]).to_pandas().to_numpy(dtype=object)
        return rows

    def _array(self, shard: ShardInfo, name: str) -> ts.TensorStore:
        """The array `name` of a shard, opened on first use and held to the manifest: its files, header, dtype and length."""
        array = self._arrays.get((shard.name, name))
        if array is None:
            dtype, length = shard.arrays[name]
            header = f"{shard.name}/{name}/zarr.json"
            chunks = (f"{shard.name}/{name}/c/{number}" for number in itertools.count())
            _check_files(self._path, self._files, [header, *itertools.takewhile(self._files.__contains__, chunks)])
            if sha256(self._path / header) != self._files[header]["sha256"]:
                raise UserError(f"{self._path / header} is damaged (wrong SHA-256): restore it or prepare the store again.")
            spec = array_spec(self._path / shard.name / name) | {"recheck_cached_data": "open"}
            array = ts.open(spec, context=_MAPS, open=True, dtype=ts.dtype(dtype), shape=[length]).result()
            if len(self._arrays) >= OPEN_ARRAYS:
                self._arrays.clear()
            self._arrays[shard.name, name] = array
        return array


def _damaged(path: Path, shard: ShardInfo, block: int) -> UserError:
    return UserError(
        f"block {block} of {path / shard.name} is damaged (its checksum doesn't match): "
        f"`scbench verify {path}` names the file; restore it or prepare the store again."
    )


def _checked_manifest(path: Path, content: bytes) -> dict:
    """The parsed manifest, once its format and its digest are right."""
    damaged = UserError(f"{path / MANIFEST_FILE} is damaged: restore it or prepare the store again.")
    try:
        manifest = json.loads(content)
        version = manifest["format_version"]
    except (ValueError, TypeError, KeyError):
        raise damaged from None
    # first of all, because a newer format may keep its digest elsewhere
    if type(version) is int and version > FORMAT_VERSION:
        raise UserError(
            f"the store {path} has format {version}, and this scbench reads formats up to {FORMAT_VERSION}: upgrade scbench."
        )
    try:
        digest = (path / DIGEST_FILE).read_text(encoding="ascii")
    except (OSError, UnicodeDecodeError):
        digest = ""
    if not re.fullmatch(DIGEST_LINE.format("[0-9a-f]{64}"), digest):
        raise UserError(f"{path / DIGEST_FILE} is missing or damaged: restore it or prepare the store again.")
    if digest != DIGEST_LINE.format(hashlib.sha256(content).hexdigest()):
        raise damaged
    return manifest


def _check_files(path: Path, files: Mapping[str, dict], names: Iterable[str]) -> None:
    """UserError unless every named file is there with its size: reading past the end of a truncated map ends in SIGBUS."""
    root = str(path)
    for name in names:
        try:
            size = os.stat(f"{root}/{name}").st_size  # no Path objects: there can be many
        except OSError:
            shard = name.split("/")[0]
            missing = name if (path / shard).exists() else shard
            raise UserError(f"{missing} is missing from the store {path}: restore it or prepare the store again.") from None
        if size != files[name]["bytes"]:
            raise UserError(
                f"{path / name} has {size} bytes instead of {files[name]['bytes']}: restore it or prepare the store again."
            )
