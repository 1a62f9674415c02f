"""The operations of add_norm.py on a CPU in bf16 and fp32, each in one pass in C (add_norm_cpu.c).

The decisions of dropout are made again in the backward pass: nothing is saved but inputs (relu_dropout: its output, which the
layer behind keeps anyway).
"""

import ctypes
from functools import cache
from pathlib import Path

import torch
from torch import Tensor

from scbench.kernels import backend, random, threads

SOURCE = Path(__file__).with_name("add_norm_cpu.c")
CHUNK, WIDEST = 64, 16384  # the C file's


class _Job(ctypes.Structure):
    _fields_ = [
        *((name, ctypes.c_void_p) for name in ("x", "residual", "grad", "kept", "out", "grad_x", "grad_residual", "weight",
                                               "bias", "sums", "keys")),
        ("rows", ctypes.c_int64), ("width", ctypes.c_int64), ("scale", ctypes.c_float), ("eps", ctypes.c_float),
        ("threshold", ctypes.c_int32), ("bf16", ctypes.c_int32), ("taken", ctypes.c_int64),
    ]  # fmt: skip


@cache
def library() -> ctypes.CDLL | None:
    """The compiled code; None where there is no compiler."""
    found = backend.compiled(SOURCE)
    if found is not None:
        for function in (found.dropout, found.relu_dropout, found.relu_dropout_backward, found.norm, found.norm_backward,
                         found.norm_gelu, found.norm_gelu_backward, found.rms_norm, found.rms_norm_backward):
            function.argtypes, function.restype = [ctypes.c_void_p], None
    return found


def takes(x: Tensor) -> bool:
    """Whether this is the way for `x` [T, D]."""
    return (x.dtype in (torch.bfloat16, torch.float32) and x.shape[1] <= WIDEST and backend.use_native(x)
            and library() is not None)


def _run(
    name: str, shape: torch.Size, dtype: torch.dtype, probability: float, eps: float = 0.0, **tensors: Tensor | None
) -> None:
    """`tensors`: contiguous, by their names in the C file."""
    pointers = {key: None if x is None else x.data_ptr() for key, x in tensors.items()}
    # The scale undoes the probability that 16 bits can express, not the one asked for.
    job = _Job(rows=shape[0], width=shape[1], scale=65536 / (65536 - round(probability * 65536)), eps=eps,
               threshold=random.keep_threshold(probability), bf16=dtype == torch.bfloat16, **pointers)
    threads.run(getattr(library(), name), job)


class CpuDropout(torch.autograd.Function):
    """Dropout; the decisions are made again in the backward pass."""

    @staticmethod
    def forward(ctx, x: Tensor, token_keys: Tensor, probability: float) -> Tensor:
        x, token_keys, out = x.contiguous(), token_keys.contiguous(), torch.empty(x.shape, dtype=x.dtype)
        ctx.save_for_backward(token_keys)
        ctx.probability = probability
        _run("dropout", x.shape, x.dtype, probability, x=x, keys=token_keys, out=out)
        return out

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor, None, None]:
        (token_keys,), grad = ctx.saved_tensors, grad.contiguous()
        grad_x = torch.empty_like(grad)
        _run("dropout", grad.shape, grad.dtype, ctx.probability, x=grad, keys=token_keys, out=grad_x)
        return grad_x, None, None


class CpuReluDropout(torch.autograd.Function):
    """ReLU + dropout. Keeps its output."""

    @staticmethod
    def forward(ctx, x: Tensor, token_keys: Tensor, probability: float) -> Tensor:
        x, token_keys, out = x.contiguous(), token_keys.contiguous(), torch.empty(x.shape, dtype=x.dtype)
        _run("relu_dropout", x.shape, x.dtype, probability, x=x, keys=token_keys, out=out)
        ctx.save_for_backward(out)
        ctx.probability = probability
        return out

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor, None, None]:
        (out,), grad = ctx.saved_tensors, grad.contiguous()
        grad_x = torch.empty_like(grad)
        _run("relu_dropout_backward", grad.shape, grad.dtype, ctx.probability, kept=out, grad=grad, grad_x=grad_x)
        return grad_x, None, None


class CpuAddNorm(torch.autograd.Function):
    """Dropout + residual + LayerNorm. Keeps its inputs alone."""

    @staticmethod
    def forward(ctx, x, residual, weight, bias, token_keys, probability: float, eps: float) -> Tensor:
        x, residual, out = x.contiguous(), residual.contiguous(), torch.empty(x.shape, dtype=x.dtype)
        token_keys = None if token_keys is None else token_keys.contiguous()
        ctx.save_for_backward(x, residual, weight, token_keys)
        ctx.probability, ctx.eps = probability, eps
        _run("norm", x.shape, x.dtype, probability, eps, x=x, residual=residual, keys=token_keys,
             weight=weight.float().contiguous(), bias=bias.float().contiguous(), out=out)
        return out

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor | None, ...]:
        (x, residual, weight, token_keys), grad = ctx.saved_tensors, grad.contiguous()
        grad_residual = torch.empty_like(grad)
        grad_x = grad_residual if token_keys is None else torch.empty_like(grad)
        sums = torch.empty(-(-x.shape[0] // CHUNK), 2, x.shape[1])
        _run("norm_backward", x.shape, x.dtype, ctx.probability, ctx.eps, x=x, residual=residual, keys=token_keys,
             weight=weight.float().contiguous(), grad=grad, grad_x=grad_x, grad_residual=grad_residual, sums=sums)
        grad_weight, grad_bias = sums.sum(0).to(weight.dtype)
        return grad_x, grad_residual, grad_weight, grad_bias, None, None, None


class CpuNormGelu(torch.autograd.Function):
    """LayerNorm + GELU + dropout + residual. Keeps its inputs but the residual."""

    @staticmethod
    def forward(ctx, x, residual, weight, bias, token_keys, probability: float, eps: float) -> Tensor:
        x, residual, out = x.contiguous(), residual.contiguous(), torch.empty(x.shape, dtype=x.dtype)
        token_keys = None if token_keys is None else token_keys.contiguous()
        ctx.save_for_backward(x, weight, bias, token_keys)
        ctx.probability, ctx.eps = probability, eps
        _run("norm_gelu", x.shape, x.dtype, probability, eps, x=x, residual=residual, keys=token_keys,
             weight=weight.float().contiguous(), bias=bias.float().contiguous(), out=out)
        return out

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor | None, ...]:
        (x, weight, bias, token_keys), grad = ctx.saved_tensors, grad.contiguous()
        grad_x, sums = torch.empty_like(grad), torch.empty(-(-x.shape[0] // CHUNK), 2, x.shape[1])
        _run("norm_gelu_backward", x.shape, x.dtype, ctx.probability, ctx.eps, x=x, keys=token_keys, grad=grad, grad_x=grad_x,
             weight=weight.float().contiguous(), bias=bias.float().contiguous(), sums=sums)
        grad_weight, grad_bias = sums.sum(0).to(weight.dtype)
        return grad_x, grad, grad_weight, grad_bias, None, None, None


class CpuRmsNorm(torch.autograd.Function):
    """RMSNorm. Keeps its inputs alone."""

    @staticmethod
    def forward(ctx, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        x, out = x.contiguous(), torch.empty(x.shape, dtype=x.dtype)
        ctx.save_for_backward(x, weight)
        ctx.eps = eps
        _run("rms_norm", x.shape, x.dtype, 0.0, eps, x=x, weight=weight.float().contiguous(), out=out)
        return out

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor, Tensor, None]:
        (x, weight), grad = ctx.saved_tensors, grad.contiguous()
        grad_x, sums = torch.empty_like(grad), torch.empty(-(-x.shape[0] // CHUNK), x.shape[1])
        _run("rms_norm_backward", x.shape, x.dtype, 0.0, ctx.eps, x=x, weight=weight.float().contiguous(), grad=grad,
             grad_x=grad_x, sums=sums)
        return grad_x, sums.sum(0).to(weight.dtype), None
