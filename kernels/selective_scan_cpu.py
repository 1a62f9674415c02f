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
        *((name, ctypes.c_void_p) for name in ("x", "grad", "step", "gate", "out", "grad_x", "grad_step", "grad_gate",
                                               "step_bias", "decay", "b", "c", "skip", "grad_b", "grad_c", "sums", "offsets")),
        *((name, ctypes.c_int64) for name in ("cells", "channels", "states", "gate_row")),
        ("scratch", ctypes.c_void_p), ("scratch_vectors", ctypes.c_int64), ("bf16", ctypes.c_int32),
        ("threads", ctypes.c_int32), ("taken", ctypes.c_int64),
    ]  # fmt: skip


@cache
def library() -> ctypes.CDLL | None:
    """The compiled code; None where there is no compiler."""
    found = backend.compiled(SOURCE)
    if found is not None:
        found.scratch_vectors.argtypes, found.scratch_vectors.restype = [ctypes.c_int64] * 2, ctypes.c_int64
        for function in (found.forward, found.backward):
            function.argtypes, function.restype = [ctypes.c_void_p], None
    return found


def takes(x: Tensor, *others: Tensor) -> bool:
    """Whether this is the way for `x`, `decay` and the other arguments."""
    double = any(other.dtype == torch.float64 for other in others)
    return (x.dtype in (torch.bfloat16, torch.float32) and not double and others[0].shape[1] <= MOST_STATES
            and backend.use_native(x) and library() is not None)


def _run(function, offsets: Tensor, scratch_vectors: int, inputs: tuple[Tensor | None, ...], **others: Tensor) -> None:
    """`scratch_vectors`: of each thread. `inputs`: CpuSelectiveScan's; `others` contiguous, by their names in the C file."""
    x, step, step_bias, decay, b, c, skip, gate = inputs
    tensors = {"decay": decay.T, "b": b, "c": c, "skip": skip}
    if step_bias is None:
        step = step.float()
    else:
        tensors["step_bias"] = step_bias
    tensors = {name: tensor.float().contiguous() for name, tensor in tensors.items()}
    tensors |= {"x": x.contiguous(), "step": step.contiguous(), **others}
    if gate is not None:
        tensors["gate"] = gate
    _memory, address = threads.scratch(64 * scratch_vectors)  # held until this returns
    threads.run(function, _Job(
        **{name: tensor.data_ptr() for name, tensor in tensors.items()}, offsets=offsets.data_ptr(), cells=len(offsets) - 1,
        channels=x.shape[1], states=decay.shape[1], gate_row=0 if gate is None else gate.stride(0),
        bf16=x.dtype == torch.bfloat16, scratch=address, scratch_vectors=scratch_vectors,
    ))  # fmt: skip


class CpuSelectiveScan(torch.autograd.Function):
    """As selective_scan.gated_selective_scan says; without `step_bias` and `gate`, as selective_scan does."""

    @staticmethod
    def forward(ctx, x, step, step_bias, decay, input_matrix, output_matrix, skip, gate, cell_offsets) -> Tensor:
        gate = None if gate is None else threads.rows(gate)
        inputs = x, step, step_bias, decay, input_matrix, output_matrix, skip, gate
        ctx.save_for_backward(*inputs)
        ctx.offsets = cell_offsets.long().contiguous()
        out = torch.empty(x.shape, dtype=x.dtype)
        _run(library().forward, ctx.offsets, 0, inputs, out=out)
        return out

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, step, step_bias, decay, input_matrix, output_matrix, skip, gate = ctx.saved_tensors
        (_, channels), states, offsets = x.shape, decay.shape[1], ctx.offsets
        grad_x, grad_gate = torch.empty(x.shape, dtype=x.dtype), None
        grad_step = torch.empty(step.shape, dtype=torch.float32 if step_bias is None else x.dtype)
        grad_b, grad_c = (torch.empty(rows.shape) for rows in (input_matrix, output_matrix))
        sums = torch.empty(len(offsets) - 1, states + 2, channels)
        others = {"grad_step": grad_step, "grad_b": grad_b, "grad_c": grad_c, "sums": sums}
        if gate is not None:
            others["grad_gate"] = grad_gate = torch.empty(x.shape, dtype=x.dtype)
        longest = int(offsets.diff().max()) if len(offsets) > 1 else 0
        size = library().scratch_vectors(longest, states)
        _run(library().backward, offsets, size, ctx.saved_tensors, grad=grad.contiguous(), grad_x=grad_x, **others)
        total = sums.sum(0)
        grad_bias = None if step_bias is None else total[-1].to(step_bias.dtype)
        return (grad_x, grad_step.to(step.dtype), grad_bias, total[:-2].T.to(decay.dtype), grad_b.to(input_matrix.dtype),
                grad_c.to(output_matrix.dtype), total[-2].to(skip.dtype), grad_gate, None)
