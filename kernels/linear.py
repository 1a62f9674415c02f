"""x · weightᵀ + bias, and weight · x; on a CPU oneDNN's product with the bias inside.

torch's own writes the bias first and adds the product to it: a pass more. And in fp32 it asks MKL, which leaves half of an AMD
processor unused.
"""

from functools import cache

import torch
from torch import Tensor
from torch.nn import functional as F

from scbench.kernels import backend
from scbench.kernels.checks import FLOATS, check

SMALLEST = 2**24  # multiplications that are worth a kernel compiled for the shape


@cache
def _has_product(dtype: torch.dtype) -> bool:
    """Whether torch has oneDNN's product for this processor."""
    if not torch.backends.mkldnn.is_available() or not hasattr(torch.ops.mkldnn, "_linear_pointwise"):
        return False
    return dtype == torch.float32 or (dtype == torch.bfloat16 and torch.ops.mkldnn._is_mkldnn_bf16_supported())


def _takes(x: Tensor, weight: Tensor) -> bool:
    return x.ndim > 1 and backend.use_native(x) and x.numel() * weight.shape[0] >= SMALLEST and _has_product(x.dtype)


def _product(x: Tensor, weight: Tensor, bias: Tensor | None = None, behind: str = "none") -> Tensor:
    return torch.ops.mkldnn._linear_pointwise(x, weight, bias, behind, [], "")


class _Linear(torch.autograd.Function):
    """Keeps x and the weight."""

    @staticmethod
    def forward(ctx, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(x, weight)
        return _product(x, weight, bias)

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        needs_x, needs_weight, needs_bias = ctx.needs_input_grad
        grad_x = grad_weight = None
        if needs_x:
            grad_x = _product(grad, weight.T) if x.dtype == torch.float32 else grad @ weight
        if needs_weight:
            grad_weight = _product(grad.T, x.T) if x.dtype == torch.float32 else grad.T @ x
        return grad_x, grad_weight, grad.sum(0) if needs_bias else None


class _LeftProduct(torch.autograd.Function):
    """weight · x, with x's gradient in the order of x in memory."""

    @staticmethod
    def forward(ctx, weight: Tensor, x: Tensor) -> Tensor:
        ctx.save_for_backward(weight, x)
        return _product(weight, x.T)

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor | None, ...]:
        weight, x = ctx.saved_tensors
        needs_weight, needs_x = ctx.needs_input_grad
        return _product(grad, x) if needs_weight else None, _product(weight.T, grad.T) if needs_x else None


def left_product(weight: Tensor, x: Tensor) -> Tensor:
    """A weight [E, S] times x [S, N]: [E, N], dtypes and errors as in `linear`."""
    if weight.ndim != 2 or x.ndim != 2 or weight.shape[1] != x.shape[0]:
        raise ValueError(f"weight and x must be [E, S] and [S, N], not {list(weight.shape)} and {list(x.shape)}")
    check(x.device, FLOATS, x=x)
    check(x.device, (x.dtype,), weight=weight)
    return _LeftProduct.apply(weight, x) if _takes(x.T, weight) else weight @ x


def _check(x: Tensor, weight: Tensor, bias: Tensor | None) -> None:
    if weight.ndim != 2 or x.shape[-1:] != weight.shape[1:] or (bias is not None and bias.shape != weight.shape[:1]):
        raise ValueError(f"x, weight and bias must be […, D], [E, D] and [E], not {list(x.shape)}, {list(weight.shape)} and "
                         f"{None if bias is None else list(bias.shape)}")
    check(x.device, FLOATS, x=x)
    check(x.device, (x.dtype,), weight=weight, **({} if bias is None else {"bias": bias}))


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """[…, D] states times the transpose of a weight [E, D], plus a bias [E]: […, E], all of one dtype, sums in fp32.

    ValueError for a shape, dtype or device that does not fit.
    """
    _check(x, weight, bias)
    if not _takes(x, weight):
        return F.linear(x, weight, bias)
    return _Linear.apply(x.flatten(0, -2), weight, bias).view(*x.shape[:-1], weight.shape[0])


def linear_relu(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """relu of `linear`; where there are no gradients oneDNN's product with the relu inside, a pass less."""
    if torch.is_grad_enabled() or not _takes(x, weight):
        return torch.relu(linear(x, weight, bias))
    _check(x, weight, bias)
    return _product(x.flatten(0, -2), weight, bias, "relu").view(*x.shape[:-1], weight.shape[0])
