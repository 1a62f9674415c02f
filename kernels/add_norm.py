"""Dropout from the shared generator, fused by name with what surrounds it: residual + LayerNorm, and ReLU."""

import torch
from torch import Tensor
from torch.nn import functional as F

from scbench.kernels import random


class _Dropout(torch.autograd.Function):
    """x · keep / (1 − p); the decisions depend on the token's key and the column alone."""

    @staticmethod
    def forward(ctx, x: Tensor, token_keys: Tensor, probability: float) -> Tensor:
        dropped = random.keep_torch(token_keys, x.shape[1], probability).logical_not_()
        # The scale undoes the probability that 16 bits can express, not the one asked for.
        ctx.scale = 65536 / (65536 - round(probability * 65536))
        ctx.save_for_backward(dropped)
        return (x * ctx.scale).masked_fill_(dropped, 0)

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor, None, None]:
        (dropped,) = ctx.saved_tensors
        return (grad * ctx.scale).masked_fill_(dropped, 0), None, None


def dropout(x: Tensor, token_keys: Tensor | None, probability: float) -> Tensor:
    """Dropout of [T, D] states; `token_keys` int64 [T], one a token and site, or None for none (evaluation)."""
    if token_keys is None or probability == 0:
        return x
    if token_keys.shape != x.shape[:1]:
        raise ValueError(f"token_keys must have one element a token: {list(token_keys.shape)} for {list(x.shape)}")
    return _Dropout.apply(x, token_keys, probability)


def add_norm(
    x: Tensor, residual: Tensor, weight: Tensor, bias: Tensor, token_keys: Tensor | None, probability: float, eps: float = 1e-5
) -> Tensor:
    """LayerNorm(residual + dropout(x)): x, residual [T, D]; weight, bias [D]; statistics in fp32."""
    return F.layer_norm(residual + dropout(x, token_keys, probability), weight.shape, weight, bias, eps)


def relu_dropout(x: Tensor, token_keys: Tensor | None, probability: float) -> Tensor:
    """dropout(relu(x)) of [T, D] states."""
    return dropout(torch.relu(x), token_keys, probability)


def dropout_oracle(x: Tensor, token_keys: Tensor, probability: float) -> Tensor:
    """Dropout by the definition, one 16-bit lane of one word at a time, in Python integers."""
    drop_below = round(probability * 65536)
    rows = []
    for token_key, row in zip(token_keys.tolist(), x, strict=True):
        lanes = [random.fold(token_key % 2**64, c // 4) >> 16 * (c % 4) & 0xFFFF for c in range(len(row))]
        keep = torch.tensor([(lane ^ 0x8000) >= drop_below for lane in lanes], dtype=x.dtype)  # read as signed
        rows.append(row * keep * 65536 / (65536 - drop_below))
    return torch.stack(rows)
