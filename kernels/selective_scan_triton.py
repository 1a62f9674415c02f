"""Triton kernels of kernels/selective_scan.py: one program walks one cell's tokens for one block of channels.

Layout. A program holds h as a tile [channels, N], a lane a channel: sums over the N states stay inside a lane, and what is
[E, N] in memory moves 16 bytes a lane. It takes some tokens at a time, unrolled, their loads first, so that the latencies
overlap; a row is 2 or 4 bytes a lane, whole sectors a warp. A token loop, not tl.associative_scan: cells times channels fill
a GPU, a loop computes and moves least, and an associative scan would hold (factor, input) pairs of all its tokens at once.

Saved states. The forward saves h before every `chunk` tokens of a cell, but for the first; the backward walks each chunk
twice, forwards to compute its states again into registers, then backwards. What is saved before token t goes to slot
t // chunk − 1: two such t of one cell differ by a multiple of `chunk`; of two cells by more than `chunk`, since a cell's first
chunk saves nothing. So no two programs share a slot, and (T − 1) // chunk slots are enough, without a count of chunks.

Races. The rows of y and of the gradients of x and step belong to one program each. All channel blocks add to the gradients of
B and C, all cells to those of A and D: each program stores its part in a place of its own, and torch.sum adds the parts in
a fixed order. No atomics: two runs are bit-identical.

Tile. 128 channels (the next power of 2, 32 at least, where there are fewer), one a lane: wide blocks leave few parts of the
gradients of B and C. chunk = min(16, 64 / N): the backward holds 64 states a lane beside x, Δ and the gradient of a chunk. For
N = 4 in bf16 it needs 192 (sm_90) to 224 (sm_80) registers; the compiler takes what there is, up to 255, and spills none.
"""

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from scbench.kernels.row_tiles import triton_accumulator

WIDEST_BLOCK = 128
STATES_IN_REGISTERS = 64  # of a lane in the backward: with 128 it would spill
LONGEST_CHUNK = 16
FORWARD_TOKENS = 8  # at a time
_LOG2_E, _LN_2 = tl.constexpr(math.log2(math.e)), tl.constexpr(math.log(2))


@triton.jit
def _forward_kernel(
    x, step, decay, input_matrix, output_matrix, skip, cell_offsets, y, boundaries,
    channels: tl.constexpr,
    x_row: tl.constexpr, x_column: tl.constexpr, step_row: tl.constexpr, step_column: tl.constexpr,
    decay_row: tl.constexpr, decay_column: tl.constexpr, b_row: tl.constexpr, b_column: tl.constexpr,
    c_row: tl.constexpr, c_column: tl.constexpr, skip_stride: tl.constexpr,
    CHUNK: tl.constexpr, STATES: tl.constexpr, PADDED: tl.constexpr, BLOCK: tl.constexpr, ACC: tl.constexpr,
    UNROLL: tl.constexpr, SAVE: tl.constexpr,
):  # fmt: skip
    cell = tl.program_id(0).to(tl.int64)
    channel = tl.program_id(1).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    state_number = tl.arange(0, PADDED)
    m_channel, m_state = channel < channels, state_number < STATES
    m_tile = m_channel[:, None] & m_state[None, :]
    start = tl.load(cell_offsets + cell).to(tl.int64)
    stop = tl.load(cell_offsets + cell + 1).to(tl.int64)
    p_a = decay + channel[:, None] * decay_row + state_number[None, :] * decay_column
    a = tl.load(p_a, mask=m_tile, other=0).to(ACC) * _LOG2_E
    d = tl.load(skip + channel * skip_stride, mask=m_channel, other=0).to(ACC)
    p_x, p_step, p_y = x + channel * x_column, step + channel * step_column, y + channel
    p_b, p_c = input_matrix + state_number * b_column, output_matrix + state_number * c_column
    p_boundary = boundaries + channel[:, None] * STATES + state_number[None, :]

    state = tl.zeros([BLOCK, PADDED], ACC)
    for first in range(start, stop, UNROLL):
        if SAVE:
            slot = first // CHUNK - 1
            m_save = (first > start) & ((first - start) % CHUNK == 0)
            tl.store(p_boundary + slot * channels * STATES, state, mask=m_tile & m_save)
        left = (stop - first).to(tl.int32)
        us, deltas, bs, cs = (), (), (), ()
        for i in tl.static_range(UNROLL):
            m = i < left  # places past the end have Δ = 0 and change nothing
            us += (tl.load(p_x + first * x_row + i * x_row, mask=m & m_channel, other=0).to(ACC),)
            deltas += (tl.load(p_step + first * step_row + i * step_row, mask=m & m_channel, other=0).to(ACC),)
            bs += (tl.load(p_b + first * b_row + i * b_row, mask=m & m_state, other=0).to(ACC),)
            cs += (tl.load(p_c + first * c_row + i * c_row, mask=m & m_state, other=0).to(ACC),)
        for i in tl.static_range(UNROLL):
            state = tl.exp2(deltas[i][:, None] * a) * state + (deltas[i] * us[i])[:, None] * bs[i][None, :]
            out = tl.sum(state * cs[i][None, :], axis=1) + d * us[i]
            tl.store(p_y + first * channels + i * channels, out.to(y.dtype.element_ty), mask=m_channel & (i < left))


@triton.jit
def _backward_kernel(
    x, step, decay, input_matrix, output_matrix, skip, cell_offsets, boundaries, grad,
    grad_x, grad_step, matrix_parts, decay_parts, skip_parts,
    tokens, channels: tl.constexpr,
    x_row: tl.constexpr, x_column: tl.constexpr, step_row: tl.constexpr, step_column: tl.constexpr,
    decay_row: tl.constexpr, decay_column: tl.constexpr, b_row: tl.constexpr, b_column: tl.constexpr,
    c_row: tl.constexpr, c_column: tl.constexpr, skip_stride: tl.constexpr,
    grad_row: tl.constexpr, grad_column: tl.constexpr,
    CHUNK: tl.constexpr, STATES: tl.constexpr, PADDED: tl.constexpr, BLOCK: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    cell = tl.program_id(0).to(tl.int64)
    block = tl.program_id(1).to(tl.int64)
    channel = block * BLOCK + tl.arange(0, BLOCK)
    state_number = tl.arange(0, PADDED)
    m_channel, m_state = channel < channels, state_number < STATES
    m_tile = m_channel[:, None] & m_state[None, :]
    start = tl.load(cell_offsets + cell).to(tl.int64)
    stop = tl.load(cell_offsets + cell + 1).to(tl.int64)
    p_a = decay + channel[:, None] * decay_row + state_number[None, :] * decay_column
    d = tl.load(skip + channel * skip_stride, mask=m_channel, other=0).to(ACC)
    p_x, p_step, p_grad = x + channel * x_column, step + channel * step_column, grad + channel * grad_column
    p_grad_x, p_grad_step = grad_x + channel, grad_step + channel
    p_b, p_c = input_matrix + state_number * b_column, output_matrix + state_number * c_column
    p_boundary = boundaries + channel[:, None] * STATES + state_number[None, :]
    # The parts of B and C, two tokens at a time: [PADDED, 2 matrices, 2 tokens]
    matrix, later_token = tl.arange(0, 2)[None, :, None], tl.arange(0, 2)[None, None, :]
    p_matrix = matrix_parts + ((block * tokens + later_token) * 2 + matrix) * STATES + state_number[:, None, None]

    carried = tl.zeros([BLOCK, PADDED], ACC)  # what the token after hands back to h
    grad_a, grad_d = tl.zeros([BLOCK, PADDED], ACC), tl.zeros([BLOCK], ACC)
    chunks = tl.cdiv(stop - start, CHUNK)
    for done in range(chunks):
        chunk = chunks - 1 - done
        first = start + chunk * CHUNK
        left = (stop - first).to(tl.int32)
        slot = first // CHUNK - 1
        before = tl.load(p_boundary + slot * channels * STATES, mask=m_tile & (chunk > 0), other=0)
        a = tl.load(p_a, mask=m_tile, other=0).to(ACC) * _LOG2_E
        us, deltas, gs, hs = (), (), (), (before,)
        for i in tl.static_range(CHUNK):
            m = i < left
            us += (tl.load(p_x + first * x_row + i * x_row, mask=m & m_channel, other=0).to(ACC),)
            deltas += (tl.load(p_step + first * step_row + i * step_row, mask=m & m_channel, other=0).to(ACC),)
            gs += (tl.load(p_grad + first * grad_row + i * grad_row, mask=m & m_channel, other=0).to(ACC),)
        for i in tl.static_range(CHUNK):
            b = tl.load(p_b + first * b_row + i * b_row, mask=(i < left) & m_state, other=0).to(ACC)
            hs += (tl.exp2(deltas[i][:, None] * a) * hs[i] + (deltas[i] * us[i])[:, None] * b[None, :],)
        # Loaded again, lest the compiler keep the factors, as many registers as the states, from one walk to the other.
        a = tl.load(p_a, mask=m_tile, other=0, volatile=True).to(ACC) * _LOG2_E
        for i in tl.static_range(CHUNK - 1, -1, -1):
            m = i < left
            b = tl.load(p_b + first * b_row + i * b_row, mask=m & m_state, other=0).to(ACC)
            c = tl.load(p_c + first * c_row + i * c_row, mask=m & m_state, other=0).to(ACC)
            u, delta, g = us[i], deltas[i], gs[i]
            grad_h = c[None, :] * g[:, None] + carried
            parts = tl.join(grad_h * (delta * u)[:, None], hs[i + 1] * g[:, None])
            if i % 2 == 1:
                later_parts = parts
            else:  # one sum over the lanes, with its barriers, for two tokens
                sums = tl.sum(tl.join(parts, later_parts), axis=0)
                m_matrix = m_state[:, None, None] & (i + later_token < left)
                tl.store(p_matrix + first * 2 * STATES + i * 2 * STATES, sums, mask=m_matrix)
            grad_input = tl.sum(grad_h * b[None, :], axis=1)  # of Δ u
            carried = tl.exp2(delta[:, None] * a) * grad_h
            grad_exponent = carried * hs[i]  # of Δ A
            grad_a += grad_exponent * delta[:, None]
            grad_d += g * u
            out_x = g * d + grad_input * delta
            out_step = tl.sum(grad_exponent * a, axis=1) * _LN_2 + grad_input * u
            tl.store(p_grad_x + first * channels + i * channels, out_x.to(grad_x.dtype.element_ty), mask=m & m_channel)
            p_row = p_grad_step + first * channels + i * channels
            tl.store(p_row, out_step.to(grad_step.dtype.element_ty), mask=m & m_channel)
    p_decay = decay_parts + (cell * channels + channel[:, None]) * STATES + state_number[None, :]
    tl.store(p_decay, grad_a, mask=m_tile)
    tl.store(skip_parts + cell * channels + channel, grad_d, mask=m_channel)


def _lanes() -> int:
    """Threads of a warp of the GPU (or of the one compiled for): 64 on AMD's. Nothing depends on it in the interpreter."""
    if triton.knobs.runtime.interpret:
        return 32
    return triton.runtime.driver.active.get_current_target().warp_size


def _tile(channels: int, states: int, dtype: torch.dtype) -> dict[str, object]:
    """The rule of the module's docstring."""
    padded = triton.next_power_of_2(states)
    block = min(max(triton.next_power_of_2(channels), 32), WIDEST_BLOCK)
    return {
        "CHUNK": max(2, min(LONGEST_CHUNK, STATES_IN_REGISTERS // padded)),
        "STATES": states,
        "PADDED": padded,
        "BLOCK": block,
        "ACC": triton_accumulator(dtype),
        "num_warps": max(1, block // _lanes()),
    }


def _strides(*tensors: Tensor) -> list[int]:
    return [stride for tensor in tensors for stride in tensor.stride()]


def _launch_forward(x, step, decay, input_matrix, output_matrix, skip, cell_offsets, save: bool) -> tuple[Tensor, Tensor]:
    """(y, the saved states [(T − 1) // chunk, E, N]; empty without `save`)."""
    (tokens, channels), states = x.shape, decay.shape[1]
    tile = _tile(channels, states, x.dtype)
    slots = max(tokens - 1, 0) // tile["CHUNK"] if save else 0
    y = torch.empty_like(x, memory_format=torch.contiguous_format)
    boundaries = torch.empty(slots, channels, states, dtype=torch.promote_types(x.dtype, torch.float32), device=x.device)
    _forward_kernel[(len(cell_offsets) - 1, triton.cdiv(channels, tile["BLOCK"]))](
        x, step, decay, input_matrix, output_matrix, skip, cell_offsets, y, boundaries,
        channels,
        *_strides(x, step, decay, input_matrix, output_matrix, skip),
        UNROLL=min(FORWARD_TOKENS, tile["CHUNK"]), SAVE=save, **tile,
    )  # fmt: skip
    return y, boundaries


def _launch_backward(x, step, decay, input_matrix, output_matrix, skip, cell_offsets, boundaries, grad) -> list[Tensor]:
    """The gradients of the first six."""
    (tokens, channels), states, cells = x.shape, decay.shape[1], len(cell_offsets) - 1
    tile = _tile(channels, states, x.dtype)
    blocks = triton.cdiv(channels, tile["BLOCK"])
    grad_x, grad_step = (torch.empty_like(rows, memory_format=torch.contiguous_format) for rows in (x, step))
    matrix_parts = torch.empty(blocks, tokens, 2, states, dtype=boundaries.dtype, device=x.device)
    decay_parts = torch.empty(cells, channels, states, dtype=boundaries.dtype, device=x.device)
    skip_parts = torch.empty(cells, channels, dtype=boundaries.dtype, device=x.device)
    _backward_kernel[(cells, blocks)](
        x, step, decay, input_matrix, output_matrix, skip, cell_offsets, boundaries, grad,
        grad_x, grad_step, matrix_parts, decay_parts, skip_parts,
        tokens, channels,
        *_strides(x, step, decay, input_matrix, output_matrix, skip, grad),
        **tile,
    )  # fmt: skip
    grad_b, grad_c = matrix_parts.sum(0).unbind(1)
    return [
        grad_x, grad_step, decay_parts.sum(0).to(decay.dtype), grad_b.to(input_matrix.dtype), grad_c.to(output_matrix.dtype),
        skip_parts.sum(0).to(skip.dtype),
    ]  # fmt: skip


class TritonSelectiveScan(torch.autograd.Function):
    """Saves its inputs and the states before each chunk; `save` False (nothing needs a gradient) saves nothing."""

    @staticmethod
    def forward(ctx, x, step, decay, input_matrix, output_matrix, skip, cell_offsets, save) -> Tensor:
        inputs = (x, step, decay, input_matrix, output_matrix, skip, cell_offsets.contiguous())
        y, boundaries = _launch_forward(*inputs, save)
        ctx.save_for_backward(*inputs, boundaries)
        return y

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor | None, ...]:
        return *_launch_backward(*ctx.saved_tensors, grad), None, None
