"""Attention by cell in bf16 on a CPU, in C (attention_cpu.c): scores and probabilities of a block of queries at a time.

Scores, softmax and all sums are in fp32; what is multiplied is in bf16: the inputs, the probabilities and the scores'
gradients. Saves its inputs only: the backward pass computes the probabilities again. Needs a processor with AVX-512 for bf16
and a C compiler; elsewhere attention.py has PyTorch.
"""

import ctypes
from functools import cache
from pathlib import Path

import torch
from torch import Tensor

from scbench.kernels import backend, threads

SOURCE = Path(__file__).with_name("attention_cpu.c")


class _Tensor(ctypes.Structure):
    _fields_ = [("data", ctypes.c_void_p), ("row", ctypes.c_int64), ("head", ctypes.c_int64)]


class _Job(ctypes.Structure):
    _fields_ = [
        *((name, _Tensor) for name in ("query", "key", "value", "out", "grad", "grad_query", "grad_key", "grad_value")),
        *((name, ctypes.c_void_p) for name in ("starts", "stops", "key_stops")),
        *((name, ctypes.c_int64) for name in ("cells", "heads", "width", "value_width")),
        ("scale", ctypes.c_float), ("threads", ctypes.c_int32), ("taken", ctypes.c_int64),
        ("scratch", ctypes.c_void_p), ("scratch_bytes", ctypes.c_int64),
    ]


@cache
def library() -> ctypes.CDLL | None:
    """The compiled code; None where the processor has no bf16 instructions or there is no compiler."""
    found = backend.compiled(SOURCE)
    if found is None:
        return None
    found.scratch_bytes.argtypes, found.scratch_bytes.restype = [ctypes.c_int64] * 3, ctypes.c_int64
    for function in (found.forward, found.backward):
        function.argtypes, function.restype = [ctypes.c_void_p], None
    return found if found.scratch_bytes(1, 1, 1) else None


def takes(query: Tensor) -> bool:
    """Whether this is the way for `query` (without dropout)."""
    return query.dtype == torch.bfloat16 and backend.use_native(query) and library() is not None


def _strided(x: Tensor) -> _Tensor:
    return _Tensor(x.data_ptr(), x.stride(0), x.stride(1))


def _run(function, bounds: tuple[Tensor, ...], scale: float, **tensors: Tensor) -> None:
    """`bounds`: int64 [B] each, where the cells start and stop, and where the keys that are attended to stop."""
    (_, heads, width), value_width = tensors["query"].shape, tensors["value"].shape[2]
    longest = int((bounds[1] - bounds[0]).max()) if len(bounds[0]) else 0
    size = library().scratch_bytes(longest, width, value_width)
    _memory, address = threads.scratch(size)  # held until this returns
    job = _Job(
        **{name: _strided(x) for name, x in tensors.items()}, starts=bounds[0].data_ptr(), stops=bounds[1].data_ptr(),
        key_stops=bounds[2].data_ptr(), cells=len(bounds[0]), heads=heads, width=width, value_width=value_width, scale=scale,
        scratch=address, scratch_bytes=size,
    )  # fmt: skip
    threads.run(function, job)


def _bounds(cell_offsets: Tensor, key_lengths: Tensor | None) -> tuple[Tensor, ...]:
    starts, stops = cell_offsets[:-1].long().contiguous(), cell_offsets[1:].long().contiguous()
    key_stops = stops if key_lengths is None else starts + key_lengths
    return starts, stops, stops if torch.equal(key_stops, stops) else key_stops


def _gradients(x: Tensor, bounds: tuple[Tensor, ...]) -> Tensor:
    """Room for them: zeros if there are pads, which get none as keys and values."""
    return torch.empty(x.shape, dtype=x.dtype) if bounds[2] is bounds[1] else torch.zeros(x.shape, dtype=x.dtype)


class CpuAttention(torch.autograd.Function):
    """softmax(scale · query · keyᵀ) · value of each cell, as attention.attention says, without dropout. A tensor that is query
    and key gets one gradient for both."""

    @staticmethod
    def forward(
        ctx, query: Tensor, key: Tensor, value: Tensor, cell_offsets: Tensor, scale: float, key_lengths: Tensor | None
    ) -> Tensor:
        ctx.one = query is key
        query, key, value = (x if x.stride(2) == 1 else x.contiguous() for x in (query, key, value))
        ctx.bounds, ctx.scale = _bounds(cell_offsets, key_lengths), scale
        ctx.save_for_backward(query, key, value)
        out = value.new_empty(value.shape)
        _run(library().forward, ctx.bounds, scale, query=query, key=key, value=value, out=out)
        return out

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor | None, ...]:
        query, key, value = ctx.saved_tensors
        grad = grad if grad.stride(2) == 1 else grad.contiguous()
        grad_query, grad_value = _gradients(query, ctx.bounds), _gradients(value, ctx.bounds)
        grad_key = grad_query if ctx.one else _gradients(key, ctx.bounds)
        _run(library().backward, ctx.bounds, ctx.scale, query=query, key=key, value=value, grad=grad,
             grad_query=grad_query, grad_key=grad_key, grad_value=grad_value)  # fmt: skip
        return grad_query, None if ctx.one else grad_key, grad_value, None, None, None


class CpuSelfAttention(torch.autograd.Function):
    """The same of [T, 3, H, d], queries, keys and values side by side, with one gradient for the three."""

    @staticmethod
    def forward(ctx, projection: Tensor, cell_offsets: Tensor, scale: float, key_lengths: Tensor | None) -> Tensor:
        projection = projection.contiguous()
        ctx.bounds, ctx.scale = _bounds(cell_offsets, key_lengths), scale
        ctx.save_for_backward(projection)
        query, key, value = projection.unbind(1)
        out = torch.empty(value.shape, dtype=value.dtype)
        _run(library().forward, ctx.bounds, scale, query=query, key=key, value=value, out=out)
        return out

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor | None, ...]:
        (projection,) = ctx.saved_tensors
        grad = grad if grad.stride(2) == 1 else grad.contiguous()
        (query, key, value), grads = projection.unbind(1), _gradients(projection, ctx.bounds)
        _run(library().backward, ctx.bounds, ctx.scale, query=query, key=key, value=value, grad=grad,
             grad_query=grads[:, 0], grad_key=grads[:, 1], grad_value=grads[:, 2])  # fmt: skip
        return grads, None, None, None
