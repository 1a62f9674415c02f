"""The layout of one shard: its arrays, their TensorStore specifications, and the checksum of a block of cells.

A shard is a directory with four one-dimensional zarr3 arrays in raw little-endian chunks, and one table:

    genes       uint16 or uint32 [nnz]       token ids, ascending in a cell
    counts      one of COUNTS_DTYPES [nnz]   raw counts, none is 0
    offsets     int64 [cells + 1]            where each cell starts in genes and counts
    block_crc   uint32 [blocks]              CRC32C of each block of BLOCK_CELLS cells
    cells.parquet                            one row a cell: where it came from, and the kept columns of obs
"""

from dataclasses import dataclass
from pathlib import Path

import google_crc32c
import numpy as np

FORMAT_VERSION = 1
BLOCK_CELLS = 64  # cells under one checksum
EXTENT_BYTES = 8_000_000  # genes and counts that the loader reads at once, on average
CHUNK_BYTES = 8_000_000  # largest file of an array: a raw chunk is one file
SPLITS = ("train", "validation", "test")
CELLS_FILE = "cells.parquet"
COUNTS_DTYPES = ("uint8", "uint16", "uint32", "float32", "float64")  # smallest first; floating if some counts are not whole
_WHOLE_FLOAT32 = 1 << 24  # up to here float32 holds every whole number


@dataclass(frozen=True, kw_only=True)
class ShardInfo:
    """What the manifest says of a shard. A shard belongs to one split."""

    name: str
    split: str
    cells: int
    nnz: int
    blocks: int
    blocks_per_extent: int
    genes: str  # dtype
    counts: str  # dtype

    @property
    def arrays(self) -> dict[str, tuple[str, int]]:
        """Name -> (dtype, length) of the shard's arrays."""
        return {
            "genes": (self.genes, self.nnz),
            "counts": (self.counts, self.nnz),
            "offsets": ("int64", self.cells + 1),
            "block_crc": ("uint32", self.blocks),
        }

    @classmethod
    def plan(cls, *, split: str, cells: int, nnz: int, counts: str, vocabulary_size: int) -> "ShardInfo":
        """The smallest dtype of genes, and extents of about EXTENT_BYTES, for `cells` ≥ 1 cells. The name comes later."""
        blocks = -(-cells // BLOCK_CELLS)
        genes = genes_dtype(vocabulary_size)
        token_bytes = np.dtype(genes).itemsize + np.dtype(counts).itemsize
        extents = max(1, round(nnz * token_bytes / EXTENT_BYTES))
        return cls(name="", split=split, cells=cells, nnz=nnz, blocks=blocks, genes=genes, counts=counts,
                   blocks_per_extent=-(-blocks // extents))


def too_small_dtypes(counts: np.ndarray, offsets: np.ndarray) -> np.ndarray:
    """Which of COUNTS_DTYPES don't hold each cell's counts exactly, as bits of uint8 [cells]; counts below 2³²."""
    cells = len(offsets) - 1
    filled = offsets[1:] > offsets[:-1]
    result = np.zeros(cells, dtype=np.uint8)
    if not filled.any():
        return result
    starts = offsets[:-1][filled]
    largest = np.zeros(cells, dtype=counts.dtype)
    largest[filled] = np.maximum.reduceat(counts, starts)
    for bit, dtype in enumerate(COUNTS_DTYPES[:3]):
        result |= (largest > np.iinfo(dtype).max).astype(np.uint8) << bit
    if counts.dtype.kind == "f":
        fractional = np.logical_or.reduceat(counts != np.rint(counts), starts)
        result[filled] |= np.where(fractional, 0b111, 0).astype(np.uint8)
    if counts.dtype.kind == "f" or largest.max() > _WHOLE_FLOAT32:
        inexact = np.logical_or.reduceat(counts.astype(np.float32).astype(np.float64) != counts, starts)
        result[filled] |= inexact.astype(np.uint8) << 3
    return result


def counts_dtype(too_small: np.ndarray) -> str:
    """The smallest dtype that holds the counts of cells, by their bits of `too_small_dtypes`."""
    bits = int(np.bitwise_or.reduce(too_small))
    return next(dtype for bit, dtype in enumerate(COUNTS_DTYPES) if not bits >> bit & 1)


def genes_dtype(vocabulary_size: int) -> str:
    """The smallest dtype that holds the token ids of a vocabulary."""
    return "uint16" if vocabulary_size <= 65_536 else "uint32"


def array_spec(path: Path) -> dict:
    """TensorStore's specification of the zarr3 array in the directory `path`."""
    return {"driver": "zarr3", "kvstore": {"driver": "file", "path": f"{path}/"}}


def new_array_spec(path: Path, dtype: str, length: int) -> dict:
    """The same for an array to create: equal raw chunks of at most CHUNK_BYTES, so that little is padded."""
    chunks = max(1, -(-length * np.dtype(dtype).itemsize // CHUNK_BYTES))
    return array_spec(path) | {
        "store_data_equal_to_fill_value": True,  # otherwise a chunk of zeros would have no file
        "metadata": {
            "shape": [length],
            "data_type": dtype,
            "chunk_grid": {"name": "regular", "configuration": {"chunk_shape": [max(1, -(-length // chunks))]}},
            "codecs": [{"name": "bytes", "configuration": {"endian": "little"}}],
            "fill_value": 0,
        },
    }


def block_checksums(genes: np.ndarray, counts: np.ndarray, offsets: np.ndarray) -> np.ndarray:
    """CRC32C of each block of BLOCK_CELLS cells, uint32 [blocks].

    Over the bytes, as stored, of the block's genes, its counts, and its offsets (int64 [cells + 1], from the block's own
    first token). `genes`, `counts` [nnz] in the shard's dtypes; `offsets` int64 [cells + 1], ascending from 0.
    """
    checksums = []
    for first in range(0, len(offsets) - 1, BLOCK_CELLS):
        block = offsets[first : first + BLOCK_CELLS + 1]
        checksum = google_crc32c.value(genes[block[0] : block[-1]])
        checksum = google_crc32c.extend(checksum, counts[block[0] : block[-1]])
        checksums.append(google_crc32c.extend(checksum, block - block[0]))
    return np.array(checksums, dtype=np.uint32)
