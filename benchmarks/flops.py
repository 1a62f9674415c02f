"""The floating-point operations that a training step needs, and what MFU is."""

import numpy as np

FORMULA = """\
MFU = needed FLOPs / (peak x time), the same needed FLOPs for every implementation.
  forward, per token and layer:  8 d^2 (projections) + 4 d ff (feed-forward) + 4 L d (attention), L = tokens of its cell
  forward, heads:                4 d^2 + 2 d per masked gene (regression), 6 d^2 per distinct masked gene + 2 d per masked
                                 gene (MVC)
  step:                          3 x forward (the backward is counted as twice the forward)
  never counted:                 the gene table, the value MLP, padding, norms, dropout, the optimizer
Peak = the best bf16 matrix rate of the listed shapes on this machine, before or after the timed steps."""


def forward_flops(
    lengths: np.ndarray, masked: int, queries: int, *, width: int, feed_forward: int, layers: int
) -> tuple[int, int]:
    """FLOPs that a forward pass needs, a multiply-add counted as two: (encoder, heads).

    Parameters
    ----------
    lengths
        int [B], tokens of each cell, `<cls>` included.
    masked, queries
        Masked genes, and distinct ones among them.
    """
    lengths = np.asarray(lengths, dtype=np.int64)
    per_token = 8 * width**2 + 4 * width * feed_forward
    encoder = layers * (per_token * int(lengths.sum()) + 4 * width * int((lengths**2).sum()))
    heads = masked * (4 * width**2 + 2 * width) + queries * 6 * width**2 + masked * 2 * width
    return encoder, heads


def step_flops(lengths: np.ndarray, masked: int, queries: int, **shape: int) -> int:
    """FLOPs that a training step needs; arguments as in `forward_flops`."""
    return 3 * sum(forward_flops(lengths, masked, queries, **shape))
