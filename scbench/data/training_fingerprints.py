"""The fingerprints of the cells that a model was trained on: gathered from a store, kept in a model directory, memory-mapped.

In a model directory, beside training_cells.npy (sorted content hashes):

    fingerprints/about.json           format, number of cells, and which gene list
    fingerprints/core.npy             uint64, sorted hashes of core genes; cells with too few of them are absent
    fingerprints/cells.npy            CELL [cells]: barcode, source and signature, in the order of the store
    fingerprints/measured_genes.npy   uint8 [sources, …], packed bits: which genes of the list each source measured
"""

import json
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from scbench.data.fingerprints import (
    FINGERPRINTS_FILE,
    FORMAT_VERSION,
    MEASURED_FILE,
    RECORD,
    pack_measured,
    read_blocks,
    unpack_measured,
)
from scbench.data.store import Split, Store
from scbench.errors import UserError

CELL = np.dtype([(name, RECORD[name]) for name in ("barcode", "source", "signature")])


@dataclass(frozen=True, kw_only=True)
class TrainingFingerprints:
    """What is known of the cells of a training set."""

    content: np.ndarray  # uint64, sorted
    core: np.ndarray  # uint64, sorted, none is 0
    measured: np.ndarray  # bool [sources, MOST_GENES]
    genes: str  # fingerprint of the gene list
    n_cells: int
    blocks: Callable[[], Iterator[np.ndarray]]  # all cells, some at a time: CELL [n], or RECORD [n]

    @classmethod
    def of_store(cls, store: Store, splits: Iterable[Split]) -> "TrainingFingerprints | None":
        """Of the cells of some splits; None if the store was made before there were fingerprints. 16 bytes a cell in memory.

        Raises
        ------
        UserError
            If the store's fingerprints are of a newer format, or cannot be read.
        """
        about = store.manifest.get("fingerprints")
        if about is None:
            return None
        _check_format(about["format"], store.path)
        parts = [part for split in splits for part in _parts(store, split)]

        def blocks() -> Iterator[np.ndarray]:
            for path, stop in parts:
                yield from read_blocks(path, stop)

        try:
            hashes = [(block["content"].copy(), block["core"].copy()) for block in blocks()]
            measured = unpack_measured(np.load(store.path / MEASURED_FILE, allow_pickle=False))
        except (OSError, ValueError) as error:
            raise UserError(f"the fingerprints of {store.path} cannot be read ({error}): run `scbench verify`.") from error
        none = np.zeros(0, dtype=np.uint64)
        content, core = (np.concatenate([none, *(pair[i] for pair in hashes)]) for i in (0, 1))
        content.sort()
        core = np.sort(core[core != 0])
        return cls(content=content, core=core, measured=measured, genes=about["genes"], n_cells=len(content), blocks=blocks)

    def save(self, directory: Path) -> None:
        """Write the files named above, but for the content hashes, into `directory`, which is made."""
        directory.mkdir()
        np.save(directory / "core.npy", self.core)
        np.save(directory / MEASURED_FILE, pack_measured(self.measured))
        cells = np.lib.format.open_memmap(directory / "cells.npy", mode="w+", dtype=CELL, shape=(self.n_cells,))
        start = 0
        for block in self.blocks():
            for name in CELL.names:
                cells[name][start : start + len(block)] = block[name]
            start += len(block)
        cells.flush()
        about = {"format": FORMAT_VERSION, "cells": self.n_cells, "genes": self.genes}
        (directory / "about.json").write_text(json.dumps(about) + "\n", encoding="utf-8")

    @classmethod
    def load(cls, directory: Path, content: np.ndarray) -> "TrainingFingerprints":
        """Open what `save` wrote; `content` are the sorted content hashes of the same cells. Everything stays on the disk.

        Raises
        ------
        UserError
            If something is missing, damaged, or of a newer format.
        """
        try:
            about = json.loads((directory / "about.json").read_text(encoding="utf-8"))
            _check_format(about["format"], directory)
            core = np.load(directory / "core.npy", mmap_mode="r", allow_pickle=False)
            cells = np.load(directory / "cells.npy", mmap_mode="r", allow_pickle=False)
            measured = unpack_measured(np.load(directory / MEASURED_FILE, allow_pickle=False))
            whole = cells.dtype == CELL and cells.shape == (about["cells"],) == content.shape and core.dtype == np.uint64
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise UserError(f"the fingerprints in {directory} are damaged ({error}): copy the model again.") from error
        if not whole:
            raise UserError(f"the fingerprints in {directory} are not those of the model's training cells: copy it again.")
        return cls(content=content, core=core, measured=measured, genes=about["genes"], n_cells=about["cells"],
                   blocks=lambda: read_blocks(directory / "cells.npy"))


def _parts(store: Store, split: Split) -> Iterator[tuple[Path, int]]:
    """The file of each shard, and how many of its cells belong to the split."""
    left = split.n_cells
    for shard in split.shards:
        yield store.path / shard.name / FINGERPRINTS_FILE, min(left, shard.cells)
        left -= min(left, shard.cells)


def _check_format(version: int, place: Path) -> None:
    if version > FORMAT_VERSION:
        raise UserError(f"the fingerprints in {place} have format {version}, newer than this scbench reads: upgrade scbench.")
