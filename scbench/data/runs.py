"""A run: cells of one input, sorted by the keyed word that says where in the store each of them goes.

prepare's first pass (scatter.py) writes runs, the second (gather.py) reads a bucket, an interval of words, out of all of
them. A run is the files `stem`.cells (CELL), .genes and .counts (tokens, cell by cell), .obs (an Arrow table), and .buckets
(int64: where each bucket starts, and the end).
"""

from dataclasses import dataclass
from pathlib import Path

import numpy as np

from scbench.kernels import random

CELL = np.dtype([
    ("content_hash", "<u8"),
    ("row", "<i8"),  # in the input
    ("total", "<f8"),  # all counts of the cell, those of unmatched genes included; whole numbers are exact below 2⁵³
    ("first_token", "<i8"),  # in the run
    ("group", "<u8"),  # group_id of the --split-by values, 0 without
    ("n_genes", "<u4"),
    ("measured", "<u4"),  # number of the set of genes that its source measured
    ("too_small", "u1"),  # too_small_dtypes of its counts
])


@dataclass(frozen=True, kw_only=True)
class Run:
    """Where a run is, and its dtypes."""

    stem: Path
    source: int  # number of its input
    genes: str  # dtype
    counts: str  # dtype


def shuffle_words(content: np.ndarray, seed: int) -> np.ndarray:
    """The word that places each cell in the store, uint64 [cells]. One to one with `content`: equal words, equal cells."""
    return random.bits(random.key(seed, random.Stream.SHUFFLE), content)


def bucket_bounds(buckets: int) -> np.ndarray:
    """The first word of each bucket but the first, uint64 [buckets − 1]: equal intervals of 0 … 2⁶⁴−1."""
    return np.array([-(-(bucket << 64) // buckets) for bucket in range(1, buckets)], dtype=np.uint64)
