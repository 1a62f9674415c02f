"""The model against an independent oracle: dense, padded, torch's own nn.TransformerEncoder, float64."""

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F

from scbench.config import ModelConfig
from scbench.data.batch import CellBatch
from scbench.data.vocabulary import Vocabulary
from scbench.errors import UserError
from scbench.models.model import ExpressionModel

VOCABULARY = Vocabulary.build(f"G{i}" for i in range(40))


def make_model(seed=0, **options) -> ExpressionModel:
    settings = {"width": 24, "layers": 2, "heads": 4, "dropout": 0.0, "max_genes": 16, **options}
    model = ExpressionModel(ModelConfig(vocabulary_size=VOCABULARY.size, **settings), VOCABULARY, seed)
    with torch.no_grad():  # biases and norms start at 0 and 1: move them, so that an error in them shows
        generator = torch.Generator().manual_seed(1)
        for p in model.parameters():
            p.add_(torch.randn(p.shape, generator=generator) * 0.05)
    return model.double()


def make_cells(lengths=(1, 5, 16, 0, 9), masked="some", seed=0):
    rng = np.random.default_rng(seed)
    genes = [np.sort(rng.choice(40, n, replace=False)) for n in lengths]
    values = [np.log1p(rng.integers(1, 30, n)) for n in lengths]
    ratio = {"some": 0.4, "none": 0.0, "all": 1.1}[masked]
    return genes, values, [rng.random(n) < ratio for n in lengths]


def dense_oracle(model: ExpressionModel, genes, values, masked):
    """(loss, regression loss, mvc loss, cell embeddings) cell by cell through padded torch modules."""
    c = model.config
    layer = nn.TransformerEncoderLayer(c.width, c.heads, c.width, 0.0, "relu", batch_first=True, dtype=torch.float64)
    encoder = nn.TransformerEncoder(layer, c.layers, enable_nested_tensor=False)
    for ours, theirs in zip(model.encoder.layers, encoder.layers, strict=True):
        theirs.self_attn.in_proj_weight = ours.query_key_value.weight
        theirs.self_attn.in_proj_bias = ours.query_key_value.bias
        theirs.self_attn.out_proj = ours.attention_output
        theirs.linear1, theirs.linear2 = ours.linear1, ours.linear2
        theirs.norm1, theirs.norm2 = ours.attention_norm, ours.feed_forward_norm
    size = max(len(g) for g in genes) + 1
    ids = torch.full((len(genes), size), VOCABULARY.pad)
    inputs, truth = torch.zeros(len(genes), size, dtype=torch.float64), torch.zeros(len(genes), size, dtype=torch.float64)
    hidden = torch.zeros(len(genes), size, dtype=torch.bool)
    for i, (g, v, m) in enumerate(zip(genes, values, masked, strict=True)):
        v32 = np.asarray(v, np.float32).astype(np.float64)
        n = len(g) + 1
        ids[i, 0], ids[i, 1:n] = VOCABULARY.cls, torch.from_numpy(np.asarray(g, np.int64))
        truth[i, 1:n], hidden[i, 1:n] = torch.from_numpy(v32), torch.from_numpy(np.asarray(m, bool))
        inputs[i, 1:n] = torch.from_numpy(np.where(m, -1.0, v32))
    pads = ids == VOCABULARY.pad
    e = model.embedding
    value_states = F.linear(torch.relu(F.linear(inputs[..., None], e.value_weight1, e.value_bias1)),
                            e.value_weight2, e.value_bias2)
    gene_states = F.embedding(ids, e.table)
    states = encoder(gene_states + value_states, src_key_padding_mask=pads)
    if c.pooling == "cls":
        cells = states[:, 0]
    else:
        real = (~pads).double()
        real[:, 0] = 0
        cells = (states * real[..., None]).sum(1) / real.sum(1).clamp(min=1)[:, None]
    count = hidden.sum().clamp(min=1)

    def mlp(head, x):
        return head.linear3(F.leaky_relu(head.linear2(F.leaky_relu(head.linear1(x), 0.01)), 0.01))

    regression = ((mlp(model.regression_head, states)[..., 0] - truth).square() * hidden).sum() / count
    if model.mvc_head is None:
        mvc = torch.zeros((), dtype=torch.float64)
    else:
        products = (mlp(model.mvc_head, gene_states.detach()) * cells[:, None]).sum(-1)
        mvc = ((products - truth).square() * hidden).sum() / count
    return regression + mvc, regression, mvc, cells


@pytest.mark.parametrize("masked", ["some", "none", "all"])
@pytest.mark.parametrize(("pooling", "mvc"), [("cls", True), ("avg", True), ("cls", False)])
def test_losses_and_every_gradient_equal_the_dense_oracle(pooling, mvc, masked):
    model = make_model(pooling=pooling, mvc=mvc)
    cells = make_cells(masked=masked)
    output = model(CellBatch.from_lists(*cells))
    output.loss.backward()
    ours = {name: p.grad for name, p in model.named_parameters()}
    model.zero_grad(set_to_none=True)
    expected = dense_oracle(model, *cells)
    ours_all = (output.loss, output.regression_loss, output.mvc_loss, output.cell_embedding)
    for mine, theirs in zip(ours_all, expected, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-9, atol=1e-10)
    expected[0].backward()
    for name, p in model.named_parameters():
        theirs = torch.zeros_like(p) if p.grad is None else p.grad
        assert ours[name] is not None, f"{name} got no gradient"
        torch.testing.assert_close(ours[name], theirs, rtol=1e-7, atol=1e-9, msg=lambda m, name=name: f"{name}: {m}")


def test_a_batch_for_any_model_becomes_the_vocabularys_own():
    model, cells = make_model(), make_cells()
    resolved = model._resolved(CellBatch.from_lists(*cells, pad_to=40))
    own = CellBatch.from_lists(*cells, pad_to=40, cls_token=model.vocabulary.cls, pad_token=model.vocabulary.pad)
    assert model._resolved(own) is own
    for name in CellBatch._fields:  # gene_order too: the kernels search in it
        assert torch.equal(torch.as_tensor(getattr(resolved, name)), torch.as_tensor(getattr(own, name))), name


def test_a_cell_does_not_depend_on_its_company():
    model = make_model().eval()
    genes, values, _ = make_cells()
    together = model.encode(CellBatch.from_lists(genes, values))
    order = [3, 0, 4, 2, 1]
    shuffled = model.encode(CellBatch.from_lists([genes[i] for i in order], [values[i] for i in order]))
    torch.testing.assert_close(shuffled, together[order], rtol=1e-12, atol=1e-12)
    for i in range(len(genes)):
        alone = model.encode(CellBatch.from_lists([genes[i]], [values[i]]))
        torch.testing.assert_close(alone[0], together[i], rtol=1e-12, atol=1e-12)


def test_gradients_of_a_split_batch_add_up_with_dropout():
    """Dropout is keyed by sample and place, losses are parts of one sum: however a batch is split, the gradient is one."""
    model = make_model(dropout=0.3).train()
    genes, values, masked = make_cells()
    samples = np.array([100, 7, 3, 9, 10**12])

    def gradients(parts):
        model.zero_grad(set_to_none=True)
        total = float(sum(m.sum() for m in masked))
        for part in parts:
            batch = CellBatch.from_lists([genes[i] for i in part], [values[i] for i in part],
                                         [masked[i] for i in part], samples=samples[part])
            model(batch._replace(denominator=torch.tensor(total))).loss.backward()
        return {name: p.grad.clone() for name, p in model.named_parameters()}

    whole, split = gradients([[0, 1, 2, 3, 4]]), gradients([[4, 2], [0], [3, 1]])
    for name in whole:
        torch.testing.assert_close(split[name], whole[name], rtol=1e-9, atol=1e-11)
    model.eval()
    assert (gradients([[0, 1, 2, 3, 4]])["embedding.table"] - whole["embedding.table"]).abs().max() > 1e-4  # dropout did act


def test_mvc_does_not_train_the_table_through_its_queries():
    model = make_model()
    genes, values, _ = make_cells(lengths=(6,))
    masked = [np.array([True] + [False] * 5)]
    batch = CellBatch.from_lists(genes, values, masked)
    model(batch).mvc_loss.backward()
    torch.testing.assert_close(model.mvc_head.linear1.weight.grad.abs().sum() > 0, torch.tensor(True))
    # Only through the cell embedding: with the queries detached, a gene outside the batch gets nothing.
    outside = sorted(set(range(40)) - set(genes[0].tolist()))
    assert model.embedding.table.grad[outside].abs().max() == 0


def test_seeds_and_names_decide_the_weights():
    a, b = make_model(seed=3), make_model(seed=3, layers=3)
    for name, _ in a.named_parameters():
        if "norm" not in name and "bias" not in name:
            fresh = ExpressionModel(a.config, VOCABULARY, 3).get_parameter(name)
            deeper = ExpressionModel(b.config, VOCABULARY, 3).get_parameter(name)
            assert torch.equal(fresh, deeper)
            assert not torch.equal(fresh, ExpressionModel(a.config, VOCABULARY, 4).get_parameter(name))


def test_saved_and_loaded_models_are_equal(tmp_path):
    model = make_model().float().eval()
    cells = np.array([2**63 + 5, 3, 9], dtype=np.uint64)
    model.save_pretrained(tmp_path / "model", {"sources": [{"name": "a.h5ad", "cells": 3}]}, cells)
    loaded = ExpressionModel.from_pretrained(tmp_path / "model")
    genes, values, _ = make_cells()
    batch = CellBatch.from_lists(genes, values)
    assert torch.equal(loaded.encode(batch), model.encode(batch))
    assert loaded.config == model.config
    assert loaded.provenance["sources"][0]["cells"] == 3
    np.testing.assert_array_equal(loaded.training_cells, np.sort(cells))
    assert not loaded.training
    table = loaded.gene_embeddings()
    assert table.shape == (43, 24)
    np.testing.assert_array_equal(table.loc["G7"], model.embedding.table.detach()[VOCABULARY.tokens["G7"]].numpy())


@pytest.mark.parametrize("damage", ["no config", "other vocabulary", "cut weights", "newer", "missing key", "not json"])
def test_damaged_model_directories_are_refused_in_one_sentence(tmp_path, damage):
    model = make_model().float()
    path = tmp_path / "model"
    model.save_pretrained(path, {})
    config = path / "config.json"
    if damage == "no config":
        config.unlink()
    elif damage == "other vocabulary":
        Vocabulary.build(f"H{i}" for i in range(40)).save(path / "vocabulary.json")
    elif damage == "cut weights":
        weights = path / "model.safetensors"
        weights.write_bytes(weights.read_bytes()[:-100])
    elif damage == "newer":
        config.write_text(config.read_text().replace('"format": 1', '"format": 2'))
    elif damage == "missing key":
        config.write_text(config.read_text().replace('"model"', '"other"'))
    else:
        config.write_text("{")
    with pytest.raises(UserError) as error:
        ExpressionModel.from_pretrained(path)
    assert "\n" not in str(error.value)
    assert str(path) in str(error.value)


def test_models_and_vocabularies_must_fit():
    with pytest.raises(UserError, match="43 tokens"):
        ExpressionModel(ModelConfig(vocabulary_size=44, width=8, heads=2), VOCABULARY)
    with pytest.raises(UserError, match="--width 10 is not divisible by --heads 4"):
        ModelConfig(vocabulary_size=43, width=10, heads=4)
    with pytest.raises(UserError, match="unknown structure"):
        ModelConfig(vocabulary_size=43, structure="perceiver")
