"""How the recipes turn an AnnData into a model's input: logarithms, draws, pads, genes that nobody knows."""

import anndata
import numpy as np
import pytest
import scipy.sparse

from scbench.config import ModelConfig
from scbench.data.vocabulary import Vocabulary
from scbench.errors import UserError
from scbench.evaluation.embed import embed
from scbench.models.model import ExpressionModel

RECIPES = ["default", "aaai2025"]


def make_model(recipe: str, max_genes=30, **options) -> ExpressionModel:
    vocabulary = Vocabulary.build(f"GENE{i}" for i in range(80))
    config = ModelConfig(vocabulary_size=vocabulary.size, recipe=recipe, width=16, layers=1, heads=2, max_genes=max_genes,
                         **options)
    return ExpressionModel(config, vocabulary, seed=1)


def log_normalised(counts):
    scale = scipy.sparse.diags(1e4 / np.asarray(counts.sum(1)).ravel())
    return scipy.sparse.csr_matrix(scale @ counts).log1p().astype(np.float32)


@pytest.mark.parametrize("recipe", RECIPES)
def test_log_normalised_values_are_never_taken_for_counts(recipe, cells):
    model, counts = make_model(recipe), cells.X.copy()
    expected = embed(model, cells)
    cells.X = log_normalised(counts)
    with pytest.raises(UserError, match="no raw counts"):
        embed(model, cells)
    cells.X = counts.log1p().astype(np.float32)
    with pytest.raises(UserError, match="no raw counts"):
        embed(model, cells)
    cells.layers["counts"] = counts
    np.testing.assert_array_equal(embed(model, cells), expected)


def genes_drawn(model, cell, monkeypatch, **options) -> list[set]:
    """Names of the genes of each draw of a cell."""
    drawn, encode, names = [], model.encode, np.array(model.vocabulary.names)

    def record(batch):
        drawn.append(set(names[batch.genes[1 : int(batch.lengths[0])].numpy()]))
        return encode(batch)

    with monkeypatch.context() as patch:
        patch.setattr(model, "encode", record)
        embed(model, cell, batch_cells=1, **options)
    return drawn


def test_long_cells_are_drawn_uniformly_or_as_the_paper_does(monkeypatch):
    """60 genes, 30 of count 1: a weighted draw of 30 never shows those, for they have a weight of 1e-5."""
    cell = anndata.AnnData(scipy.sparse.csr_matrix([[1] * 30 + [9] * 30]))
    cell.var_names = [f"GENE{i}" for i in range(60)]
    high = set(cell.var_names[30:])
    draws = genes_drawn(make_model("default"), cell, monkeypatch)
    assert len(draws) == 4
    assert all(5 < len(draw & high) < 25 for draw in draws)
    faithful = make_model("aaai2025")
    assert genes_drawn(faithful, cell, monkeypatch) == [high], "one draw, by weight: what an imported checkpoint gets too"
    faithful.provenance = {"training": {"weighted_sampling": False}}
    (draw,) = genes_drawn(faithful, cell, monkeypatch)
    assert 5 < len(draw & high) < 25


def test_pads_scale_no_average_by_default(cells):
    """A short cell's mean over genes has nothing to do with how long cells may be; in the recipe aaai2025 it has."""
    short = cells[np.diff(cells.X.indptr) <= 30].copy()
    assert short.n_obs > 5
    model = make_model("default", pooling="avg")
    np.testing.assert_allclose(embed(model, short, max_genes=80), embed(model, short), rtol=1e-5, atol=1e-6)
    faithful = make_model("aaai2025", pooling="avg")
    np.testing.assert_allclose(embed(faithful, short, max_genes=80) * (81 / 31), embed(faithful, short), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("recipe", RECIPES)
def test_unknown_genes_are_no_token_at_all(recipe, cells):
    """Neither id 0 nor <pad>: the embedding is the one without them."""
    model = make_model(recipe)
    stranger = scipy.sparse.csr_matrix(np.full((cells.n_obs, 3), 7, dtype=np.int32))
    more = anndata.AnnData(scipy.sparse.hstack([stranger, cells.X]).tocsr())
    more.var_names = ["NOBODY1", "NOBODY2", "NOBODY3", *cells.var_names]
    np.testing.assert_allclose(embed(model, more), embed(model, cells), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("recipe", RECIPES)
@pytest.mark.parametrize("structure", ["cnn", "cnn_sorted", "linear_mixer"])
def test_the_trained_length_comes_with_the_model(recipe, structure, cells, tmp_path):
    """Nobody has to give it again, and a linear mixer, which has weights for it alone, refuses a longer one."""
    make_model(recipe, structure=structure, max_genes=25).save_pretrained(tmp_path / "model", {})
    model = ExpressionModel.from_pretrained(tmp_path / "model")
    assert np.isfinite(embed(model, cells)).all()
    assert np.isfinite(embed(model, cells, max_genes=13)).all()
    if structure == "linear_mixer":
        with pytest.raises(UserError, match=r"max_genes is 26: .* has weights for 25 genes only"):
            embed(model, cells, max_genes=26)
    else:
        assert np.isfinite(embed(model, cells, max_genes=26)).all()
