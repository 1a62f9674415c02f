"""Features of targets: the model's gene embeddings, and what they have to beat."""

import hashlib

import numpy as np
import pandas as pd
import scipy.sparse
import torch
from sklearn.decomposition import PCA

from scbench.data.gene_identity import identify, map_genes
from scbench.errors import UserError
from scbench.evaluation.perturbation.cells import PerturbedCells
from scbench.kernels import random
from scbench.models.model import ExpressionModel

COMPONENTS = 50
_RANDOM = 14  # what a key of Stream.EVALUATION decides


def target_tokens(model: ExpressionModel, targets: list[str]) -> dict[str, int]:
    """The token of each target that the model has one for."""
    identity = identify(targets, pd.DataFrame(index=targets), None, "the targets")
    try:
        tokens = map_genes(identity, model.vocabulary, "the targets").tokens
    except UserError:  # none has one
        return {}
    return {target: int(token) for target, token in zip(targets, tokens, strict=True) if token >= 0}


def trained_tokens(model: ExpressionModel) -> np.ndarray | None:
    """Which rows of the gene table pretraining has moved, bool [V]; None if the model doesn't say how it was initialised.

    A row without gradients and weight decay stays as it was drawn (or its rounding to bf16): the gene was in no training cell.
    """
    training = model.provenance.get("training", {})
    if "seed" not in training or training.get("optimizer") not in ("adamw", "adam", "sgd"):
        return None
    drawn = ExpressionModel(model.config, model.vocabulary, training["seed"]).embedding.table.detach()
    table = model.embedding.table.detach().cpu().float()
    return ((table != drawn).any(dim=1) & (table != drawn.bfloat16().float()).any(dim=1)).numpy()


def gene_embeddings(model: ExpressionModel, tokens: dict[str, int]) -> dict[str, np.ndarray]:
    """The model's embedding of each target, float64 [D]."""
    with torch.inference_mode():
        table = model.embedding.gene_table().float().cpu().numpy().astype(np.float64)
    return {target: table[token] for target, token in tokens.items()}


def gene_loadings(values: scipy.sparse.csr_matrix, columns: dict[str, list[int]]) -> dict[str, np.ndarray]:
    """Each target's loadings on the first 50 (or as many as there are) principal components of training cells, float64 [K].

    `values`: [cells, genes]; `columns`: the target's columns among these genes. Targets without any are not in the result.
    """
    components = min(COMPONENTS, values.shape[0] - 1, values.shape[1] - 1)
    pca = PCA(components, svd_solver="arpack", random_state=0).fit(values)
    return {target: pca.components_[:, places].sum(axis=1).astype(np.float64) for target, places in columns.items() if places}


def random_vectors(targets: list[str], width: int, seed: int) -> dict[str, np.ndarray]:
    """A normal vector for each target, float64 [width], that depends on its name and the seed alone."""
    key = random.key(seed, random.Stream.EVALUATION, _RANDOM)
    found = {}
    for target in targets:
        name = int.from_bytes(hashlib.sha256(target.encode()).digest()[:8], "little")
        words = random.bits(random.bits(key, np.uint64(name)), np.arange(2 * width))
        first, second = random.uniform(words[:width]), random.uniform(words[width:])
        found[target] = np.sqrt(-2 * np.log(first)) * np.cos(2 * np.pi * second)  # Box and Muller
    return found


def summed(cells: PerturbedCells, vectors: dict[str, np.ndarray]) -> np.ndarray:
    """The features of each perturbation: the sum of its targets' vectors (0 for unknown ones), float64 [perturbations, D]."""
    width = len(next(iter(vectors.values()))) if vectors else 1
    nothing = np.zeros(width)
    return np.stack([sum((vectors.get(target, nothing) for target in targets), nothing) for targets in cells.perturbations])
