"""The floating-point operations that a model needs for a cell, and its parameters.

Counted, a multiply-add as two: matrix products and convolutions of the value MLP, the encoder and the heads, and Mamba's
scan. Not counted: look-ups in tables, norms, activations, dropout, pads, the optimizer. A number of the model, not of
how it is computed: pads of a dense layout, recomputation and products that nobody asked for are no need.
"""

import numpy as np
import torch
from torch import nn

from scbench.config import ModelConfig
from scbench.models.encoders import ENCODERS
from scbench.models.encoders.cnn import KERNEL
from scbench.models.encoders.gnn import FACTOR_WIDTH
from scbench.models.encoders.mamba import EXPANSION, STATES, TAPS

BACKWARD = 2  # times the forward pass
SCAN = 9  # of Mamba, per channel and state: decay, input, update and output of one step


def training_flops(config: ModelConfig, tokens: np.ndarray, masked: np.ndarray, queries: np.ndarray) -> np.ndarray:
    """FLOPs that training needs for each cell, float64: the forward pass, and twice as much for the backward.

    Parameters
    ----------
    config
        The model's shape (recipe default: a cell has no pads).
    tokens
        int [B], the cell's tokens, `<cls>` included.
    masked
        Its masked genes (a mean is as good).
    queries
        The distinct masked genes of the step, divided by its cells: MVC computes a gene's query once a step.
    """
    return (1 + BACKWARD) * (encoder_flops(config, tokens) + head_flops(config, masked, queries))


def encoder_flops(config: ModelConfig, tokens: np.ndarray) -> np.ndarray:
    """FLOPs of the value MLP and the encoder in a forward pass over each cell, float64 [B]."""
    tokens = np.asarray(tokens, dtype=np.float64)
    width = config.width
    value_mlp = value_mlp_flops(config, tokens)
    if config.structure in ("cnn", "cnn_sorted"):
        return value_mlp + _cnn(config, tokens)
    if config.structure == "linear_mixer":
        return value_mlp + _linear_mixer(config, tokens)
    return value_mlp + config.layers * {
        "transformer": 12 * width**2 * tokens + 4 * width * tokens**2,
        "linear": 4 * width**2 * tokens,
        "gnn": (4 * FACTOR_WIDTH**2 + 2 * width**2) * tokens + (4 * FACTOR_WIDTH + 2 * width) * tokens**2,
        "mamba": _mamba_token(width) * tokens,
    }[config.structure]


def value_mlp_flops(config: ModelConfig, tokens: np.ndarray) -> np.ndarray:
    """FLOPs of the value MLP's second layer. (As a piecewise-linear function, in the Triton kernel, it needs none of them.)"""
    return 2 * config.width**2 * np.asarray(tokens, dtype=np.float64)


def head_flops(config: ModelConfig, masked: np.ndarray, queries: np.ndarray) -> np.ndarray:
    """FLOPs of the heads in a forward pass; arguments as in `training_flops`."""
    width = config.width
    regression = (4 * width**2 + 2 * width) * masked if config.regression else 0
    mvc = 6 * width**2 * queries + 2 * width * masked if config.mvc else 0
    return np.asarray(regression + mvc, dtype=np.float64)


def _cnn(config: ModelConfig, tokens: np.ndarray) -> np.ndarray:
    flops = np.zeros_like(tokens)
    for number in range(config.layers):
        tokens = tokens if number % 6 == 0 else np.ceil(tokens / 2)
        flops = flops + 2 * KERNEL * config.width**2 * tokens
    return flops


def _linear_mixer(config: ModelConfig, tokens: np.ndarray) -> np.ndarray:
    flops = np.zeros_like(tokens)
    positions = config.max_genes + 1
    for number in range(config.layers):
        positions = 1 if number == config.layers - 1 else max(1, positions // 2)
        flops = flops + 2 * config.width * positions * (tokens + config.width)  # channels are mixed at the new positions
        tokens = np.full_like(tokens, positions)
    return flops


def _mamba_token(width: int) -> int:
    channels, rank = EXPANSION * width, -(-width // 16)
    projections = 6 * width * channels + 2 * channels * (rank + 2 * STATES) + 2 * rank * channels
    return projections + channels * (2 * TAPS + SCAN * STATES)


def encoder_parameters(config: ModelConfig) -> int:
    """Parameters of the encoder; a graph encoder's gene tables do not count."""
    with torch.device("meta"):
        return count_parameters(ENCODERS[config.structure](config), lambda name: not name.endswith("table"))


def count_parameters(module: nn.Module, counted=lambda name: True) -> int:
    """Parameters of a module whose names `counted` takes."""
    return sum(parameter.numel() for name, parameter in module.named_parameters() if counted(name))
