"""The row of `<pad>`: drawn and never trained in the recipe aaai2025, as the reference has it; without use by default."""

import numpy as np
import pytest
import torch

from scbench.config import STRUCTURES, ModelConfig
from scbench.data.batch import CellBatch
from scbench.data.vocabulary import Vocabulary
from scbench.models.model import ExpressionModel

VOCABULARY = Vocabulary.build(f"G{i}" for i in range(30))


def gradients(structure: str, recipe: str, width: int) -> tuple[CellBatch, torch.Tensor, torch.Tensor]:
    """A batch of short cells, and the table's values and gradient."""
    config = ModelConfig(vocabulary_size=VOCABULARY.size, structure=structure, recipe=recipe, width=width, layers=2, heads=2,
                         max_genes=12, dropout=0.0, pooling="avg" if structure in ("transformer", "linear", "gnn") else None)
    model = ExpressionModel(config, VOCABULARY).train()
    rng = np.random.default_rng(0)
    genes = [rng.choice(30, n, replace=False) for n in (3, 7)]
    values = [rng.uniform(0.5, 3, n) for n in (3, 7)]
    batch = CellBatch.from_lists(genes, values, [v > 1.5 for v in values], pad_to=config.inputs.pad_to)
    model(batch).loss.backward()
    return batch, model.embedding.table.detach(), model.embedding.table.grad


@pytest.mark.parametrize("structure", STRUCTURES)
@pytest.mark.parametrize("width", [8, 256])
def test_recipe_aaai2025_never_trains_the_row_of_pads(structure, width):
    """Pads are data to cnn, linear_mixer and average pooling, so that their row would learn if nothing held it."""
    batch, table, gradient = gradients(structure, "aaai2025", width)
    assert batch.cell_offsets.tolist() == [0, 13, 26]
    assert table[VOCABULARY.pad].any(), "it is drawn, not zero"
    assert not gradient[VOCABULARY.pad].any()
    assert gradient[VOCABULARY.cls].any()


@pytest.mark.parametrize("structure", STRUCTURES)
def test_the_default_recipe_has_no_pads(structure):
    batch, _, gradient = gradients(structure, "default", 8)
    assert batch.cell_offsets.tolist() == [0, 4, 12]
    assert not gradient[VOCABULARY.pad].any()
