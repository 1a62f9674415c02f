"""Planted perturbations: cells whose perturbations do what the test says."""

import anndata
import numpy as np
import pandas as pd
import pytest
import scipy.sparse

from scbench.config import ModelConfig
from scbench.data.sources.anndata import AnnDataSource
from scbench.data.vocabulary import Vocabulary
from scbench.evaluation.perturbation.cells import PANEL, name_cells, read_perturbed_cells
from scbench.evaluation.perturbation.splits import draw_split
from scbench.models.model import ExpressionModel

GENES = [f"GENE{i}" for i in range(80)]
LATENT = np.random.default_rng(5).normal(size=(24, 3))  # what the targets GENE0 … GENE23 do, by three programmes


def effects() -> np.ndarray:
    """The log change that each of the 24 targets makes, float64 [24, 80]: linear in LATENT; the target itself goes down."""
    change = LATENT @ np.random.default_rng(6).normal(0, 0.35, (3, 80))
    change[:, :24] = 0
    change[np.arange(24), np.arange(24)] = -3
    return change


def plant(conditions, cells=40, contexts=("a",), shift=0.0, seed=0, controls=40) -> anndata.AnnData:
    """`cells` cells of each condition and `controls` controls in each context (column line), which differ by `shift`."""
    generator = np.random.default_rng(seed)
    rates, change = np.full(80, 6.0), effects()
    counts, obs = [], []
    for number, context in enumerate(contexts):
        tilt = np.random.default_rng(100 + number).normal(0, shift, 80)
        for condition in ["control", *conditions]:
            log = tilt + sum(change[GENES.index(name)] for name in condition.split("+") if name in GENES[:24])
            n = controls if condition == "control" else cells
            counts.append(generator.poisson(rates * np.exp(log), (n, 80)))
            obs += [(condition, context)] * n
    frame = pd.DataFrame(obs, columns=["condition", "line"], index=[f"cell {i}" for i in range(len(obs))])
    matrix = scipy.sparse.csr_matrix(np.concatenate(counts).astype(np.int32))
    return anndata.AnnData(matrix, obs=frame, var=pd.DataFrame(index=GENES))


@pytest.fixture
def planted():
    return plant


@pytest.fixture
def read():
    """The first study of some cells, read by line."""
    def of(cells, context=("line",)):
        source = AnnDataSource(cells)
        named = name_cells(source, "condition", "control", context=context, genes=set(GENES))
        return read_perturbed_cells(source, named, total_counts_column=PANEL).studies[0]

    return of


@pytest.fixture
def divide():
    """A split of some cells by line."""
    def of(cells, protocol, folds, seeds=2, seed=3, context=("line",)):
        named = name_cells(AnnDataSource(cells), "condition", "control", context=context, genes=set(GENES))
        return draw_split(named, protocol, folds, seeds, seed, dataset="planted", column="condition")

    return of


@pytest.fixture
def model() -> ExpressionModel:
    """Its gene embeddings know what the targets do."""
    vocabulary = Vocabulary.build(GENES)
    config = ModelConfig(vocabulary_size=vocabulary.size, width=4, layers=1, heads=2, max_genes=30)
    model = ExpressionModel(config, vocabulary, seed=1)
    table = model.embedding.table.data
    for target, latent in enumerate(LATENT):
        table[vocabulary.tokens[f"GENE{target}"], :3] = table.new_tensor(latent)
    return model
