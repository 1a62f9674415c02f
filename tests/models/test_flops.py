"""The FLOPs formulas against what torch counts in a forward pass over one cell, and parameters against arithmetic."""

import os

import numpy as np
import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from scbench.config import STRUCTURES, ModelConfig
from scbench.data.batch import CellBatch
from scbench.data.vocabulary import Vocabulary
from scbench.kernels import backend
from scbench.models.encoders.mamba import EXPANSION, STATES, TAPS
from scbench.models.flops import SCAN, encoder_flops, encoder_parameters, head_flops, training_flops
from scbench.models.model import ExpressionModel

GENES = 40
torch_only = pytest.mark.skipif(os.environ.get("SCBENCH_KERNELS") == "triton", reason="torch counts nothing of Triton kernels")


@pytest.fixture(autouse=True)
def pytorch(monkeypatch):
    """torch counts nothing of C code either."""
    monkeypatch.setattr(backend, "FORCED", backend.FORCED or "torch")


def config_of(structure: str, **options) -> ModelConfig:
    return ModelConfig(**{"structure": structure, "vocabulary_size": GENES + 3, "width": 16, "layers": 3, "heads": 2,
                          "dropout": 0.0, "max_genes": 20, **options})


def counted(config: ModelConfig, genes: int, masked: int) -> int:
    """What torch counts for one cell with `genes` genes, and the regression head's last layer, a matrix times a vector,
    which torch does not count."""
    model = ExpressionModel(config, Vocabulary.build(f"g{i}" for i in range(GENES))).eval()
    batch = CellBatch.from_lists([np.arange(genes)], [np.ones(genes)], [np.arange(genes) < masked])
    # torch does not count its fused attention on a CPU
    with FlopCounterMode(display=False) as counter, torch.no_grad(), sdpa_kernel(SDPBackend.MATH):
        model(batch)
    return counter.get_total_flops() + (2 * config.width * masked if config.regression else 0)


@torch_only
@pytest.mark.parametrize("structure", STRUCTURES)
@pytest.mark.parametrize("layers", [1, 3, 8])
def test_formulas_equal_what_torch_counts(structure, layers):
    genes, masked = 20, 7
    config = config_of(structure, layers=layers)
    formula = float(encoder_flops(config, genes + 1) + head_flops(config, masked, masked))
    if structure == "mamba":  # of its convolution and its scan only the scan's output is a matrix product
        formula -= layers * (genes + 1) * EXPANSION * 16 * (2 * TAPS + (SCAN - 2) * STATES)
    assert formula == counted(config, genes, masked)


@torch_only
def test_heads_that_are_not_there_cost_nothing():
    for options in ({"mvc": False}, {"structure": "cnn"}):
        config = config_of(**{"structure": "linear", **options})
        assert float(encoder_flops(config, 21) + head_flops(config, 5, 5)) == counted(config, 20, 5)


def test_a_cell_at_a_time_and_shared_queries():
    config = config_of("transformer")
    tokens, masked = np.array([5, 21]), np.array([2, 8])
    both = training_flops(config, tokens, masked, 4)
    assert both.shape == (2,)
    for number in range(2):
        alone = encoder_flops(config, tokens[number]) + head_flops(config, masked[number], 4)
        assert both[number] == 3 * alone
    fewer = training_flops(config, tokens, masked, 3)
    np.testing.assert_array_equal(both - fewer, [3 * 6 * 16**2] * 2)


def test_short_cells_cost_a_linear_mixer_only_their_own_tokens():
    config = config_of("linear_mixer", layers=2)
    difference = encoder_flops(config, 21) - encoder_flops(config, 11)
    assert difference == 10 * 16 * (2 * 16 + 2 * 10)  # value MLP, 10 new positions


def test_parameters_without_tables():
    assert encoder_parameters(config_of("linear", layers=2)) == 2 * (2 * (16 * 16 + 16) + 2 * 16)
    assert encoder_parameters(config_of("gnn", layers=1)) == 2 * (64 * 64 + 64) + (16 * 16 + 16) + 2 * 16
    assert encoder_parameters(config_of("gnn", vocabulary_size=99)) == encoder_parameters(config_of("gnn"))
