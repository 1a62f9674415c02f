"""Whole models of every structure and recipe: a cell stands alone, heads and pooling do what they say, files hold it all."""

import numpy as np
import pytest
import torch

from scbench.config import OWN_POOLING, STRUCTURES, ModelConfig
from scbench.data.batch import CellBatch
from scbench.data.vocabulary import Vocabulary
from scbench.evaluation.embed import embed
from scbench.models.model import ExpressionModel

VOCABULARY = Vocabulary.build(f"ENSG{i:011d}" for i in range(1, 121))
LENGTHS = (30, 1, 17, 0, 8)


def make_model(seed=0, moved=True, **options) -> ExpressionModel:
    settings = {"width": 16, "layers": 3, "heads": 4, "dropout": 0.1, "max_genes": 30, **options}
    model = ExpressionModel(ModelConfig(vocabulary_size=VOCABULARY.size, **settings), VOCABULARY, seed)
    if moved:  # biases and norms start at 0 and 1: move them, so that an error in them shows
        with torch.no_grad():
            generator = torch.Generator().manual_seed(1)
            for tensor in (*model.parameters(), *model.buffers()):
                tensor.add_(torch.rand(tensor.shape, generator=generator) * 0.1)
    return model


def make_batch(model, part=(0, 1, 2, 3, 4), **options) -> CellBatch:
    rng = np.random.default_rng(0)
    genes = [np.sort(rng.choice(120, n, replace=False)) for n in LENGTHS]
    values = [np.log1p(rng.integers(1, 30, n)) for n in LENGTHS]
    masked = [rng.random(n) < 0.4 for n in LENGTHS]
    chosen = [[x[i] for i in part] for x in (genes, values, masked)]
    return CellBatch.from_lists(*chosen, pad_to=model.config.inputs.pad_to, samples=np.array(part) + 70, **options)


@pytest.mark.parametrize("structure", STRUCTURES)
@pytest.mark.parametrize("training", [False, True])
def test_the_company_of_a_cell_changes_nothing(structure, training):
    """Order and grouping; in training too, with dropout: nothing in the default recipe couples cells."""
    model = make_model(structure=structure).double().train(training)
    together = model.encode(make_batch(model))
    for groups in ([(4, 2, 0, 3, 1)], [(3, 0), (1, 4), (2,)]):
        for part in groups:
            torch.testing.assert_close(model.encode(make_batch(model, part)), together[list(part)], rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("structure", STRUCTURES)
@pytest.mark.parametrize("recipe", ["default", "aaai2025"])
def test_embeddings_do_not_depend_on_batches(structure, recipe, make_cells):
    """Through `embed`, in evaluation mode, where batch norm uses its running statistics."""
    model = make_model(structure=structure, recipe=recipe)
    cells = make_cells(40, 120)
    assert (np.diff(cells.X.indptr) > 30).any() and (np.diff(cells.X.indptr) < 30).any()
    expected = embed(model, cells, batch_cells=40)
    order = np.random.default_rng(0).permutation(40)
    assert np.abs(embed(model, cells[order], batch_cells=3) - expected[order]).max() < 1e-5 * np.abs(expected).max()
    assert np.abs(np.diff(expected, axis=0)).max() > 1e-3, "cells differ"


@pytest.mark.parametrize("structure", STRUCTURES)
@pytest.mark.parametrize("recipe", ["default", "aaai2025"])
@pytest.mark.parametrize("options", [{"preprocess": "bin"}, {"normalize": "total"}, {"library_size_offset": True}, {}])
def test_a_model_directory_holds_all_of_it(structure, recipe, options, tmp_path, make_cells):
    if recipe == "aaai2025" and options not in ({}, {"preprocess": "bin"}):
        return  # refused; tests/test_config.py
    model = make_model(structure=structure, recipe=recipe, **options)
    cells = make_cells(20, 120)
    model.save_pretrained(tmp_path / "model", {"sources": [], "splits": {}})
    loaded = ExpressionModel.from_pretrained(tmp_path / "model")
    assert loaded.config == model.config
    assert np.array_equal(loaded.embed(cells), model.embed(cells))


@pytest.mark.parametrize("structure", STRUCTURES)
def test_losses_are_those_of_the_predictions(structure):
    model = make_model(structure=structure).eval()
    batch = make_batch(model)
    output = model(batch)
    mvc_loss = (output.mvc - batch.targets).square().mean()
    torch.testing.assert_close(output.mvc_loss, mvc_loss)
    if structure in OWN_POOLING:
        assert torch.equal(output.regression, output.mvc)
        assert output.regression_loss == 0, "MVC's loss is counted once"
        assert not output.regression.requires_grad
    else:
        torch.testing.assert_close(output.regression_loss, (output.regression - batch.targets).square().mean())
    torch.testing.assert_close(output.loss, output.regression_loss + output.mvc_loss)


@pytest.mark.parametrize("structure", STRUCTURES)
@pytest.mark.parametrize("recipe", ["default", "aaai2025"])
def test_nothing_masked_gives_a_zero_loss_with_a_graph(structure, recipe):
    model = make_model(structure=structure, recipe=recipe)
    batch = CellBatch.from_lists([[3, 4], []], [[1.0, 2.0], []], pad_to=model.config.inputs.pad_to)
    loss = model(batch).loss
    assert loss == 0
    loss.backward()
    assert all(p.grad is not None for p in model.encoder.parameters())


@pytest.mark.parametrize("structure", ["transformer", "linear", "mamba", "gnn"])
def test_average_pooling(structure):
    """Default: the mean over genes. aaai2025: over all tokens, <cls> and pads included."""
    for recipe in ("default", "aaai2025"):
        model = make_model(structure=structure, recipe=recipe, pooling="avg").double().eval()
        batch = make_batch(model)
        states = model.embedding(batch := model._resolved(batch))[0]
        states = model.encoder(states, batch, lambda *path: None)
        for number, start in enumerate(batch.cell_offsets[:-1].tolist()):
            stop = batch.cell_offsets[number + 1] if recipe == "aaai2025" else start + batch.lengths[number]
            rows = states[start if recipe == "aaai2025" else start + 1 : stop]
            expected = rows.mean(0) if len(rows) else torch.zeros(16)
            torch.testing.assert_close(model.encode(batch)[number], expected.to(torch.float64))


def test_the_transformer_of_the_paper_shrinks_average_embeddings_of_short_cells():
    """In evaluation its pads are zeros that count: n tokens of 31 give n / 31 of the mean; in training they hold states."""
    model = make_model(recipe="aaai2025", pooling="avg", dropout=0.0).double().eval()
    unpadded = make_model(pooling="avg", dropout=0.0).double().eval()
    unpadded.load_state_dict({**model.state_dict(), "embedding.table": model.embedding.gene_table().detach()}, strict=False)
    batch, packed = make_batch(model), make_batch(unpadded)
    states = unpadded.encoder(unpadded.embedding(unpadded._resolved(packed))[0], packed, lambda *path: None)
    means = torch.stack([part.mean(0) for part in states.split(packed.lengths.tolist())])
    expected = means * packed.lengths[:, None] / 31
    torch.testing.assert_close(model.encode(batch), expected)
    assert (model.train().encode(batch)[1] - expected[1]).abs().max() > 0.1


def test_the_library_size_reaches_the_heads_and_not_the_embedding():
    model = make_model(library_size_offset=True).double().eval()
    batch = make_batch(model)
    deeper = batch._replace(library_sizes=batch.library_sizes * 8)
    a, b = model(batch), model(deeper)
    assert torch.equal(a.cell_embedding, b.cell_embedding)
    # MVC: linear in log depth, with a slope of each gene's own
    deepening = torch.log1p(deeper.library_sizes) - torch.log1p(batch.library_sizes)
    slope = model.offset.linear.weight[:, 0] / 4 * deepening[:, None]
    cell = torch.bucketize(batch.masked, batch.cell_offsets[1:], right=True)
    head, queries = model.mvc_head, model.embedding.table[batch.query_genes]
    for linear in (head.linear1, head.linear2):
        queries = torch.nn.functional.leaky_relu(linear(queries), 0.01)
    queries = head.linear3(queries)[batch.query_index]
    torch.testing.assert_close(b.mvc - a.mvc, (queries * slope[cell]).sum(1), rtol=1e-6, atol=1e-8)
    assert (b.regression - a.regression).abs().max() > 1e-3


def test_where_the_recipes_start():
    """Default: table rows of length 1. aaai2025: torch's own initialisation, the pad's row drawn too, layers alike."""
    fixed = make_model(moved=False, width=64)
    assert fixed.embedding.table.detach().norm(dim=1).mean() == pytest.approx(1, abs=0.05)
    first, second = (fixed.encoder.layers[i].linear1.weight for i in (0, 1))
    assert not torch.equal(first, second)
    faithful = make_model(moved=False, recipe="aaai2025", width=64, heads=4)
    assert faithful.embedding.table.shape == (VOCABULARY.size, 256), "256 whatever the width"
    bound = (6 / (VOCABULARY.size + 256)) ** 0.5
    assert bound * 0.99 < faithful.embedding.table.abs().max() <= bound * 1.00001
    assert faithful.embedding.table[VOCABULARY.pad].any()
    first, second = (faithful.encoder.layers[i].linear1 for i in (0, 1))
    assert torch.equal(first.weight, second.weight), "nn.TransformerEncoder copies one layer"
    assert 0.11 < first.weight.abs().max() <= 1 / 8
    assert first.bias.any()
    assert not faithful.encoder.layers[0].query_key_value.bias.any()
    assert make_model(moved=False, recipe="aaai2025", width=256, layers=1).embedding.projection is None


def test_one_seed_one_model():
    for structure in STRUCTURES:
        a, b, c = (make_model(seed, moved=False, structure=structure).state_dict() for seed in (1, 1, 2))
        assert all(torch.equal(a[name], b[name]) for name in a)
        assert any(not torch.equal(a[name], c[name]) for name in a)
