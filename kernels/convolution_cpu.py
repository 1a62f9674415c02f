"""A convolution along the rows of cells, and their largest pairs, on a CPU in bf16 and fp32 (convolution_cpu.c).

oneDNN convolves rows as they lie, as pixels of images of height 1 with the channels last: torch's 1-D convolution would
transpose each of its tensors. The largest rows and their gradient are C, each in one pass, and so is the gradient of the
weights in bf16, where the processor has AVX-512 for it.
"""

import ctypes
from functools import cache
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional as F

from scbench.kernels import backend, threads

SOURCE = Path(__file__).with_name("convolution_cpu.c")
WIDEST, COLUMNS, ITEM_ROWS = 16384, 64, 264  # the C file's
SMALLEST_ITEM_ROWS = 66  # with fewer, packing costs more than a thread brings


class _Job(ctypes.Structure):
    _fields_ = [
        *((name, ctypes.c_void_p) for name in ("x", "grad", "out", "grad_bias", "lengths")),
        *((name, ctypes.c_int64) for name in ("cells", "rows", "out_rows", "width", "out_width", "stride", "taps",
                                               "item_rows")),
        ("bf16", ctypes.c_int32), ("threads", ctypes.c_int32), ("taken", ctypes.c_int64),
        ("scratch", ctypes.c_void_p), ("scratch_bytes", ctypes.c_int64),
    ]  # fmt: skip


@cache
def library() -> ctypes.CDLL | None:
    """The compiled code; None where there is no compiler."""
    found = backend.compiled(SOURCE)
    if found is not None:
        found.scratch_bytes.argtypes, found.scratch_bytes.restype = [ctypes.c_int64] * 2, ctypes.c_int64
        for function in (found.pool, found.pool_backward, found.weight_gradient):
            function.argtypes, function.restype = [ctypes.c_void_p], None
    return found


def takes(states: Tensor) -> bool:
    """Whether this is the way for `states` [B, S, D]."""
    return (states.dtype in (torch.bfloat16, torch.float32) and states.shape[2] <= WIDEST and states.numel() > 0
            and backend.use_native(states) and library() is not None)


def _run(name: str, states: Tensor, out_rows: int, stride: int, **fields) -> None:
    cells, rows, width = states.shape
    fields = {key: value.data_ptr() if isinstance(value, Tensor) else value for key, value in fields.items()}
    threads.run(getattr(library(), name), _Job(
        x=states.data_ptr(), cells=cells, rows=rows, out_rows=out_rows, width=width, stride=stride,
        bf16=states.dtype == torch.bfloat16, **fields,
    ))  # fmt: skip


def _images(rows: Tensor) -> Tensor:
    """[B, S, D] as images [B, D, 1, S] with the channels last."""
    return rows[:, None].permute(0, 3, 1, 2)


def _rows(images: Tensor) -> Tensor:
    """The inverse."""
    return images.permute(0, 2, 3, 1)[:, 0].contiguous()


def _weight_gradient(states: Tensor, weight: Tensor, grad: Tensor, stride: int) -> tuple[Tensor, Tensor]:
    """Gradients of the weight and the bias in C."""
    out_width, width, taps = weight.shape
    item_rows = ITEM_ROWS
    while item_rows > SMALLEST_ITEM_ROWS and -(-out_width // item_rows) * -(-width // COLUMNS) < threads.count():
        item_rows //= 2
    size = library().scratch_bytes(taps, stride)
    _memory, address = threads.scratch(size)  # held until this returns
    out, grad_bias = torch.empty(weight.shape, dtype=weight.dtype), torch.empty(weight.shape[0], dtype=weight.dtype)
    _run("weight_gradient", states, grad.shape[1], stride, grad=grad, out=out, grad_bias=grad_bias, out_width=out_width,
         taps=taps, item_rows=item_rows, scratch=address, scratch_bytes=size)
    return out, grad_bias


class CpuConvolutionPool(torch.autograd.Function):
    """Keeps its inputs but the bias."""

    @staticmethod
    def forward(ctx, states, weight, bias, lengths, stride: int) -> tuple[Tensor, Tensor]:
        states = states.contiguous()
        lengths = None if lengths is None else lengths.long().contiguous()
        ctx.save_for_backward(states, weight, lengths)
        ctx.stride = stride
        mixed = _rows(F.conv2d(_images(states), weight[:, :, None], bias, (1, stride), (0, weight.shape[2] // 2)))
        if stride == 1:
            return mixed, states.view_as(states)
        pooled = torch.empty(*mixed.shape[:2], states.shape[2], dtype=states.dtype)
        _run("pool", states, mixed.shape[1], stride, out=pooled, **({} if lengths is None else {"lengths": lengths}))
        return mixed, pooled

    @staticmethod
    def backward(ctx, grad_mixed: Tensor, grad_pooled: Tensor) -> tuple[Tensor | None, ...]:
        (states, weight, lengths), stride = ctx.saved_tensors, ctx.stride
        grad_mixed, grad_pooled = grad_mixed.contiguous(), grad_pooled.contiguous()
        in_c = states.dtype == torch.bfloat16 and library().scratch_bytes(1, 1) > 0
        (out_width, _, taps), wanted = weight.shape, [True, not in_c, not in_c]
        grad_x, grad_weight, grad_bias = torch.ops.aten.convolution_backward(
            _images(grad_mixed), _images(states), weight[:, :, None], [out_width], [1, stride], [0, taps // 2], [1, 1], False,
            [0, 0], 1, wanted,
        )  # fmt: skip
        if in_c:
            grad_weight, grad_bias = _weight_gradient(states, weight, grad_mixed, stride)
        else:
            grad_weight = grad_weight[:, :, 0]
        grad_x = _rows(grad_x)
        _run("pool_backward", states, grad_pooled.shape[1], stride, grad=grad_pooled, out=grad_x,
             **({} if lengths is None else {"lengths": lengths}))
        return grad_x, grad_weight, grad_bias, None, None
