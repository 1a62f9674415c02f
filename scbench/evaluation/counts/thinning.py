"""Two halves of every cell's counts, and the verb `scbench benchmark thin`.

A count x is split into Binomial(x, ½) and the rest. If x is Poisson given its rate, both halves are Poisson with half the
rate, and independent given it (Batson, Royer, Webber, "Molecular cross-validation for single-cell RNA-seq", 2019; Neufeld
et al., "Inference after latent variable estimation for single-cell RNA sequencing data", 2024): what sees one half learns of
the other only through the rate. The law is exact for any count: each molecule has one random bit. The bits depend on the
seed, the cell's id and the gene's name alone, not on where these stand in a file.
"""

import hashlib
from typing import NamedTuple

import anndata
import numpy as np
import pandas as pd
import scipy.sparse

from scbench.config import ThinConfig
from scbench.data.cells import CellTokens, Counts, content_hash, to_tokens
from scbench.data.gene_identity import GeneIdentity, map_genes
from scbench.data.sources.anndata import AnnDataSource
from scbench.data.vocabulary import Vocabulary
from scbench.errors import UserError
from scbench.evaluation import embed
from scbench.evaluation.progress import progress_bar
from scbench.evaluation.split_files import unique_ids, unit_hashes
from scbench.files import published_file, refuse_existing
from scbench.kernels import random
from scbench.kernels.random import Stream

_THINNING = 45  # what a key of Stream.EVALUATION decides
_ROUND = 1024  # words of 64 bits of one count at once


class Halves(NamedTuple):
    """Both halves of some cells, in the order of the hashes of their ids: that of the file doesn't matter."""

    source: str  # the file's name
    identity: GeneIdentity  # of the columns
    rows: np.ndarray  # int64 [cells], in the file
    ids: np.ndarray  # str objects [cells], distinct
    keys: np.ndarray  # uint64 [cells], hashes of `ids`, ascending
    content: np.ndarray  # uint64 [cells], hash of the whole cell's counts
    seen: scipy.sparse.csr_matrix  # uint32 [cells, genes of the file], half A: what is embedded; no stored zeros
    unseen: scipy.sparse.csr_matrix  # the same of half B: what is predicted
    digest: str  # SHA-256 of half A of all cells of the file, hexadecimal

    def take(self, places: np.ndarray) -> "Halves":
        """Some of the cells, by their places here."""
        names = ("rows", "ids", "keys", "content", "seen", "unseen")
        return self._replace(**{name: getattr(self, name)[places] for name in names})

    @property
    def half_ids(self) -> np.ndarray:
        """What the cells of half A are called where it is written, str objects [cells]: no other half has these names."""
        return np.array([f"{name}|half-{self.digest[:12]}" for name in self.ids], dtype=object)

    def tokens_on(self, vocabulary: Vocabulary) -> tuple[CellTokens, np.ndarray]:
        """Half A on a vocabulary, and the hashes of its content there, uint64 [cells]."""
        gene_map = map_genes(self.identity, vocabulary, self.source)
        columns, offsets = self.seen.indices.astype(np.int64), self.seen.indptr.astype(np.int64)
        tokens = to_tokens(Counts(columns, self.seen.data, offsets), gene_map)
        return tokens, content_hash(tokens.genes, tokens.counts, tokens.offsets)

    def anndata(self) -> anndata.AnnData:
        """Half A as cells of their own, float32, named by `half_ids`."""
        ids, symbols = self.identity.ids, self.identity.symbols
        var = pd.DataFrame({"gene_symbol": [name or "" for name in symbols]}, index=_gene_names(self.identity))
        var["ensembl_id"] = [name or "" for name in ids]
        obs = pd.DataFrame({"cell": self.ids}, index=self.half_ids)
        return anndata.AnnData(self.seen.astype(np.float32), obs=obs, var=var)


def read_halves(source: AnnDataSource, seed: int = 0, *, progress: bool = False) -> Halves:
    """Both halves of all cells of an open source; UserError if a count is not whole."""
    ids = unique_ids(source.obs_names)
    keys, genes = unit_hashes(ids), unit_hashes(_gene_names(source.identity))
    key = random.key(seed, Stream.EVALUATION, _THINNING)
    parts, content = [], []
    with progress_bar("splitting counts", source.n_cells, progress) as advance:
        for start, read in embed.chunks(source):
            if read.counts.dtype.kind == "f":
                raise UserError(f"{source.name} holds counts that are not whole, which cannot be split: give raw counts.")
            cells = np.arange(len(read.offsets) - 1)
            filled = read.counts > 0
            columns, counts = read.columns[filled], read.counts[filled].astype(np.uint32)
            lengths = np.bincount(np.repeat(cells, np.diff(read.offsets))[filled], minlength=len(cells))
            offsets = np.concatenate([[0], np.cumsum(lengths)])
            cell_keys = np.repeat(random.bits(key, keys[start : start + len(cells)]), lengths)
            first = thin(counts, random.bits(cell_keys, genes[columns]))
            shape = (len(cells), len(genes))
            parts.append([scipy.sparse.csr_matrix((half, columns, offsets), shape) for half in (first, counts - first)])
            content.append(content_hash(columns.astype(np.uint32), counts, offsets))
            advance(len(cells))
    rows = np.argsort(keys, kind="stable")
    seen, unseen = (scipy.sparse.vstack(halves, format="csr")[rows] for halves in zip(*parts, strict=True))
    for half in (seen, unseen):
        half.eliminate_zeros()
        half.sort_indices()
    content = np.concatenate(content)[rows]
    digest = _digest(ids[rows], _gene_names(source.identity), seen)
    return Halves(source.name, source.identity, rows, ids[rows], keys[rows], content, seen, unseen, digest)


def thin(counts: np.ndarray, keys: np.ndarray) -> np.ndarray:
    """A draw of Binomial(count, ½) for each count, uint32 [n]: the number of ones among its first `count` random bits.

    `counts`: uint32 [n]; `keys`: uint64 [n], a stream each.
    """
    counts = counts.astype(np.uint64)
    whole, rest = (counts >> np.uint64(6)).astype(np.int64), counts & np.uint64(63)
    ones = np.bitwise_count(random.bits(keys, 0) & ((np.uint64(1) << rest) - np.uint64(1))).astype(np.int64)
    done = 0
    places = np.flatnonzero(whole)
    while len(places):  # words 1, 2, … of the counts of 64 and more
        lengths = np.minimum(whole[places] - done, _ROUND)
        starts = np.cumsum(lengths) - lengths
        counter = np.arange(lengths.sum()) - np.repeat(starts, lengths) + done + 1
        ones[places] += np.add.reduceat(np.bitwise_count(random.bits(np.repeat(keys[places], lengths), counter)), starts,
                                        dtype=np.int64)
        done += _ROUND
        places = places[whole[places] > done]
    return ones.astype(np.uint32)


def _gene_names(identity: GeneIdentity) -> np.ndarray:
    """Distinct names of the columns: the Ensembl id, else the symbol, else the column's number."""
    pairs = zip(identity.ids, identity.symbols, strict=True)
    return unique_ids([gene or symbol or str(column) for column, (gene, symbol) in enumerate(pairs)])


def _digest(ids: np.ndarray, genes: np.ndarray, counts: scipy.sparse.csr_matrix) -> str:
    digest = hashlib.sha256("\0".join([*ids, "", *genes]).encode())
    for array, dtype in [(counts.indptr, "<i8"), (counts.indices, "<i8"), (counts.data, "<u4")]:
        digest.update(array.astype(dtype).tobytes())
    return digest.hexdigest()


def run_thin(config: ThinConfig) -> dict:
    """`scbench benchmark thin`: write half A of all cells, and return where it is and its digest."""
    refuse_existing(config.output)
    options = {"layer": config.layer, "genes_column": config.genes_column, "values": config.values}
    with embed.opened(config.input, **options) as source:
        halves = read_halves(source, config.seed, progress=not config.json)
    cells = halves.take(np.argsort(halves.rows)).anndata()  # in the file's order
    with published_file(config.output) as partial:
        cells.write_h5ad(partial)
    if not config.json:
        print(f"Half of the counts of {cells.n_obs:,} cells: {config.output}; embed this file with your model, keep its cell "
              f"ids, and give the embeddings to scbench benchmark counts with --seed {config.seed}.")
    return {"output": str(config.output), "cells": cells.n_obs, "seed": config.seed, "half_sha256": halves.digest}
