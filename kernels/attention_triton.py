"""Softmax attention inside each cell of a packed batch, in Triton: forward and backward in one launch each.

With keys j of query i's cell, D = probabilities' dropout (0 or 1 / keep, regenerated from the token's key, never stored):

    S = scale · Q Kᵀ     P = softmax(S)     O = (D ∘ P) V
    dV = (D ∘ P)ᵀ dO     dP = D ∘ (dO Vᵀ)     dS = P ∘ (dP − δ), δᵢ = dOᵢ · Oᵢ     dQ = scale · dS K     dK = scale · dSᵀ Q

(δᵢ = Σⱼ Pᵢⱼ dPᵢⱼ, with dropout too). The softmax is computed on line in fp32 (fp64 for fp64 inputs); of it two numbers a query
and head are kept, the largest score and Σⱼ exp(Sᵢⱼ − largest), from which the backward has P again. (Their one logarithm is
usual and would do; its rounding is a relative error of P of up to half a unit in the last place of the largest score.)

Work. A cell's tokens are cut into blocks of BLOCK rows; one program takes one block, one head and, forward, one tile of at
most 128 value columns (fp32: 64). Cell c has the programs from ⌊offsets[c] / BLOCK⌋ + c on: enough for ⌈n / BLOCK⌉ blocks
wherever the cell starts, at most one too many, and T // BLOCK + B in all, which the host knows without asking the device. A
program counts the cells that begin before it to find its own. Nothing depends on the longest cell.

Backward. A program owns its block's rows as queries, for which it loops over the keys (dQ), and as keys, for which it loops
over the queries (dK and dV; with several value tiles, here of 64 columns, first dK, then dV a tile at a time). It makes δ from
O and dO where it needs it, so nothing but the forward's two numbers passes through memory.

Launches. A cell's rows are read again by each of its programs. They follow each other, but CUDA promises no order, so what a
launch reads again must fit the cache: `_launches` gives each as many heads as that allows, or a part of one head's blocks.

Races. Every row of output, statistics and gradient belongs to one block of one cell, the blocks of a cell are disjoint, each
head and value tile has its own columns, and nobody reads what another program of the launch writes. No atomics, sums in a
fixed order: two runs agree to the bit.

Traffic. Every operand counts once a launch. With T tokens, H heads, s bytes an element:
    forward   T · H · ((2 d + 2 e) s + 8): q, k, v read; output and the softmax's two numbers written
    backward  T · H · ((4 d + 4 e) s + 8): q, k, v, output, its gradient and the two numbers read; three gradients written
plus 8 T with dropout; offsets and lengths are negligible. Besides: a cell whose blocks are in two launches is read by both.
"""

import math
from collections.abc import Iterator

import torch
import triton
import triton.language as tl
from torch import Tensor

from scbench.kernels import backend, random
from scbench.kernels.random_triton import keep_triton
from scbench.kernels.row_tiles import accumulator, triton_accumulator

LOG2E = tl.constexpr(math.log2(math.e))
CELLS = tl.constexpr(128)  # offsets that a program compares at once


@triton.jit
def _find_block(cell_offsets, key_lengths, cells, i_block, BLOCK: tl.constexpr):
    """This program's block: its first row, its cell's first row and end, and the end of the cell's keys (int32)."""
    begun = 0
    for first_cell in range(0, cells, CELLS):
        cell = first_cell + tl.arange(0, CELLS)
        first_block = tl.load(cell_offsets + cell, mask=cell < cells, other=0) // BLOCK + cell
        begun += tl.sum(((first_block <= i_block) & (cell < cells)).to(tl.int32))
    i_cell = begun - 1
    start, stop = tl.load(cell_offsets + i_cell), tl.load(cell_offsets + i_cell + 1)
    key_stop = stop
    if key_lengths is not None:
        key_stop = start + tl.load(key_lengths + i_cell)
    return start + (i_block - start // BLOCK - i_cell) * BLOCK, start, stop, key_stop


@triton.jit
def _place(p_tile, first, stop, stride, columns, ROWS: tl.constexpr, WIDTH: tl.constexpr):
    """(pointers, mask) of ROWS rows of a matrix from `first` on, before `stop`, and of columns below WIDTH.

    The tile's corner in int64, offsets inside it in int32: they need half the registers.
    """
    row = tl.arange(0, ROWS)
    p = p_tile + tl.cast(first, tl.int64) * stride + (row[:, None] * stride + columns[None, :])
    return p, (row < stop - first)[:, None] & (columns < WIDTH)[None, :]


@triton.jit
def _load(p_tile, first, stop, stride, columns, ROWS: tl.constexpr, WIDTH: tl.constexpr):
    """0 outside the matrix."""
    p, mask = _place(p_tile, first, stop, stride, columns, ROWS, WIDTH)
    return tl.load(p, mask=mask, other=0.0)


@triton.jit
def _store(p_tile, first, stop, stride, columns, ROWS: tl.constexpr, WIDTH: tl.constexpr, x):
    p, mask = _place(p_tile, first, stop, stride, columns, ROWS, WIDTH)
    tl.store(p, x.to(p_tile.dtype.element_ty), mask=mask)


@triton.jit
def _load_statistics(statistics, tokens, first, stop, ROWS: tl.constexpr):
    """(largest score, 1 / sum) of some rows; past `stop` what gives every score the weight 0."""
    row = tl.arange(0, ROWS)
    maximum = tl.load(statistics + first + row, mask=row < stop - first, other=float("inf"))
    return maximum, tl.load(statistics + tokens + first + row, mask=row < stop - first, other=0.0)


@triton.jit
def _dot(a, b, ACC: tl.constexpr):
    """a · b in ACC; fp32 factors are not rounded to tf32."""
    return tl.dot(a, b, input_precision="ieee", out_dtype=ACC)


@triton.jit
def _kept(token_keys, keys, i_head, H: tl.constexpr, THRESHOLD: tl.constexpr, RESCALE: tl.constexpr, ACC: tl.constexpr):
    """Dropout's factors, 0 or RESCALE; token_keys and keys (the key's number in its cell) broadcast."""
    return keep_triton(token_keys, keys * H + i_head, THRESHOLD).to(ACC) * RESCALE


@triton.jit(do_not_specialize=["first_block", "first_head"])
def _forward_kernel(
    query, key, value, cell_offsets, key_lengths, token_keys, output, statistics,
    tokens, cells, first_block, first_head,
    query_token, query_head, key_token, key_head, value_token, value_head,
    H: tl.constexpr, D: tl.constexpr, E: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_E: tl.constexpr, TILES: tl.constexpr,
    BLOCK: tl.constexpr, STEP: tl.constexpr, ACC: tl.constexpr,
    SCALE: tl.constexpr, THRESHOLD: tl.constexpr, RESCALE: tl.constexpr,
):  # fmt: skip
    i_tile, i_block, i_head = tl.program_id(0) % TILES, tl.program_id(0) // TILES, first_head + tl.program_id(1).to(tl.int64)
    first, start, stop, key_stop = _find_block(cell_offsets, key_lengths, cells, first_block + i_block, BLOCK)
    if first >= stop:
        return
    d, e = tl.arange(0, BLOCK_D), i_tile * BLOCK_E + tl.arange(0, BLOCK_E)
    row, key_row = tl.arange(0, BLOCK), tl.arange(0, STEP)
    b_query = _load(query + i_head * query_head, first, stop, query_token, d, BLOCK, D)
    if token_keys is not None:
        b_token_keys = tl.load(token_keys + first + row, mask=row < stop - first, other=0)
    maximum = tl.full((BLOCK,), float("-inf"), ACC)
    total = tl.zeros((BLOCK,), ACC)
    mixed = tl.zeros((BLOCK, BLOCK_E), ACC)
    for step in range(start, key_stop, STEP):
        b_key = _load(key + i_head * key_head, step, key_stop, key_token, d, STEP, D)
        scores = _dot(b_query, tl.trans(b_key), ACC) * (SCALE * LOG2E)
        scores = tl.where((key_row < key_stop - step)[None, :], scores, float("-inf"))
        higher = tl.maximum(maximum, tl.max(scores, 1))
        p = tl.exp2(scores - higher[:, None])
        shrink = tl.exp2(maximum - higher)
        total = total * shrink + tl.sum(p, 1)
        maximum = higher
        if token_keys is not None:
            p *= _kept(b_token_keys[:, None], (step - start + key_row)[None, :], i_head, H, THRESHOLD, RESCALE, ACC)
        b_value = _load(value + i_head * value_head, step, key_stop, value_token, e, STEP, E)
        mixed = mixed * shrink[:, None] + _dot(p.to(b_value.dtype), b_value, ACC)
    _store(output + i_head * E, first, stop, H * E, e, BLOCK, E, mixed / total[:, None])
    if i_tile == 0:
        statistics += i_head * 2 * tokens
        tl.store(statistics + first + row, maximum, mask=row < stop - first)
        tl.store(statistics + tokens + first + row, 1 / total, mask=row < stop - first)


@triton.jit(do_not_specialize=["first_block", "first_head"])
def _backward_kernel(
    query, key, value, cell_offsets, key_lengths, token_keys, output, statistics, grad_output,
    grad_query, grad_key, grad_value,
    tokens, cells, first_block, first_head,
    query_token, query_head, key_token, key_head, value_token, value_head,
    H: tl.constexpr, D: tl.constexpr, E: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_E: tl.constexpr, TILES: tl.constexpr,
    BLOCK: tl.constexpr, STEP: tl.constexpr, ACC: tl.constexpr,
    SCALE: tl.constexpr, THRESHOLD: tl.constexpr, RESCALE: tl.constexpr,
):  # fmt: skip
    i_head = first_head + tl.program_id(1).to(tl.int64)
    first, start, stop, key_stop = _find_block(cell_offsets, key_lengths, cells, first_block + tl.program_id(0), BLOCK)
    if first >= stop:
        return
    query += i_head * query_head
    key += i_head * key_head
    value += i_head * value_head
    output += i_head * E
    grad_output += i_head * E
    statistics += i_head * 2 * tokens
    d, e = tl.arange(0, BLOCK_D), tl.arange(0, BLOCK_E)
    row, step_row = tl.arange(0, BLOCK), tl.arange(0, STEP)

    # The rows as queries, over the keys: dQ.
    b_query = _load(query, first, stop, query_token, d, BLOCK, D)
    b_maximum, b_inverse = _load_statistics(statistics, tokens, first, stop, BLOCK)
    if TILES == 1:
        b_grad = _load(grad_output, first, stop, H * E, e, BLOCK, E)
        delta = tl.sum(b_grad.to(ACC) * _load(output, first, stop, H * E, e, BLOCK, E).to(ACC), 1)
    else:
        delta = tl.zeros((BLOCK,), ACC)
        for i_tile in range(TILES):
            t_grad = _load(grad_output, first, stop, H * E, i_tile * BLOCK_E + e, BLOCK, E)
            t_output = _load(output, first, stop, H * E, i_tile * BLOCK_E + e, BLOCK, E)
            delta += tl.sum(t_grad.to(ACC) * t_output.to(ACC), 1)
    if token_keys is not None:
        b_token_keys = tl.load(token_keys + first + row, mask=row < stop - first, other=0)
    query_gradient = tl.zeros((BLOCK, BLOCK_D), ACC)
    for step in range(start, key_stop, STEP):
        s_key = _load(key, step, key_stop, key_token, d, STEP, D)
        p = tl.exp2(_dot(b_query, tl.trans(s_key), ACC) * (SCALE * LOG2E) - b_maximum[:, None]) * b_inverse[:, None]
        p = tl.where((step_row < key_stop - step)[None, :], p, 0.0)
        if TILES == 1:
            grad_p = _dot(b_grad, tl.trans(_load(value, step, key_stop, value_token, e, STEP, E)), ACC)
        else:
            grad_p = tl.zeros((BLOCK, STEP), ACC)
            for i_tile in range(TILES):
                t_grad = _load(grad_output, first, stop, H * E, i_tile * BLOCK_E + e, BLOCK, E)
                t_value = _load(value, step, key_stop, value_token, i_tile * BLOCK_E + e, STEP, E)
                grad_p += _dot(t_grad, tl.trans(t_value), ACC)
        if token_keys is not None:
            grad_p *= _kept(b_token_keys[:, None], (step - start + step_row)[None, :], i_head, H, THRESHOLD, RESCALE, ACC)
        query_gradient += _dot((p * (grad_p - delta[:, None])).to(s_key.dtype), s_key, ACC)
    _store(grad_query + i_head * D, first, stop, H * D, d, BLOCK, D, query_gradient * SCALE)

    # The rows as keys, over the queries: dK, and dV if it is one tile. Everything is [keys, queries].
    attended = (row < key_stop - first)[:, None]  # pads are not: their weights are nonsense, their gradients 0
    b_key = _load(key, first, key_stop, key_token, d, BLOCK, D)
    key_gradient = tl.zeros((BLOCK, BLOCK_D), ACC)
    if TILES == 1:
        b_value = _load(value, first, key_stop, value_token, e, BLOCK, E)
        value_gradient = tl.zeros((BLOCK, BLOCK_E), ACC)
    for step in range(start, stop, STEP):
        s_query = _load(query, step, stop, query_token, d, STEP, D)
        s_maximum, s_inverse = _load_statistics(statistics, tokens, step, stop, STEP)
        p = tl.exp2(_dot(b_key, tl.trans(s_query), ACC) * (SCALE * LOG2E) - s_maximum[None, :]) * s_inverse[None, :]
        if TILES == 1:
            s_grad = _load(grad_output, step, stop, H * E, e, STEP, E)
            s_delta = tl.sum(s_grad.to(ACC) * _load(output, step, stop, H * E, e, STEP, E).to(ACC), 1)
            grad_p = _dot(b_value, tl.trans(s_grad), ACC)
        else:
            s_delta = tl.zeros((STEP,), ACC)
            grad_p = tl.zeros((BLOCK, STEP), ACC)
            for i_tile in range(TILES):
                t_value = _load(value, first, key_stop, value_token, i_tile * BLOCK_E + e, BLOCK, E)
                t_grad = _load(grad_output, step, stop, H * E, i_tile * BLOCK_E + e, STEP, E)
                t_output = _load(output, step, stop, H * E, i_tile * BLOCK_E + e, STEP, E)
                s_delta += tl.sum(t_grad.to(ACC) * t_output.to(ACC), 1)
                grad_p += _dot(t_value, tl.trans(t_grad), ACC)
        dropped = p
        if token_keys is not None:
            s_token_keys = tl.load(token_keys + step + step_row, mask=step_row < stop - step, other=0)
            kept = _kept(s_token_keys[None, :], (first - start + row)[:, None], i_head, H, THRESHOLD, RESCALE, ACC)
            dropped *= kept
            grad_p *= kept
        if TILES == 1:
            value_gradient += _dot(dropped.to(s_grad.dtype), s_grad, ACC)
        key_gradient += _dot((p * (grad_p - s_delta[None, :])).to(s_query.dtype), s_query, ACC)
    _store(grad_key + i_head * D, first, stop, H * D, d, BLOCK, D, tl.where(attended, key_gradient * SCALE, 0.0))
    if TILES == 1:
        _store(grad_value + i_head * E, first, stop, H * E, e, BLOCK, E, tl.where(attended, value_gradient, 0.0))

    # dV of several tiles, one after the other.
    if TILES > 1:
        for i_tile in range(TILES):
            b_key = _load(key, first, key_stop, key_token, d, BLOCK, D)  # again, lest fp32 spill
            tile_gradient = tl.zeros((BLOCK, BLOCK_E), ACC)
            for step in range(start, stop, STEP):
                s_query = _load(query, step, stop, query_token, d, STEP, D)
                s_maximum, s_inverse = _load_statistics(statistics, tokens, step, stop, STEP)
                p = tl.exp2(_dot(b_key, tl.trans(s_query), ACC) * (SCALE * LOG2E) - s_maximum[None, :]) * s_inverse[None, :]
                if token_keys is not None:
                    s_token_keys = tl.load(token_keys + step + step_row, mask=step_row < stop - step, other=0)
                    p *= _kept(s_token_keys[None, :], (first - start + row)[:, None], i_head, H, THRESHOLD, RESCALE, ACC)
                s_grad = _load(grad_output, step, stop, H * E, i_tile * BLOCK_E + e, STEP, E)
                tile_gradient += _dot(p.to(s_grad.dtype), s_grad, ACC)
            tile_gradient = tl.where(attended, tile_gradient, 0.0)
            _store(grad_value + i_head * E, first, stop, H * E, i_tile * BLOCK_E + e, BLOCK, E, tile_gradient)


def _tile(query: Tensor, value: Tensor, widest: int) -> dict[str, int]:
    """The tile; `widest`: of the value columns.

    Blocks of 64 rows are what tensor cores take, and waste less of a cell of 513 tokens than 128 would. fp32 goes without
    tensor cores, operands in registers: smaller tiles, and where heads are wide smaller blocks and twice the warps. At head
    widths up to 128 all of it fits 64 KiB of shared memory, and nothing spills (benchmarks/kernels.py --compile-report).
    """
    half, width = query.element_size() == 2, query.shape[2]
    block_e = min(widest if half else 64, max(16, triton.next_power_of_2(value.shape[2])))
    return {
        "BLOCK_D": max(16, triton.next_power_of_2(width)), "BLOCK_E": block_e,
        "TILES": triton.cdiv(value.shape[2], block_e), "BLOCK": 64 if half or width <= 32 else 32, "STEP": 32 if half else 16,
        "num_warps": 4 if half or width <= 64 else 8, "num_stages": 2,
    }  # fmt: skip


def _arguments(
    query: Tensor, key: Tensor, value: Tensor, cell_offsets: Tensor, scale: float, probability: float, widest: int
) -> dict:
    """What both kernels take after their tensors."""
    tokens, heads, width = query.shape
    return {
        "tokens": tokens, "cells": len(cell_offsets) - 1,
        "query_token": query.stride(0), "query_head": query.stride(1), "key_token": key.stride(0), "key_head": key.stride(1),
        "value_token": value.stride(0), "value_head": value.stride(1),
        "H": heads, "D": width, "E": value.shape[2],
        "ACC": triton_accumulator(query.dtype),
        "SCALE": scale, "THRESHOLD": random.keep_threshold(probability),
        "RESCALE": 65536 / (65536 - round(probability * 65536)), **_tile(query, value, widest),
    }  # fmt: skip


def _launches(query: Tensor, cells: int, block: int, reused: int) -> Iterator[tuple[int, int, int, int]]:
    """(blocks, heads, first block, first head) of each launch; `reused`: bytes of one head of a token that are read again."""
    (tokens, heads, _), cache = query.shape, backend.cache_bytes(query)
    blocks = every = tokens // block + cells
    together = min(heads, cache // max(1, tokens * reused))
    if together == 0:  # the cache does not hold one head of all tokens
        together, blocks = 1, max(1, cache // (block * reused))
    for first_head in range(0, heads, together):
        for first_block in range(0, every, blocks):
            yield min(blocks, every - first_block), min(together, heads - first_head), first_block, first_head


def _launch_forward(
    query: Tensor, key: Tensor, value: Tensor, cell_offsets: Tensor, scale: float, key_lengths: Tensor | None,
    token_keys: Tensor | None, probability: float,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Output [T, H, e] and the softmax's statistics [H, 2, T]."""
    arguments = _arguments(query, key, value, cell_offsets, scale, probability, widest=128)
    tokens, heads, width = query.shape
    output = torch.empty(value.shape, dtype=value.dtype, device=value.device)
    statistics = torch.empty((heads, 2, tokens), dtype=accumulator(query.dtype), device=query.device)
    reused = (width + value.shape[2]) * query.element_size()
    for blocks, heads, first_block, first_head in _launches(query, arguments["cells"], arguments["BLOCK"], reused):
        _forward_kernel[(blocks * arguments["TILES"], heads)](
            query, key, value, cell_offsets, key_lengths, token_keys, output, statistics,
            first_block=first_block, first_head=first_head, **arguments,
        )
    return output, statistics


def _launch_backward(
    query: Tensor, key: Tensor, value: Tensor, cell_offsets: Tensor, scale: float, key_lengths: Tensor | None,
    token_keys: Tensor | None, probability: float, output: Tensor, statistics: Tensor, grad_output: Tensor,
) -> list[Tensor]:  # fmt: skip
    """The gradients of query, key and value."""
    arguments = _arguments(query, key, value, cell_offsets, scale, probability, widest=64)
    grads = [torch.empty(x.shape, dtype=x.dtype, device=x.device) for x in (query, key, value)]
    grad_output = grad_output.contiguous()
    reused = (2 * query.shape[2] + value.shape[2]) * query.element_size()
    for blocks, heads, first_block, first_head in _launches(query, arguments["cells"], arguments["BLOCK"], reused):
        _backward_kernel[(blocks, heads)](
            query, key, value, cell_offsets, key_lengths, token_keys, output, statistics, grad_output, *grads,
            first_block=first_block, first_head=first_head, **arguments,
        )
    return grads


class TritonAttention(torch.autograd.Function):
    """Arguments as `attention`'s. Saves its inputs, its output and two numbers a query and head."""

    @staticmethod
    def forward(
        ctx, query: Tensor, key: Tensor, value: Tensor, cell_offsets: Tensor, scale: float, key_lengths: Tensor | None,
        token_keys: Tensor | None, probability: float,
    ) -> Tensor:  # fmt: skip
        query, key, value = (x if x.stride(-1) == 1 else x.contiguous() for x in (query, key, value))
        key_lengths, token_keys = (x if x is None else x.contiguous() for x in (key_lengths, token_keys))
        cell_offsets = cell_offsets.contiguous()
        ctx.options = scale, key_lengths, token_keys, probability
        output, statistics = _launch_forward(query, key, value, cell_offsets, *ctx.options)
        ctx.save_for_backward(query, key, value, cell_offsets, output, statistics)
        return output

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor | None, ...]:
        query, key, value, cell_offsets, output, statistics = ctx.saved_tensors
        grads = _launch_backward(query, key, value, cell_offsets, *ctx.options, output, statistics, grad)
        return *grads, None, None, None, None, None
