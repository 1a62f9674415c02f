"""The floating-point operations that a step needs, and what MFU is.

Counted, a multiply-add as two, from the shapes (d: width, L: a cell's tokens): a linear map of n positions costs
2 n d_in d_out; attention of a cell costs L² products of rows twice, scores and mixing, so 2 L² (d_key + d_value); a
convolution of k taps costs 2 k d² for every position that it gives; Mamba's scan is what one step of its recurrence takes. A
backward pass needs each product twice more, once for each operand's gradient.
"""

import numpy as np

from scbench.config import ModelConfig
from scbench.models.flops import BACKWARD, encoder_flops, head_flops, value_mlp_flops

ENCODERS = {
    "transformer": "8 d^2 (projections) + 4 d^2 (feed-forward) + 4 L d (attention) per token and layer, L = its cell's tokens",
    "cnn": "2 x 9 d^2 (convolution) per position that a layer gives: L in layer 0; half as many in each layer but 6, 12, ...",
    "linear": "4 d^2 per token and layer",
    "linear_mixer": "2 S' d (S + d) per layer, which mixes S positions to S' = half of them (at last 1), then their channels",
    "mamba": "2 x 3 d E (projections) + 2 E (r + 2 N) + 2 r E (step) + 2 x 4 E (convolution) + 9 N E (scan) per token and "
             "layer, E = 2 d, N = 4, r = d / 16",
    "gnn": "4 x 64^2 (factors) + 2 d^2 + L (4 x 64 + 2 d) (graph) per token and layer",
}
ENCODERS["cnn_sorted"] = ENCODERS["cnn"]
HEADS = """\
  heads:          4 d^2 + 2 d per masked gene (regression; not where a structure ends in one state a cell),
                  6 d^2 per distinct masked gene of the step + 2 d per masked gene (MVC)
  training step:  3 x forward (the backward is counted as twice the forward)
  never counted:  the gene table, the value MLP, padding, norms, dropout, the optimizer
Peak = the best bf16 matrix rate of the listed shapes on this machine, before or after the timed steps."""


def formula(structures: list[str]) -> str:
    """What MFU is, in words."""
    lines = ["MFU = needed FLOPs / (peak x time), the same needed FLOPs for every implementation. Forward:"]
    lines += [f"  {structure + ':':15} {ENCODERS[structure]}" for structure in dict.fromkeys(structures)]
    return "\n".join([*lines, HEADS])


def forward_flops(config: ModelConfig, lengths: np.ndarray, masked: int, queries: int) -> tuple[int, int]:
    """FLOPs that a forward pass needs: (encoder, heads), without the value MLP.

    Parameters
    ----------
    lengths
        int [B], tokens of each cell, `<cls>` included.
    masked, queries
        Masked genes, and distinct ones among them.
    """
    encoder = (encoder_flops(config, lengths) - value_mlp_flops(config, lengths)).sum()
    return int(encoder), int(head_flops(config, masked, queries))


def step_flops(config: ModelConfig, lengths: np.ndarray, masked: int, queries: int) -> int:
    """FLOPs that a training step needs; arguments as in `forward_flops`."""
    return (1 + BACKWARD) * sum(forward_flops(config, lengths, masked, queries))
