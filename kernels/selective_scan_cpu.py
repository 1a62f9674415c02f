"""The selective scan on a CPU in C (selective_scan_cpu.c), for x in bf16 and fp32. Saves its inputs only."""

import ctypes
from functools import cache
from pathlib import Path

import torch
from torch import Tensor

from scbench.kernels import backend, threads

SOURCE = Path(__file__).with_name("selective_scan_cpu.c")
MOST_STATES = 16  # the C file's


class _Job(ctypes.Structure):
    _fields_ = [
        *((name, ctypes.c_void_p) for name in ("x", "grad", "out", "grad_x", "step", "decay", "b", "c", "skip", "grad_step",
                                               "grad_b", "grad_c", "sums", "offsets")),
        *((name, ctypes.c_int64) for name in ("cells", "channels", "states")),
        ("scratch", ctypes.c_void_p), ("scratch_floats", ctypes.c_int64), ("bf16", ctypes.c_int32),
        ("threads", ctypes.c_int32), ("taken", ctypes.c_int64),
    ]  # fmt: skip


@cache
def library() -> ctypes.CDLL | None:
    """The compiled code; None where there is no compiler."""
    found = backend.compiled(SOURCE)
    if found is not None:
        found.scratch_floats.argtypes, found.scratch_floats.restype = [ctypes.c_int64] * 2, ctypes.c_int64
        for function in (found.forward, found.backward):
            function.argtypes, function.restype = [ctypes.c_void_p], None
    return found


def takes(x: Tensor, *others: Tensor) -> bool:
    """Whether this is the way for `x`, `decay` and the other arguments."""
    double = any(other.dtype == torch.float64 for other in others)
    return (x.dtype in (torch.bfloat16, torch.float32) and not double and others[0].shape[1] <= MOST_STATES
            and backend.use_native(x) and library() is not None)


def _run(function, offsets: Tensor, scratch_floats: int, inputs: tuple[Tensor, ...], **others: Tensor) -> None:
    """`scratch_floats`: of each thread. `inputs`: x, step, decay, B, C and skip; `others` contiguous, by their names in the C
    file."""
    x, step, decay, b, c, skip = inputs
    tensors = {"step": step, "decay": decay.T, "b": b, "c": c, "skip": skip}
    tensors = {"x": x.contiguous(), **{name: tensor.float().contiguous() for name, tensor in tensors.items()}, **others}
    pointers = {name: tensor.data_ptr() for name, tensor in tensors.items()}
    _memory, address = threads.scratch(4 * scratch_floats)  # held until this returns
    threads.run(function, _Job(
        **pointers, offsets=offsets.data_ptr(), cells=len(offsets) - 1, channels=x.shape[1], states=decay.shape[1],
        bf16=x.dtype == torch.bfloat16, scratch=address, scratch_floats=scratch_floats,
    ))  # fmt: skip


class CpuSelectiveScan(torch.autograd.Function):
    """As selective_scan.selective_scan says."""

    @staticmethod
    def forward(ctx, x, step, decay, input_matrix, output_matrix, skip, cell_offsets) -> Tensor:
        inputs = x, step, decay, input_matrix, output_matrix, skip
        ctx.save_for_backward(*inputs)
        ctx.offsets = cell_offsets.long().contiguous()
        out = torch.empty(x.shape, dtype=x.dtype)
        _run(library().forward, ctx.offsets, 0, inputs, out=out)
        return out

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, step, decay, input_matrix, output_matrix, skip = ctx.saved_tensors
        (_, channels), states, offsets = x.shape, decay.shape[1], ctx.offsets
        grad_x = torch.empty(x.shape, dtype=x.dtype)
        grad_step, grad_b, grad_c = (torch.empty(rows.shape) for rows in (step, input_matrix, output_matrix))
        sums = torch.zeros(len(offsets) - 1, states + 1, channels)
        longest = int(offsets.diff().max()) if len(offsets) > 1 else 0
        size = library().scratch_floats(longest, states)
        _run(library().backward, offsets, size, ctx.saved_tensors, grad=grad.contiguous(), grad_x=grad_x,
             grad_step=grad_step, grad_b=grad_b, grad_c=grad_c, sums=sums)
        total = sums.sum(0)
        return (grad_x, grad_step.to(step.dtype), total[:-1].T.to(decay.dtype), grad_b.to(input_matrix.dtype),
                grad_c.to(output_matrix.dtype), total[-1].to(skip.dtype), None)
