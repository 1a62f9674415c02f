"""Planted perturbations: cells whose perturbations do what the test says."""

import anndata
import numpy as np
import pandas as pd
import scipy.sparse

GENES = [f"GENE{i}" for i in range(80)]


def effects(seed: int = 1) -> np.ndarray:
    """The log change that each of eight targets makes, float64 [8, 80]; GENE0 … GENE7 are the targets, knocked down."""
    generator = np.random.default_rng(seed)
    change = np.where(generator.random((8, 80)) < 0.3, generator.normal(0, 1.2, (8, 80)), 0)
    change[np.arange(8), np.arange(8)] = -3
    return change


def plant(
    conditions: list[str], cells: int = 60, contexts: tuple[str, ...] = ("a",), shift: float = 0.0, strength: float = 1.0,
    seed: int = 0,
) -> anndata.AnnData:
    """`cells` cells of each condition in each context, where `control` changes nothing; contexts differ by `shift`."""
    generator = np.random.default_rng(seed)
    rates = generator.gamma(2, 2, 80)
    change = effects() * strength
    counts, obs = [], []
    for number, context in enumerate(contexts):
        tilt = np.random.default_rng(100 + number).normal(0, shift, 80)
        for condition in conditions:
            log = tilt + sum(change[GENES.index(name)] for name in condition.split("+") if name in GENES[:8])
            counts.append(generator.poisson(rates * np.exp(log) * generator.lognormal(0, 0.2, (cells, 1))))
            obs += [(condition, context)] * cells
    frame = pd.DataFrame(obs, columns=["condition", "line"], index=[f"cell {i}" for i in range(len(obs))])
    return anndata.AnnData(scipy.sparse.csr_matrix(np.concatenate(counts).astype(np.int32)), obs=frame,
                           var=pd.DataFrame(index=GENES))
