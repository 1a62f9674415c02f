"""The floating-point operations that a training step needs, and what MFU is."""

import numpy as np

from scbench.config import ModelConfig
from scbench.models.flops import encoder_flops, head_flops, value_mlp_flops

FORMULA = """\
MFU = needed FLOPs / (peak x time), the same needed FLOPs for every implementation.
  forward, per token and layer:  8 d^2 (projections) + 4 d^2 (feed-forward) + 4 L d (attention), L = tokens of its cell
  forward, heads:                4 d^2 + 2 d per masked gene (regression), 6 d^2 per distinct masked gene + 2 d per masked
                                 gene (MVC)
  step:                          3 x forward (the backward is counted as twice the forward)
  never counted:                 the gene table, the value MLP, padding, norms, dropout, the optimizer
Peak = the best bf16 matrix rate of the listed shapes on this machine, before or after the timed steps."""


def forward_flops(lengths: np.ndarray, masked: int, queries: int, *, width: int, layers: int) -> tuple[int, int]:
    """FLOPs that a transformer's forward pass needs, a multiply-add counted as two: (encoder, heads). By the formula of
    scbench/models/flops.py, without the value MLP.

    Parameters
    ----------
    lengths
        int [B], tokens of each cell, `<cls>` included.
    masked, queries
        Masked genes, and distinct ones among them.
    """
    shape = ModelConfig(vocabulary_size=1, width=width, layers=layers, heads=1)
    encoder = (encoder_flops(shape, lengths) - value_mlp_flops(shape, lengths)).sum()
    return int(encoder), int(head_flops(shape, masked, queries))


def step_flops(lengths: np.ndarray, masked: int, queries: int, **shape: int) -> int:
    """FLOPs that a training step needs; arguments as in `forward_flops`."""
    return 3 * sum(forward_flops(lengths, masked, queries, **shape))
