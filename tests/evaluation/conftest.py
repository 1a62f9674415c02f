"""Planted cells and a tiny model for the tests of evaluation."""

import anndata
import numpy as np
import pandas as pd
import pytest
import scipy.sparse

from scbench.config import ModelConfig
from scbench.data.vocabulary import Vocabulary
from scbench.models.model import ExpressionModel

GENES = [f"GENE{i}" for i in range(80)]
TYPES = ["alpha", "beta", "gamma"]


def plant(cells: int = 120, seed: int = 0) -> anndata.AnnData:
    """Three types, each with 20 genes of its own turned up; 15 to 75 genes a cell."""
    generator = np.random.default_rng(seed)
    kind = np.arange(cells) % 3
    rates = np.full((cells, len(GENES)), 0.5)
    for number in range(3):
        rates[kind == number, 20 * number : 20 * number + 20] *= 6
    counts = generator.poisson(rates * generator.lognormal(0, 0.5, (cells, 1))).astype(np.int32)
    obs = pd.DataFrame({"type": [TYPES[k] for k in kind], "n": np.arange(cells)}, index=[f"cell {i}" for i in range(cells)])
    return anndata.AnnData(X=scipy.sparse.csr_matrix(counts), obs=obs, var=pd.DataFrame(index=GENES))


@pytest.fixture(scope="session")
def planted_cells():
    return plant


@pytest.fixture
def cells() -> anndata.AnnData:
    return plant()


@pytest.fixture
def model() -> ExpressionModel:
    vocabulary = Vocabulary.build(GENES)
    config = ModelConfig(vocabulary_size=vocabulary.size, width=16, layers=1, heads=2, max_genes=30)
    return ExpressionModel(config, vocabulary, seed=1)
