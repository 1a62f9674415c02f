"""The cells that every loader reads: real ones repeated and thinned, or synthetic ones; in an h5ad file, with what an epoch
of them must add up to."""

import json
import shutil
from collections.abc import Iterator
from pathlib import Path

import anndata
import numpy as np
import pandas as pd
from cells import raw_cell
from options import Options
from scipy import sparse

from scbench.data.cells import content_hash
from scbench.data.extents import Cells
from scbench.data.prepare import prepare
from scbench.data.vocabulary import Vocabulary
from scbench.errors import UserError

MEDIAN_GENES, SPREAD_GENES = 1500, 0.25  # genes that a cell is thinned to: log-normal
MOST_KEPT = 0.9  # of a cell's genes, so that copies differ
CELLS_FILE, VOCABULARY_FILE, ABOUT_FILE = "cells.h5ad", "vocabulary.json", "about.json"


def make(folder: Path, *, data: tuple[Path, ...], cells: int, vocabulary_size: int, seed: int, max_genes: int) -> dict:
    """`folder` with the cells, and what is known of them; an earlier call's are taken if it was for the same."""
    wanted = {"data": [path.name for path in data], "cells": cells, "seed": seed, "max_genes": max_genes,
              "vocabulary_size": None if data else vocabulary_size}
    about = folder / ABOUT_FILE
    if about.is_file():
        found = json.loads(about.read_text())
        if {name: found[name] for name in wanted} == wanted:
            return found
        raise UserError(f"{folder} holds other cells: give another --work, or remove it.")
    folder.mkdir(parents=True, exist_ok=True)
    if data:
        vocabulary, base = _real_cells(data, folder / "base")
        thinned = _thinned(base, cells, np.random.default_rng(seed))
    else:
        vocabulary = Vocabulary.build(f"gene-{i:06d}" for i in range(vocabulary_size - 3))
        options = Options(seed=seed, median_genes=MEDIAN_GENES)
        thinned = (raw_cell(options, vocabulary_size - 3, sample) for sample in range(cells))
    vocabulary.save(folder / VOCABULARY_FILE)
    corpus = _join(list(thinned))
    lengths = np.diff(corpus.offsets)
    _write(corpus, vocabulary, folder / CELLS_FILE)
    np.save(folder / "hashes.npy", np.sort(content_hash(*corpus)))
    found = {**wanted, "genes": int(corpus.offsets[-1]), "median_genes": float(np.median(lengths)),
             "tokens": int(np.minimum(lengths, max_genes).sum() + cells), "largest": int(lengths.max())}
    about.write_text(json.dumps(found))
    return found


def _real_cells(data: tuple[Path, ...], folder: Path) -> tuple[Vocabulary, Cells]:
    """All cells of h5ad files that express at least MEDIAN_GENES genes."""
    files = [file for path in data for file in (sorted(path.glob("*.h5ad")) if path.is_dir() else [path])]
    shutil.rmtree(folder, ignore_errors=True)
    store = prepare(files, folder, split=(1, 0, 0), workers=1)
    split = store.split("train")
    chosen = []
    for extent in range(len(split.extent_sizes)):
        genes, counts, offsets = split.read_extent(extent)
        for cell in np.flatnonzero(np.diff(offsets) >= MEDIAN_GENES).tolist():
            row = slice(offsets[cell], offsets[cell + 1])
            chosen.append((genes[row], counts[row]))
    if not chosen:
        raise UserError(f"no cell of --data expresses {MEDIAN_GENES} genes.")
    vocabulary = store.vocabulary
    shutil.rmtree(folder)
    return vocabulary, _join(chosen)


def _thinned(base: Cells, number: int, rng: np.random.Generator) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """`number` cells: those of `base` in turn, each molecule kept with the probability that leaves the wanted genes."""
    wanted = np.exp(rng.normal(np.log(MEDIAN_GENES), SPREAD_GENES, number))
    for i in range(number):
        cell = i % (len(base.offsets) - 1)
        row = slice(base.offsets[cell], base.offsets[cell + 1])
        genes, counts = base.genes[row], base.counts[row]
        values, repeats = np.unique(counts, return_counts=True)
        expected = min(wanted[i], MOST_KEPT * len(genes))
        low, high = 0.0, 1.0
        for _ in range(30):
            share = (low + high) / 2
            if (repeats * (1 - (1 - share) ** values)).sum() < expected:
                low = share
            else:
                high = share
        kept = rng.binomial(counts, share)
        yield genes[kept > 0], kept[kept > 0]


def _join(cells: list[tuple[np.ndarray, np.ndarray]]) -> Cells:
    genes, counts = (np.concatenate(arrays) for arrays in zip(*cells, strict=True))
    offsets = np.concatenate([[0], np.cumsum([len(g) for g, _ in cells], dtype=np.int64)])
    dtype = np.uint16 if counts.max() < 1 << 16 else np.uint32
    return Cells(genes, counts.astype(dtype), offsets)


def _write(corpus: Cells, vocabulary: Vocabulary, path: Path) -> None:
    """As h5ad: raw counts, CSR, uncompressed; column i is the gene with the id i."""
    tokens = sorted(vocabulary.tokens.items(), key=lambda item: item[1])
    names = [token for token, identifier in tokens if identifier < vocabulary.pad]
    matrix = sparse.csr_matrix((corpus.counts, corpus.genes.astype(np.int32), corpus.offsets),
                               shape=(len(corpus.offsets) - 1, len(names)))
    obs = pd.DataFrame(index=[f"cell-{i:09d}" for i in range(matrix.shape[0])])
    anndata.AnnData(matrix, obs=obs, var=pd.DataFrame(index=names)).write_h5ad(path)
