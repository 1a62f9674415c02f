"""Which genes each source measured: one that it did not measure is unknown in its cells, not zero.

A source measured one set of genes: those of its columns. A census measured one set a dataset, by its presence matrix. The
sets are numbered in the order of the sources, datasets in the order of their ids; the column `measured` of cells.parquet
holds each cell's number. A parquet file of the reference doesn't say: it counts as having measured its whole vocabulary.
"""

import numpy as np

MEASURED_FILE = "measured_genes.npy"  # of a store: pack() of bool [sets, vocabulary]


def measured_tokens(tokens: np.ndarray, vocabulary_size: int, present: np.ndarray | None = None) -> np.ndarray:
    """bool [sets, vocabulary]: the tokens that the columns of a source lead to.

    Parameters
    ----------
    tokens
        int64 [columns], −1 for a column without one (`GeneMap.tokens`).
    present
        bool [sets, columns]: the columns of each set; by default one set of all.
    """
    if present is None:
        present = np.ones((1, len(tokens)), dtype=bool)
    measured = np.zeros((len(present), vocabulary_size), dtype=bool)
    for row, columns in zip(measured, present & (tokens >= 0), strict=True):  # one by one: indices take 16 times the memory
        row[tokens[columns]] = True
    return measured


def pack(measured: np.ndarray) -> np.ndarray:
    """bool [sets, genes] as uint8 [sets, ⌈genes / 8⌉], the first gene in the lowest bit."""
    return np.packbits(measured, axis=1, bitorder="little")


def unpack(packed: np.ndarray, genes: int) -> np.ndarray:
    """bool [sets, genes] again; ValueError if `packed` is something else."""
    if packed.dtype != np.uint8 or packed.ndim != 2 or packed.shape[1] != -(-genes // 8):
        raise ValueError(f"{packed.dtype} {packed.shape} are no sets of {genes} genes")
    return np.unpackbits(packed, axis=1, bitorder="little", count=genes).astype(bool)
