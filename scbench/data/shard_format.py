"""The layout of one shard: its arrays, their TensorStore specifications, and the checksum of a block of cells.

A shard is a directory with four one-dimensional zarr3 arrays in raw little-endian chunks, and one table:

    genes       uint16 or uint32 [nnz]       token ids, ascending in a cell
    counts      uint8, uint16 or uint32 [nnz]  raw counts, none is 0
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
    def plan(cls, *, split: str, cells: int, nnz: int, largest_count: int, vocabulary_size: int) -> "ShardInfo":
        """The smallest exact dtypes, and extents of about EXTENT_BYTES, for `cells` ≥ 1 cells. The name comes later."""
        blocks = -(-cells // BLOCK_CELLS)
        genes = genes_dtype(vocabulary_size)
        counts = counts_dtype(largest_count)
        token_bytes = np.dtype(genes).itemsize + np.dtype(counts).itemsize
        extents = max(1, round(nnz * token_bytes / EXTENT_BYTES))
        return cls(name="", split=split, cells=cells, nnz=nnz, blocks=blocks, genes=genes, counts=counts,
                   blocks_per_extent=-(-blocks // extents))


def counts_dtype(largest_count: int) -> str:
    """The smallest dtype that holds counts up to `largest_count` (below 2³²)."""
    return next(dtype for dtype in ("uint8", "uint16", "uint32") if largest_count <= np.iinfo(dtype).max)


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
