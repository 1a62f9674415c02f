"""Causal convolution and SiLU on a CPU in C (causal_conv_cpu.c), for x in bf16 and fp32. Saves its inputs only."""

import ctypes
from functools import cache
from pathlib import Path

import torch
from torch import Tensor

from scbench.kernels import backend, threads

SOURCE = Path(__file__).with_name("causal_conv_cpu.c")
LANES = 16  # the C file's


class _Job(ctypes.Structure):
    _fields_ = [
        *((name, ctypes.c_void_p) for name in ("x", "grad", "out", "grad_x", "weight", "bias", "sums", "offsets")),
        *((name, ctypes.c_int64) for name in ("cells", "channels", "taps", "x_row")),
        ("scratch", ctypes.c_void_p), ("scratch_floats", ctypes.c_int64), ("bf16", ctypes.c_int32),
        ("threads", ctypes.c_int32), ("taken", ctypes.c_int64),
    ]  # fmt: skip


@cache
def library() -> ctypes.CDLL | None:
    """The compiled code; None where there is no compiler."""
    found = backend.compiled(SOURCE)
    if found is not None:
        for function in (found.forward, found.backward):
            function.argtypes, function.restype = [ctypes.c_void_p], None
    return found


def takes(x: Tensor, *parameters: Tensor) -> bool:
    """Whether this is the way for `x` [T, E] and the parameters."""
    double = any(parameter.dtype == torch.float64 for parameter in parameters)
    return x.dtype in (torch.bfloat16, torch.float32) and not double and backend.use_native(x) and library() is not None


def _run(function, x: Tensor, weight: Tensor, bias: Tensor, offsets: Tensor, **others: Tensor) -> None:
    """`x` with its columns side by side; `others` contiguous, by their names in the C file."""
    tensors = {"weight": weight.T.float().contiguous(), "bias": bias.float().contiguous(), "offsets": offsets, **others}
    channels, taps = weight.shape
    scratch_floats = taps * (channels + -channels % LANES)
    _memory, address = threads.scratch(4 * scratch_floats)  # held until this returns
    threads.run(function, _Job(
        x=x.data_ptr(), **{name: tensor.data_ptr() for name, tensor in tensors.items()}, cells=len(offsets) - 1,
        channels=channels, taps=taps, x_row=x.stride(0), bf16=x.dtype == torch.bfloat16, scratch=address,
        scratch_floats=scratch_floats,
    ))  # fmt: skip


class CpuCausalConvSilu(torch.autograd.Function):
    """As causal_conv.causal_conv_silu says."""

    @staticmethod
    def forward(ctx, x: Tensor, weight: Tensor, bias: Tensor, cell_offsets: Tensor) -> Tensor:
        x = threads.rows(x)
        ctx.save_for_backward(x, weight, bias)
        ctx.offsets = cell_offsets.long().contiguous()
        out = torch.empty(x.shape, dtype=x.dtype)
        _run(library().forward, x, weight, bias, ctx.offsets, out=out)
        return out

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor, Tensor, Tensor, None]:
        x, weight, bias = ctx.saved_tensors
        grad_x = torch.empty(x.shape, dtype=x.dtype)
        sums = torch.empty(len(ctx.offsets) - 1, weight.shape[1] + 1, weight.shape[0])
        _run(library().backward, x, weight, bias, ctx.offsets, grad=grad.contiguous(), grad_x=grad_x, sums=sums)
        total = sums.sum(0)
        return grad_x, total[:-1].T.to(weight.dtype), total[-1].to(bias.dtype), None
