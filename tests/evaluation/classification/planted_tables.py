"""Embeddings of planted cells, and what is looked up in the tables of the classification benchmark."""

import hashlib
import json

import numpy as np

from scbench.data.cells import content_hash, to_tokens
from scbench.data.gene_identity import map_genes
from scbench.data.sources.anndata import AnnDataSource
from scbench.evaluation.external import ExternalEmbedding

ONCE = {"seeds": 1, "folds": 3}


def hashes_of(model, cells) -> np.ndarray:
    source = AnnDataSource(cells)
    tokens = to_tokens(source.read(0, cells.n_obs), map_genes(source.identity, model.vocabulary, "cells"))
    return content_hash(tokens.genes, tokens.counts, tokens.offsets)


def row(table, model: str, probe: str) -> dict:
    return next(row for row in table.rows if (row["model"], row["probe"]) == (model, probe))


def folds_of(table, tmp_path, names) -> np.ndarray:
    """Each cell's or group's fold in each repetition, from the file that a table leaves."""
    table.beside["split.json"](tmp_path / "split.json")
    fold = json.loads((tmp_path / "split.json").read_text())["fold"]
    return np.array([fold[hashlib.sha256(name.encode()).hexdigest()[:16]] for name in names]).T


def external(cells, values: np.ndarray) -> ExternalEmbedding:
    """An embedding in obsm of the cells."""
    cells.obsm["X_other"] = np.asarray(values, dtype=np.float32)
    return ExternalEmbedding("obsm:X_other")


def one_hot(cells) -> np.ndarray:
    return np.eye(3)[np.unique(cells.obs["type"], return_inverse=True)[1]]
