"""The fingerprints of the cells that a model was trained on: streamed from a store, kept in a model directory, memory-mapped.

In a model directory, beside training_cells.npy (sorted content hashes):

    fingerprints/about.json           format, number of cells, and which gene list
    fingerprints/core.npy             uint64, sorted hashes of core genes; cells with too few of them are absent
    fingerprints/cells.npy            CELL [cells]: barcode, measured set and signature, in the order of the store
    fingerprints/measured_genes.npy   uint8 [sets, …], packed bits: which genes of the list each source measured
"""

import json
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from scbench.data.fingerprint_genes import MOST_GENES, gene_list, measured_genes
from scbench.data.fingerprints import FINGERPRINTS_FILE, FORMAT_VERSION, RECORD, WordIndex, read_blocks
from scbench.data.measured import MEASURED_FILE, pack, unpack
from scbench.data.store import Split, Store
from scbench.errors import UserError

CELL = np.dtype([(name, RECORD[name]) for name in ("barcode", "measured", "signature")])


@dataclass(frozen=True, kw_only=True)
class TrainingFingerprints:
    """What is known of the cells of a training set."""

    hashes: dict[str, np.ndarray] | None  # content and core, sorted uint64; None: the blocks hold them
    measured: np.ndarray  # bool [sets, MOST_GENES]
    genes: str  # fingerprint of the gene list
    n_cells: int
    blocks: Callable[[], Iterator[np.ndarray]]  # all cells, some at a time: CELL [n], or RECORD [n] without hashes

    @classmethod
    def of_store(cls, store: Store, splits: Iterable[Split]) -> "TrainingFingerprints | None":
        """Of the cells of some splits, on the disk; None if the store was made before there were fingerprints.

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
                try:
                    yield from read_blocks(path, stop)
                except (OSError, ValueError) as error:
                    raise UserError(f"{path} cannot be read ({error}): run `scbench verify`.") from error

        measured = measured_genes(store.measured_genes, gene_list(store.vocabulary))
        n_cells = sum(stop for _, stop in parts)
        return cls(hashes=None, measured=measured, genes=about["genes"], n_cells=n_cells, blocks=blocks)

    def known(self, content: np.ndarray, core: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Which of the hashes are those of a training cell, bool, of contents and of core genes."""
        asked = {"content": content, "core": core}
        if self.hashes is not None:
            return tuple(among(self.hashes[name], words) for name, words in asked.items())
        indices = {name: WordIndex(words, np.arange(len(words))) for name, words in asked.items()}
        found = {name: np.zeros(len(words), dtype=bool) for name, words in asked.items()}
        for block in self.blocks():
            for name, index in indices.items():
                for _, cells in index.pairs(block[name]):
                    found[name][cells] = True
        return found["content"], found["core"]

    def joined(self, more: "TrainingFingerprints") -> "TrainingFingerprints":
        """These of a model directory, and `more` with their hashes in the blocks; both on one gene list."""

        def blocks() -> Iterator[np.ndarray]:
            start = 0
            for block in self.blocks():
                whole = np.zeros(len(block), dtype=RECORD)
                for name in CELL.names:
                    whole[name] = block[name]
                core = self.hashes["core"][start : start + len(block)]
                whole["core"][: len(core)] = core  # a set: which of the cells has which does not matter
                start += len(block)
                yield whole
            for block in more.blocks():
                moved = block.copy()
                moved["measured"] += len(self.measured)
                yield moved

        measured = np.concatenate([self.measured, more.measured])
        return TrainingFingerprints(
            hashes=None, measured=measured, genes=self.genes, n_cells=self.n_cells + more.n_cells, blocks=blocks
        )

    def save(self, directory: Path) -> None:
        """Make `directory` and write the files named above, but for the content hashes; 16 bytes a cell in memory."""
        directory.mkdir()
        np.save(directory / MEASURED_FILE, pack(self.measured))
        cells = np.lib.format.open_memmap(directory / "cells.npy", mode="w+", dtype=CELL, shape=(self.n_cells,))
        core, start = np.zeros(self.n_cells, dtype=np.uint64), 0
        for block in self.blocks():
            core[start : start + len(block)] = block["core"]
            for name in CELL.names:
                cells[name][start : start + len(block)] = block[name]
            start += len(block)
        cells.flush()
        core.sort()
        np.save(directory / "core.npy", core[np.searchsorted(core, np.uint64(1)) :])
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
            measured = unpack(np.load(directory / MEASURED_FILE, allow_pickle=False), MOST_GENES)
            whole = cells.dtype == CELL and cells.shape == (about["cells"],) == content.shape and core.dtype == np.uint64
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise UserError(f"the fingerprints in {directory} are damaged ({error}): copy the model again.") from error
        if not whole:
            raise UserError(f"the fingerprints in {directory} are not those of the model's training cells: copy it again.")
        return cls(hashes={"content": content, "core": core}, measured=measured, genes=about["genes"], n_cells=about["cells"],
                   blocks=lambda: read_blocks(directory / "cells.npy"))


def among(known: np.ndarray, words: np.ndarray) -> np.ndarray:
    """Which of `words` are in the sorted `known`, bool; only the pages of `known` that a binary search touches are read."""
    if not len(known):
        return np.zeros(len(words), dtype=bool)
    at = np.minimum(np.searchsorted(known, words), len(known) - 1)
    return known[at] == words


def _parts(store: Store, split: Split) -> Iterator[tuple[Path, int]]:
    """The file of each shard, and how many of its cells belong to the split."""
    left = split.n_cells
    for shard in split.shards:
        yield store.path / shard.name / FINGERPRINTS_FILE, min(left, shard.cells)
        left -= min(left, shard.cells)


def _check_format(version: int, place: Path) -> None:
    if version > FORMAT_VERSION:
        raise UserError(f"the fingerprints in {place} have format {version}, newer than this scbench reads: upgrade scbench.")
