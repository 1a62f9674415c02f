"""Fingerprints of cells: by what they hold, by their core genes alone, by barcode, and by their gene set.

    content    uint64   hash of all (token, count); the same cell on the same vocabulary
    core       uint64   hash of (gene, count) of the core genes of the list in fingerprint_genes.py, 0 under CORE_GENES
                        expressed ones; the same for copies that lack other genes or name them otherwise
    barcode    uint64   hash of the barcode in the cell's id, 0 without one
    source     uint32   number of the cell's input: which genes it had measured
    signature  uint8 [64]   MinHash of the gene set (of the list): in each bin, the first expressed gene; EMPTY without one

A store has a record a cell, in the order of its cells, in each shard's fingerprints.npy; 92 bytes a cell.
"""

import hashlib
import re
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

import numpy as np

from scbench.data.cells import content_hash
from scbench.data.fingerprint_genes import BINS, EMPTY, MOST_GENES, GeneList
from scbench.kernels import random

FORMAT_VERSION = 1
FINGERPRINTS_FILE = "fingerprints.npy"  # of a shard
MEASURED_FILE = "measured_genes.npy"  # of a store: uint8 [sources, MOST_GENES / 8], packed bits
RECORD = np.dtype([
    ("content", "<u8"), ("core", "<u8"), ("barcode", "<u8"), ("source", "<u4"), ("signature", "u1", (BINS,)),
])
# 12 of the 200 core genes that a shallow cell may express are one of 2⁶² sets, so that among 10¹³ pairs of unrelated cells
# hardly one agrees, counts not even looked at; real cells of 800 genes express 40
CORE_GENES = 12
BARCODE = re.compile("[ACGT]{12,}")
_CORE = 2  # what a key of Stream.CONTENT decides, beside content_hash's
_BARCODE_SALT = b"barcode"


def core_hash(genes: np.ndarray, counts: np.ndarray, offsets: np.ndarray, common: GeneList) -> np.ndarray:
    """The hash of each cell's core genes and their counts, uint64 [cells]; 0 if it expresses fewer than CORE_GENES.

    `genes` (tokens), `counts`, `offsets`: as for `content_hash`; the number of a gene in the list stands for its token.
    """
    keep = common.core[genes]
    ends = np.concatenate([[0], np.cumsum(keep)])[offsets]
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
    numbers = common.numbers[genes]
    keep = numbers >= 0
    if measured is not None:
        keep &= measured[numbers]  # −1 is kept out already
    cells = np.repeat(np.arange(n_cells), np.diff(offsets))[keep]
    numbers = numbers[keep]
    result = np.full(n_cells * BINS, EMPTY, dtype=np.uint8)
    np.minimum.at(result, cells * BINS + numbers % BINS, (numbers // BINS).astype(np.uint8))
    return result.reshape(n_cells, BINS)


def jaccard(stored: np.ndarray, asked: np.ndarray, measured: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Jaccard indices of gene sets on shared genes, estimated from signatures, and the bins that each rests on.

    Parameters
    ----------
    stored
        uint8 [pairs, BINS], of cells whose source measured some genes.
    asked
        uint8 [pairs, BINS], of cells restricted to those genes.
    measured
        bool [MOST_GENES]: what the source of `asked` measured. A bin whose first stored gene is not among it says nothing,
        unless an asked gene comes before that: this one the stored cell lacks.
    """
    by_bin = np.concatenate([measured, np.ones(BINS, dtype=bool)]).reshape(EMPTY + 1, BINS)
    counted = (by_bin[stored, np.arange(BINS)] | (asked < stored)) & ((stored != EMPTY) | (asked != EMPTY))
    bins = counted.sum(axis=1)
    return (counted & (stored == asked)).sum(axis=1) / np.maximum(bins, 1), bins


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
    """RECORD [cells] of cells side by side, of `lengths` tokens each; barcode and source are still to come."""
    offsets = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64)
    result = np.zeros(len(lengths), dtype=RECORD)
    result["content"] = content_hash(genes, counts, offsets)
    result["core"] = core_hash(genes, counts, offsets, common)
    result["signature"] = signatures(genes, offsets, common)
    return result


def pack_measured(measured: Sequence[np.ndarray]) -> np.ndarray:
    """What MEASURED_FILE holds, of each source's bool [MOST_GENES]."""
    return np.packbits(np.stack(measured), axis=1, bitorder="little")


def unpack_measured(packed: np.ndarray) -> np.ndarray:
    """bool [sources, MOST_GENES]."""
    return np.unpackbits(packed, axis=1, bitorder="little", count=MOST_GENES).astype(bool)


def read_blocks(path: Path, stop: int | None = None, size: int = 1 << 16) -> Iterator[np.ndarray]:
    """The first `stop` rows of an .npy file, `size` at a time, out of the memory map."""
    array = np.load(path, mmap_mode="r", allow_pickle=False)
    stop = len(array) if stop is None else min(stop, len(array))
    for start in range(0, stop, size):
        yield np.array(array[start : min(start + size, stop)])
