"""The selective state-space scan of Mamba inside each cell of a packed batch."""

import math
from collections.abc import Iterator

import torch
from torch import Tensor
from torch.nn import functional as F

from scbench.kernels import backend, selective_scan_cpu
from scbench.kernels.checks import FLOATS, INDICES, check, check_offsets

if backend.HAS_TRITON:
    from scbench.kernels.selective_scan_triton import TritonSelectiveScan

CHUNK_PLACES = 8  # computed at once; for 32 cells and 512 channels 4 and 16 are slower (measured)
LOG2_E = math.log2(math.e)


def _chunks(cell_offsets: Tensor) -> Iterator[tuple[Tensor, list[int]]]:
    """All tokens, CHUNK_PLACES places at a time: (token numbers, place by place; how many cells have each place).

    The longest cell comes first, so that the cells with one more place are always the first rows: no padding.
    """
    lengths, cells = cell_offsets.diff().sort(descending=True, stable=True)
    starts = cell_offsets[:-1][cells]
    places = torch.arange(int(lengths[0]), device=lengths.device)[:, None]
    for tokens, exist in zip((starts + places).split(CHUNK_PLACES), (places < lengths).split(CHUNK_PLACES), strict=True):
        yield tokens[exist], exist.sum(1).tolist()


def _states(before: Tensor, u: Tensor, delta: Tensor, a: Tensor, b: Tensor, counts: list[int]) -> tuple[Tensor, Tensor]:
    """(exp(Δ A), h), each [R, N, E], of a chunk's R tokens; `before` [cells, N, E] is h at the place before the chunk."""
    factors = torch.mul(delta[:, None], a * LOG2_E).exp2_()  # torch's exp is four times as slow on some CPUs (measured)
    states = torch.mul(b[:, :, None], (delta * u)[:, None])
    previous = before
    for factor, state in zip(factors.split(counts), states.split(counts), strict=True):
        previous = state.addcmul_(factor, previous[: len(state)])
    return factors, states


class _SelectiveScan(torch.autograd.Function):
    """Place by place over all cells at once. Saves its inputs and the states at the chunks' borders; the backward
    computes the states between them again."""

    @staticmethod
    def forward(ctx, x, step, decay, input_matrix, output_matrix, skip, cell_offsets) -> Tensor:
        ctx.save_for_backward(x, step, decay, input_matrix, output_matrix, skip)
        dtype = torch.promote_types(x.dtype, torch.float32)
        a, d = decay.T.to(dtype).contiguous(), skip.to(dtype)  # [N, E]: channels side by side
        output = torch.empty_like(x, memory_format=torch.contiguous_format)
        last = a.new_zeros(len(cell_offsets) - 1, *a.shape)
        ctx.chunks = []
        for tokens, counts in _chunks(cell_offsets):
            before = last[: counts[0]].clone()  # a copy, so that the chunk's other states can go
            ctx.chunks.append((tokens, counts, before))
            u, delta, b, c = (rows.index_select(0, tokens).to(dtype) for rows in (x, step, input_matrix, output_matrix))
            _, states = _states(before, u, delta, a, b, counts)
            y = torch.bmm(c[:, None], states)[:, 0].addcmul_(u, d)
            output.index_copy_(0, tokens, y.to(output.dtype))
            last = states[-counts[-1] :]
        return output

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, step, decay, input_matrix, output_matrix, skip = ctx.saved_tensors
        dtype = torch.promote_types(x.dtype, torch.float32)
        a, d = decay.T.to(dtype).contiguous(), skip.to(dtype)
        of_tokens = (x, step, input_matrix, output_matrix)
        grads = [torch.empty_like(rows, memory_format=torch.contiguous_format) for rows in of_tokens]
        grad_a, grad_d = torch.zeros_like(a), torch.zeros_like(d)
        carried = a.new_zeros(0, *a.shape)  # what the place after hands back to h
        for tokens, counts, before in reversed(ctx.chunks):
            u, delta, b, c, g = (rows.index_select(0, tokens).to(dtype) for rows in (*of_tokens, grad))
            factors, states = _states(before, u, delta, a, b, counts)
            grad_c = (states * g[:, None]).sum(2)
            grad_states = torch.mul(c[:, :, None], g[:, None])
            splits = [rows.split(counts) for rows in (factors, states, grad_states)]
            places = list(zip(*splits, (before, *splits[1][:-1]), strict=True))
            for factor, state, grad_state, previous in reversed(places):
                grad_state[: len(carried)] += carried
                carried = factor.mul_(grad_state)
                torch.mul(carried, previous[: len(state)], out=state)
            grad_exponents = states  # of Δ A: the loop has left them there
            grad_inputs = torch.bmm(b[:, None], grad_states)[:, 0]  # of Δ u
            chunk_grads = (
                torch.addcmul(g * d, grad_inputs, delta),
                (grad_exponents * a).sum(1).addcmul_(grad_inputs, u),
                (grad_states * (delta * u)[:, None]).sum(2),
                grad_c,
            )
            for whole, part in zip(grads, chunk_grads, strict=True):
                whole.index_copy_(0, tokens, part.to(whole.dtype))
            grad_a += (grad_exponents * delta[:, None]).sum(0)
            grad_d += (g * u).sum(0)
        grad_x, grad_step, grad_b, grad_c = grads
        return grad_x, grad_step, grad_a.T.to(decay.dtype), grad_b, grad_c, grad_d.to(skip.dtype), None


def _check(x, step, decay, input_matrix, output_matrix, skip, cell_offsets) -> None:
    if x.ndim != 2 or step.shape != x.shape:
        raise ValueError(f"x and step must be one [T, E], not {list(x.shape)} and {list(step.shape)}")
    tokens, channels = x.shape
    states = decay.shape[-1] if decay.ndim else 0
    if decay.shape != (channels, states) or states == 0 or skip.shape != (channels,):
        raise ValueError(f"decay and skip must be [{channels}, N > 0] and [{channels}], not {list(decay.shape)} and "
                         f"{list(skip.shape)}")
    if not input_matrix.shape == output_matrix.shape == (tokens, states):
        raise ValueError(f"input_matrix and output_matrix must be [{tokens}, {states}], not {list(input_matrix.shape)} and "
                         f"{list(output_matrix.shape)}")
    floats = {"step": step, "decay": decay, "input_matrix": input_matrix, "output_matrix": output_matrix, "skip": skip}
    check(x.device, FLOATS, x=x, **floats)
    check(x.device, INDICES, cell_offsets=cell_offsets)
    check_offsets(cell_offsets, tokens)


def selective_scan(
    x: Tensor, step: Tensor, decay: Tensor, input_matrix: Tensor, output_matrix: Tensor, skip: Tensor, cell_offsets: Tensor
) -> Tensor:
    """h_t = exp(Δ_t A) h_(t−1) + Δ_t B_t u_t and y_t = C_t · h_t + D u_t along each cell, from h = 0 at its first token.

    Source: Gu and Dao, "Mamba: Linear-Time Sequence Modeling with Selective State Spaces" (arXiv 2312.00752), equations
    2 to 4 and algorithm 2, with B discretised as Δ B, as in the paper's code. In fp32 (fp64 for fp64 inputs).

    Bytes that must move, b a number of `x` and 4 a number of `step`: forward T E (2 b + 4) + 2 T N b, each input in and y
    out; backward T E (3 b + 8) + 4 T N b, the inputs and y's gradient in, their gradients out; and the parameters. The Triton
    kernels move besides the saved states, 4 N / 16 bytes a number of `x` in each direction, and the parts of the gradients
    of B and C, 8 N E / 128 bytes a token written and read. For bf16, N = 4 and E = 512 that is 1.12 times as much each way.

    Parameters
    ----------
    x
        [T, E], the paper's u: E channels, which do not mix.
    step
        [T, E], Δ, positive.
    decay
        [E, N], A, negative: N states a channel.
    input_matrix, output_matrix
        [T, N] each, B and C, shared by the channels.
    skip
        [E], D.
    cell_offsets
        int32 [B+1], where each cell's tokens start; the last is T.

    Returns
    -------
    [T, E] in the dtype of `x`. Memory kept for the gradients: the inputs and N / 8 of the size of `x` in fp32 (N / 16 by the
    Triton kernels for N ≤ 4; none of that by the C code on a CPU, selective_scan_cpu.py).
    """
    inputs = (x, step, decay, input_matrix, output_matrix, skip, cell_offsets)
    _check(*inputs)
    if backend.use_triton(x):
        return TritonSelectiveScan.apply(*inputs, torch.is_grad_enabled() and any(v.requires_grad for v in inputs))
    if selective_scan_cpu.takes(x, decay, step, input_matrix, output_matrix, skip):
        return selective_scan_cpu.CpuSelectiveScan.apply(x, step, None, *inputs[2:-1], None, cell_offsets)
    return _SelectiveScan.apply(*inputs)


def gated_selective_scan(
    x: Tensor, step: Tensor, step_bias: Tensor, decay: Tensor, input_matrix: Tensor, output_matrix: Tensor, skip: Tensor,
    gate: Tensor, cell_offsets: Tensor,
) -> Tensor:
    """selective_scan with the steps softplus(step + step_bias), times SiLU(gate): what is around it in a Mamba block.

    On a CPU one pass, rounded once; steps in fp32 everywhere, as in bf16 the bias would drown what a token adds to it.

    Parameters
    ----------
    step, gate
        [T, E], any numbers.
    step_bias
        [E].

    The others and what is returned are as in `selective_scan`.
    """
    if gate.shape != x.shape or step_bias.shape != x.shape[1:]:
        raise ValueError(f"gate and step_bias must be {list(x.shape)} and {list(x.shape[1:])}, not {list(gate.shape)} and "
                         f"{list(step_bias.shape)}")
    check(x.device, FLOATS, x=x, gate=gate, step_bias=step_bias)
    inputs = (x, step, decay, input_matrix, output_matrix, skip, cell_offsets)
    _check(*inputs)
    if x.dtype == step.dtype == gate.dtype and selective_scan_cpu.takes(x, *inputs[2:-1], step_bias):
        return selective_scan_cpu.CpuSelectiveScan.apply(x, step, step_bias, *inputs[2:-1], gate, cell_offsets)
    positive = F.softplus(step.to(torch.promote_types(step.dtype, torch.float32)) + step_bias)
    return selective_scan(x, positive, *inputs[2:]) * F.silu(gate)


def selective_scan_oracle(x, step, decay, input_matrix, output_matrix, skip, cell_offsets) -> Tensor:
    """The same by the definition, one token of one cell after the other."""
    rows = []
    for start, stop in zip(cell_offsets.tolist(), cell_offsets.tolist()[1:], strict=False):
        state = torch.zeros_like(decay)
        for t in range(start, stop):
            state = torch.exp(step[t, :, None] * decay) * state + (step[t] * x[t])[:, None] * input_matrix[t]
            rows.append(state @ output_matrix[t] + skip * x[t])
    return torch.stack(rows)
