"""The length and the depth at which the reference's convolutions and linear mixers stop: 513 tokens, 12 layers, no GPU; and
the length that attention lays its grid out by."""

import numpy as np
import pytest
import torch

from scbench.config import ModelConfig
from scbench.data.batch import CellBatch
from scbench.data.vocabulary import Vocabulary
from scbench.models.encoders import gnn, transformer
from scbench.models.model import ExpressionModel

VOCABULARY = Vocabulary.build(f"G{i}" for i in range(600))


@pytest.mark.parametrize("structure", ["cnn", "cnn_sorted", "linear_mixer"])
@pytest.mark.parametrize("recipe", ["default", "aaai2025"])
def test_512_genes_and_12_layers_train(structure, recipe):
    config = ModelConfig(vocabulary_size=VOCABULARY.size, structure=structure, recipe=recipe, width=8, layers=12)
    assert config.max_genes == 512
    model = ExpressionModel(config, VOCABULARY).train()
    rng = np.random.default_rng(0)
    genes = [np.sort(rng.choice(600, n, replace=False)) for n in (512, 40, 300)]
    values = [rng.uniform(0.5, 5, len(g)) for g in genes]
    batch = CellBatch.from_lists(genes, values, [rng.random(len(g)) < 0.4 for g in genes], pad_to=config.inputs.pad_to)
    assert batch.max_tokens == 513
    output = model(batch)
    output.loss.backward()
    assert output.cell_embedding.shape == (3, 8)
    assert torch.isfinite(output.loss)
    learning = {name for name, p in model.encoder.named_parameters() if p.grad is not None and p.grad.isfinite().all()}
    assert learning == {name for name, _ in model.encoder.named_parameters()}


@pytest.mark.parametrize(("recipe", "longest"), [("default", 8), ("aaai2025", 13)])
@pytest.mark.parametrize("encoder", [transformer, gnn])
def test_attention_hears_of_the_longest_cell_pads_included(monkeypatch, encoder, recipe, longest):
    structure, heard = encoder.__name__.split(".")[-1], []
    config = ModelConfig(vocabulary_size=VOCABULARY.size, structure=structure, recipe=recipe, width=8, layers=2, max_genes=12)
    name = "self_attention" if encoder is transformer else "attention"
    real = getattr(encoder, name)
    monkeypatch.setattr(encoder, name, lambda *a, **named: heard.append(named["max_tokens"]) or real(*a, **named))
    genes = [np.arange(n) for n in (3, 7, 0)]
    batch = CellBatch.from_lists(genes, [np.ones(len(g)) for g in genes], pad_to=config.inputs.pad_to)
    assert int(batch.cell_offsets.diff().max()) == longest
    ExpressionModel(config, VOCABULARY).encode(batch)
    assert heard == [longest, longest]
