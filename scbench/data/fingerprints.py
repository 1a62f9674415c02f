"""Fingerprints of cells: by what they hold, by their core genes alone, by barcode, and by their gene set.

    content    uint64   hash of all (token, count); the same cell on the same vocabulary
    core       uint64   hash of (gene, count) of the core genes of the list in fingerprint_genes.py, 0 under CORE_GENES
                        expressed ones; the same for copies that lack other genes or name them otherwise
    barcode    uint64   hash of the barcode in the cell's id, 0 without one
    measured   uint32   number of the set of genes that the cell's source measured (scbench.data.measured)
    signature  uint8 [64]   MinHash of the gene set (of the list): in each bin, the first expressed gene; EMPTY without one

A store has a record a cell, in the order of its cells, in each shard's fingerprints.npy; 92 bytes a cell.
"""

import hashlib
import re
from collections.abc import Iterable, Iterator
from pathlib import Path

import numpy as np

from scbench.data.cells import CONTENT_KEYS, content_hash
from scbench.data.fingerprint_genes import BINS, EMPTY, GeneList
from scbench.kernels import cells as native
from scbench.kernels import random

FORMAT_VERSION = 1
FINGERPRINTS_FILE = "fingerprints.npy"  # of a shard
RECORD = np.dtype([
    ("content", "<u8"), ("core", "<u8"), ("barcode", "<u8"), ("measured", "<u4"), ("signature", "u1", (BINS,)),
])
# 12 of the 200 core genes that a shallow cell may express are one of 2⁶² sets, so that among 10¹³ pairs of unrelated cells
# hardly one agrees, counts not even looked at; real cells of 800 genes express 40
CORE_GENES = 12
BARCODE = re.compile("[ACGT]{12,}")
PAIRS = 1 << 17  # of cells, compared at once
_CORE = 2  # what a key of Stream.CONTENT decides, beside content_hash's
_BARCODE_SALT = b"barcode"


def core_hash(genes: np.ndarray, counts: np.ndarray, offsets: np.ndarray, common: GeneList) -> np.ndarray:
    """The hash of each cell's core genes and their counts, uint64 [cells]; 0 if it expresses fewer than CORE_GENES.

    `genes` (tokens), `counts`, `offsets`: as for `content_hash`; the number of a gene in the list stands for its token.
    """
    keep = np.flatnonzero(common.core[genes])
    ends = np.searchsorted(keep, offsets)
    inner = content_hash(common.numbers[genes[keep]], counts[keep], ends)
    hashes = random.bits(random.key(_CORE, random.Stream.CONTENT), inner)
    return np.where(np.diff(ends) >= CORE_GENES, hashes, np.uint64(0))


def signatures(
    genes: np.ndarray, offsets: np.ndarray, common: GeneList, measured: np.ndarray | None = None
) -> np.ndarray:
    """The smallest value (number // 64) of each cell's genes in each bin (number % 64), uint8 [cells, BINS].

    `measured`: bool [MOST_GENES], the genes of the list to look at; by default all.
    """
    n_cells = len(offsets) - 1
    listed = common.numbers >= 0
    if measured is not None:
        listed &= measured[common.numbers]  # −1 is out already
    bins = np.where(listed, common.numbers % BINS, 0).astype(np.uint8)  # of each token; any will do for EMPTY
    values = np.where(listed, common.numbers // BINS, EMPTY).astype(np.uint8)
    places = np.repeat(np.arange(0, n_cells * BINS, BINS), np.diff(offsets))
    places += bins[genes]
    result = np.full(n_cells * BINS, EMPTY, dtype=np.uint8)
    np.minimum.at(result, places, values[genes])
    return result.reshape(n_cells, BINS)


def jaccard(
    first: np.ndarray, second: np.ndarray, shared: np.ndarray, sets: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Jaccard indices of gene sets on shared genes, estimated from signatures, and the bins that each rests on.

    Parameters
    ----------
    first, second
        uint8 [pairs, BINS].
    shared
        bool [sets, MOST_GENES]: the genes that both cells' sources measured. Which gene comes first in a bin is chance, so
        bins whose first gene (of either cell) is not shared are left out.
    sets
        int [pairs], the row of `shared` of each pair.
    """
    earlier = np.minimum(first, second)
    by_bin = shared.reshape(len(shared), EMPTY, BINS)
    counted = (earlier != EMPTY) & by_bin[sets[:, None], np.minimum(earlier, EMPTY - 1), np.arange(BINS)]
    bins = counted.sum(axis=1)
    return (counted & (first == second)).sum(axis=1) / np.maximum(bins, 1), bins


def barcode_hashes(ids: Iterable[str | None]) -> np.ndarray:
    """The hash of the barcode in each id, uint64: of its longest run of 12 or more of ACGT (the first one); 0 without."""
    hashes = []
    for id_ in ids:
        runs = BARCODE.findall(id_ or "")
        barcode = max(runs, key=len, default="")
        digest = hashlib.blake2b(barcode.encode(), digest_size=8, key=_BARCODE_SALT).digest() if barcode else bytes(8)
        hashes.append(int.from_bytes(digest, "little"))
    return np.array(hashes, dtype=np.uint64)


def records(genes: np.ndarray, counts: np.ndarray, lengths: np.ndarray, common: GeneList) -> np.ndarray:
    """RECORD [cells] of cells side by side, of `lengths` tokens each: core and signature; the rest is still to come."""
    offsets = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64)
    result = np.zeros(len(lengths), dtype=RECORD)
    keys = *CONTENT_KEYS, random.key(_CORE, random.Stream.CONTENT)
    made = native.fingerprint_cells(genes, counts, offsets, _listed(common), least_core=CORE_GENES, keys=keys)
    if made is None:
        made = core_hash(genes, counts, offsets, common), signatures(genes, offsets, common)
    result["core"], result["signature"] = made
    return result


def _listed(common: GeneList) -> np.ndarray:
    """The place of each token in the list, for the C code: bin, value and whether it is a core gene, uint32 [vocabulary]."""
    place = common.numbers % BINS | common.numbers // BINS << 8 | common.core.astype(np.int64) << 16
    return np.where(common.numbers >= 0, place, EMPTY << 8).astype(np.uint32)


class WordIndex:
    """Cells (numbers of them) by a random word, to find those that have one of many other words."""

    def __init__(self, words: np.ndarray, cells: np.ndarray):
        order = np.argsort(words, kind="stable")
        self._words, self._cells = words[order], cells[order]
        bits = min(24, 8 + len(words).bit_length())  # most other words aren't here, and a table says so faster than a search
        self._shift = np.uint64(64 - bits)
        self._begins = np.zeros(1 << bits, dtype=bool)
        self._begins[words >> self._shift] = True

    def pairs(self, words: np.ndarray) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """Positions in `words` and the cells that have the same word, at most PAIRS pairs at once or one position's."""
        positions = np.flatnonzero(self._begins[words >> self._shift])
        low, high = (np.searchsorted(self._words, words[positions], side=side) for side in ("left", "right"))
        there = high > low
        positions, low, lengths = positions[there], low[there], (high - low)[there]
        ends = np.cumsum(lengths)
        first = 0
        while first < len(positions):
            last = max(first + 1, int(np.searchsorted(ends, ends[first] - lengths[first] + PAIRS, side="right")))
            repeated = np.repeat(np.arange(first, last), lengths[first:last])
            starts = ends[first:last] - lengths[first:last]
            within = np.arange(len(repeated)) - np.repeat(starts - starts[0], lengths[first:last])
            yield positions[repeated], self._cells[low[repeated] + within]
            first = last


def read_blocks(path: Path, stop: int | None = None, size: int = 1 << 16) -> Iterator[np.ndarray]:
    """The first `stop` rows of an .npy file, `size` at a time, out of the memory map."""
    array = np.load(path, mmap_mode="r", allow_pickle=False)
    stop = len(array) if stop is None else min(stop, len(array))
    for start in range(0, stop, size):
        yield np.array(array[start : min(start + size, stop)])
