"""The regression head's last layer and its squared error at masked tokens."""

import torch
from torch import Tensor


def masked_regression(hidden: Tensor, weight: Tensor, bias: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """Predict one value a masked token and add up the squared errors, in fp32.

    Parameters
    ----------
    hidden
        [M, D], the head's hidden states at masked tokens.
    weight, bias
        [1, D] and [1].
    targets
        float32 [M].

    Returns
    -------
    (sum over tokens of (prediction − target)², a scalar; predictions [M]), float32 (float64 for float64 inputs).
    With M = 0 the sum is 0 and still has a graph.
    """
    if hidden.ndim != 2 or weight.shape != (1, hidden.shape[1]) or targets.shape != hidden.shape[:1]:
        raise ValueError(f"hidden, weight and targets must be [M, D], [1, D] and [M], not {list(hidden.shape)}, "
                         f"{list(weight.shape)} and {list(targets.shape)}")
    dtype = torch.promote_types(hidden.dtype, torch.float32)
    predictions = hidden.to(dtype) @ weight[0].to(dtype) + bias.to(dtype)
    return (predictions - targets).square().sum(), predictions


def masked_regression_oracle(hidden: Tensor, weight: Tensor, bias: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """The same by the definition, token by token."""
    predictions = torch.stack([(row * weight[0]).sum() + bias[0] for row in hidden]) if len(hidden) else hidden.sum(1)
    return sum(((p - t) ** 2 for p, t in zip(predictions, targets, strict=True)), hidden.sum() * 0), predictions
