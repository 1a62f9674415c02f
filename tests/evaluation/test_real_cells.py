"""On real cells: embeddings that don't depend on the file, and baselines that score what they are known to score."""

import os
from pathlib import Path

import anndata
import numpy as np
import pytest

from scbench.config import ModelConfig
from scbench.data.gene_identity import gene_keys
from scbench.data.sources.anndata import AnnDataSource
from scbench.data.vocabulary import Vocabulary
from scbench.evaluation.classification.benchmark import benchmark_classification
from scbench.evaluation.embed import embed
from scbench.models.model import ExpressionModel

DATA = os.environ.get("SCBENCH_TEST_DATA")
pytestmark = pytest.mark.skipif(DATA is None, reason="SCBENCH_TEST_DATA does not name a folder of real cells")


def file_and_model() -> tuple[Path, ExpressionModel]:
    path = Path(DATA) / "pbmc3k.h5ad"
    with AnnDataSource(path) as source:
        vocabulary = Vocabulary.build(key for key in gene_keys(source.identity) if key)
    config = ModelConfig(vocabulary_size=vocabulary.size, width=16, layers=1, heads=2, max_genes=256)
    return path, ExpressionModel(config, vocabulary)


def test_shuffled_and_halved_files_give_the_same_embeddings(tmp_path):
    path, model = file_and_model()
    cells = anndata.read_h5ad(path)[:400].copy()
    whole = embed(model, cells)
    order = np.random.default_rng(0).permutation(400)
    cells[order[:200]].write_h5ad(tmp_path / "half.h5ad")
    cells[order[200:]].write_h5ad(tmp_path / "other.h5ad", compression="gzip")
    halves = np.concatenate([embed(model, tmp_path / name) for name in ("half.h5ad", "other.h5ad")])
    assert np.abs(halves - whole[order]).max() < 1e-5


@pytest.mark.full
def test_baselines_score_what_is_known_of_pbmc3k():
    path, model = file_and_model()
    table = benchmark_classification(model, path, "cell_type", seeds=1)
    rows = {(row["model"], row["probe"]): row for row in table.rows}
    regression = rows["variable genes", "linear"]  # measured elsewhere, once: .914 and .911
    assert regression["accuracy"] == pytest.approx(0.914, abs=0.015)
    assert regression["macro_f1"] == pytest.approx(0.911, abs=0.02)
    assert rows["PCA 50", "k-NN"]["accuracy"] > 0.86  # .88 with three quarters of the cells to train on
    assert table.details["cells"]["unlabelled"] == 62
