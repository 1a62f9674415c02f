"""Softmax attention inside each cell of a packed batch, in Triton: forward and backward in one launch each.

With keys j of query i's cell, D = probabilities' dropout (0 or 1 / keep, regenerated from the token's key, never stored):

    S = scale · Q Kᵀ     P = softmax(S)     O = (D ∘ P) V
    dV = (D ∘ P)ᵀ dO     dP = D ∘ (dO Vᵀ)     dS = P ∘ (dP − δ), δᵢ = dOᵢ · Oᵢ     dQ = scale · dS K     dK = scale · dSᵀ Q

(δᵢ = Σⱼ Pᵢⱼ dPᵢⱼ, with dropout too). The softmax is computed on line in fp32 (fp64 for fp64 inputs); of it one number a query
and head is kept, the base-2 logarithm of Σⱼ exp(Sᵢⱼ), from which the backward has P again.

Work. A cell's tokens are cut into blocks of BLOCK rows; one program takes one block, one head and, forward, one tile of at
most 128 value columns (fp32: 64). Cell c has the programs from ⌊offsets[c] / BLOCK⌋ + c on: enough for ⌈n / BLOCK⌉ blocks
wherever the cell starts, at most one too many, and T // BLOCK + B in all, which the host knows without asking the device. A
program counts the cells that begin before it to find its own. Nothing depends on the longest cell.

Backward. A program owns its block's rows as queries, for which it loops over the keys (dQ), and as keys, for which it loops
over the queries (dK and dV; with several value tiles, here of 64 columns, first dK, then dV a tile at a time). It makes δ from
O and dO where it needs it, so nothing but the forward's logarithms passes through memory, and a cell's rows are all read at
about the same time: programs of one cell and head follow each other.

Races. Every row of output, logarithm and gradient belongs to exactly one block of one cell, the blocks of a cell are disjoint,
each head and value tile has its own columns, and nobody reads what another program of the launch writes. No atomics, sums in
a fixed order: two runs agree to the bit.

Traffic. A cell's rows for one head are read by its few programs one after the other (513 tokens of width 32: 64 KB), so each
operand counts once a launch. With T tokens, H heads, s bytes an element:
    forward   T · H · ((2 d + 2 e) s + 4): q, k, v read; output and logarithms written
    backward  T · H · ((4 d + 4 e) s + 4): q, k, v, output, its gradient and logarithms read; three gradients written
plus 8 T with dropout; offsets and lengths are negligible. Value tiles read q and k again, from the cache.
"""

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from scbench.kernels import random
from scbench.kernels.random import keep_triton

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
def _load(p_tile, rows, stop, stride, columns, WIDTH: tl.constexpr):
    """Rows before `stop` and columns below WIDTH of a matrix; 0 elsewhere."""
    mask = (rows < stop)[:, None] & (columns < WIDTH)[None, :]
    return tl.load(p_tile + rows.to(tl.int64)[:, None] * stride + columns[None, :], mask=mask, other=0.0)


@triton.jit
def _store(p_tile, rows, stop, stride, columns, WIDTH: tl.constexpr, x):
    mask = (rows < stop)[:, None] & (columns < WIDTH)[None, :]
    tl.store(p_tile + rows.to(tl.int64)[:, None] * stride + columns[None, :], x.to(p_tile.dtype.element_ty), mask=mask)


@triton.jit
def _dot(a, b, ACC: tl.constexpr):
    """a · b in ACC; fp32 factors are not rounded to tf32."""
    return tl.dot(a, b, input_precision="ieee", out_dtype=ACC)


@triton.jit
def _drop(x, token_keys, keys, i_head, H: tl.constexpr, THRESHOLD: tl.constexpr, RESCALE: tl.constexpr):
    """Dropout of probabilities or their gradient: token_keys and keys (the key's number in its cell) broadcast to x."""
    return tl.where(keep_triton(token_keys, keys * H + i_head, THRESHOLD), x * RESCALE, 0.0)


@triton.jit
def _forward_kernel(
    query, key, value, cell_offsets, key_lengths, token_keys, output, logarithm,
    tokens, cells,
    query_token, query_head, key_token, key_head, value_token, value_head,
    H: tl.constexpr, D: tl.constexpr, E: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_E: tl.constexpr, TILES: tl.constexpr,
    BLOCK: tl.constexpr, STEP: tl.constexpr, ACC: tl.constexpr,
    SCALE: tl.constexpr, THRESHOLD: tl.constexpr, RESCALE: tl.constexpr,
):  # fmt: skip
    i_tile, i_block, i_head = tl.program_id(0) % TILES, tl.program_id(0) // TILES, tl.program_id(1).to(tl.int64)
    first, start, stop, key_stop = _find_block(cell_offsets, key_lengths, cells, i_block, BLOCK)
    if first >= stop:
        return
    rows, d, e = first + tl.arange(0, BLOCK), tl.arange(0, BLOCK_D), i_tile * BLOCK_E + tl.arange(0, BLOCK_E)
    b_query = _load(query + i_head * query_head, rows, stop, query_token, d, D)
    if token_keys is not None:
        b_token_keys = tl.load(token_keys + rows, mask=rows < stop, other=0)
    maximum = tl.full((BLOCK,), float("-inf"), ACC)
    total = tl.zeros((BLOCK,), ACC)
    mixed = tl.zeros((BLOCK, BLOCK_E), ACC)
    for step in range(start, key_stop, STEP):
        keys = step + tl.arange(0, STEP)
        b_key = _load(key + i_head * key_head, keys, key_stop, key_token, d, D)
        scores = _dot(b_query, tl.trans(b_key), ACC) * (SCALE * LOG2E)
        scores = tl.where((keys < key_stop)[None, :], scores, float("-inf"))
        higher = tl.maximum(maximum, tl.max(scores, 1))
        p = tl.exp2(scores - higher[:, None])
        shrink = tl.exp2(maximum - higher)
        total = total * shrink + tl.sum(p, 1)
        maximum = higher
        if token_keys is not None:
            p = _drop(p, b_token_keys[:, None], (keys - start)[None, :], i_head, H, THRESHOLD, RESCALE)
        b_value = _load(value + i_head * value_head, keys, key_stop, value_token, e, E)
        mixed = mixed * shrink[:, None] + _dot(p.to(b_value.dtype), b_value, ACC)
    _store(output + i_head * E, rows, stop, H * E, e, E, mixed / total[:, None])
    if i_tile == 0:
        tl.store(logarithm + i_head * tokens + rows, maximum + tl.log2(total), mask=rows < stop)


@triton.jit
def _backward_kernel(
    query, key, value, cell_offsets, key_lengths, token_keys, output, logarithm, grad_output, grad_query, grad_key, grad_value,
    tokens, cells,
    query_token, query_head, key_token, key_head, value_token, value_head,
    H: tl.constexpr, D: tl.constexpr, E: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_E: tl.constexpr, TILES: tl.constexpr,
    BLOCK: tl.constexpr, STEP: tl.constexpr, ACC: tl.constexpr,
    SCALE: tl.constexpr, THRESHOLD: tl.constexpr, RESCALE: tl.constexpr,
):  # fmt: skip
    i_head = tl.program_id(1).to(tl.int64)
    first, start, stop, key_stop = _find_block(cell_offsets, key_lengths, cells, tl.program_id(0), BLOCK)
    if first >= stop:
        return
    query += i_head * query_head
    key += i_head * key_head
    value += i_head * value_head
    output += i_head * E
    grad_output += i_head * E
    logarithm += i_head * tokens
    rows, d, e = first + tl.arange(0, BLOCK), tl.arange(0, BLOCK_D), tl.arange(0, BLOCK_E)

    # The rows as queries, over the keys: dQ.
    b_query = _load(query, rows, stop, query_token, d, D)
    b_logarithm = tl.load(logarithm + rows, mask=rows < stop, other=float("inf"))  # so that no row past the end has weight
    if TILES == 1:
        b_grad = _load(grad_output, rows, stop, H * E, e, E)
        delta = tl.sum(b_grad.to(ACC) * _load(output, rows, stop, H * E, e, E).to(ACC), 1)
    else:
        delta = tl.zeros((BLOCK,), ACC)
        for i_tile in range(TILES):
            t_grad = _load(grad_output, rows, stop, H * E, i_tile * BLOCK_E + e, E)
            t_output = _load(output, rows, stop, H * E, i_tile * BLOCK_E + e, E)
            delta += tl.sum(t_grad.to(ACC) * t_output.to(ACC), 1)
    if token_keys is not None:
        b_token_keys = tl.load(token_keys + rows, mask=rows < stop, other=0)
    query_gradient = tl.zeros((BLOCK, BLOCK_D), ACC)
    for step in range(start, key_stop, STEP):
        keys = step + tl.arange(0, STEP)
        s_key = _load(key, keys, key_stop, key_token, d, D)
        p = tl.exp2(_dot(b_query, tl.trans(s_key), ACC) * (SCALE * LOG2E) - b_logarithm[:, None])
        p = tl.where((keys < key_stop)[None, :], p, 0.0)
        if TILES == 1:
            grad_p = _dot(b_grad, tl.trans(_load(value, keys, key_stop, value_token, e, E)), ACC)
        else:
            grad_p = tl.zeros((BLOCK, STEP), ACC)
            for i_tile in range(TILES):
                t_grad = _load(grad_output, rows, stop, H * E, i_tile * BLOCK_E + e, E)
                t_value = _load(value, keys, key_stop, value_token, i_tile * BLOCK_E + e, E)
                grad_p += _dot(t_grad, tl.trans(t_value), ACC)
        if token_keys is not None:
            grad_p = _drop(grad_p, b_token_keys[:, None], (keys - start)[None, :], i_head, H, THRESHOLD, RESCALE)
        query_gradient += _dot((p * (grad_p - delta[:, None])).to(s_key.dtype), s_key, ACC)
    _store(grad_query + i_head * D, rows, stop, H * D, d, D, query_gradient * SCALE)

    # The rows as keys, over the queries: dK, and dV if it is one tile. Everything is [keys, queries].
    b_key = _load(key, rows, key_stop, key_token, d, D)
    key_gradient = tl.zeros((BLOCK, BLOCK_D), ACC)
    if TILES == 1:
        b_value = _load(value, rows, key_stop, value_token, e, E)
        value_gradient = tl.zeros((BLOCK, BLOCK_E), ACC)
    for step in range(start, stop, STEP):
        queries = step + tl.arange(0, STEP)
        s_query = _load(query, queries, stop, query_token, d, D)
        s_logarithm = tl.load(logarithm + queries, mask=queries < stop, other=float("inf"))
        p = tl.exp2(_dot(b_key, tl.trans(s_query), ACC) * (SCALE * LOG2E) - s_logarithm[None, :])
        p = tl.where((rows < key_stop)[:, None], p, 0.0)
        if TILES == 1:
            s_grad = _load(grad_output, queries, stop, H * E, e, E)
            s_delta = tl.sum(s_grad.to(ACC) * _load(output, queries, stop, H * E, e, E).to(ACC), 1)
            grad_p = _dot(b_value, tl.trans(s_grad), ACC)
        else:
            s_delta = tl.zeros((STEP,), ACC)
            grad_p = tl.zeros((BLOCK, STEP), ACC)
            for i_tile in range(TILES):
                t_value = _load(value, rows, key_stop, value_token, i_tile * BLOCK_E + e, E)
                t_grad = _load(grad_output, queries, stop, H * E, i_tile * BLOCK_E + e, E)
                t_output = _load(output, queries, stop, H * E, i_tile * BLOCK_E + e, E)
                s_delta += tl.sum(t_grad.to(ACC) * t_output.to(ACC), 1)
                grad_p += _dot(t_value, tl.trans(t_grad), ACC)
        dropped = p
        if token_keys is not None:
            s_token_keys = tl.load(token_keys + queries, mask=queries < stop, other=0)
            keys = (rows - start)[:, None]
            dropped = _drop(p, s_token_keys[None, :], keys, i_head, H, THRESHOLD, RESCALE)
            grad_p = _drop(grad_p, s_token_keys[None, :], keys, i_head, H, THRESHOLD, RESCALE)
        if TILES == 1:
            value_gradient += _dot(dropped.to(s_grad.dtype), s_grad, ACC)
        key_gradient += _dot((p * (grad_p - s_delta[None, :])).to(s_query.dtype), s_query, ACC)
    _store(grad_key + i_head * D, rows, stop, H * D, d, D, key_gradient * SCALE)
    if TILES == 1:
        _store(grad_value + i_head * E, rows, stop, H * E, e, E, value_gradient)

    # dV of several tiles, one after the other.
    if TILES > 1:
        for i_tile in range(TILES):
            columns = i_tile * BLOCK_E + e
            tile_gradient = tl.zeros((BLOCK, BLOCK_E), ACC)
            for step in range(start, stop, STEP):
                queries = step + tl.arange(0, STEP)
                s_query = _load(query, queries, stop, query_token, d, D)
                s_logarithm = tl.load(logarithm + queries, mask=queries < stop, other=float("inf"))
                p = tl.exp2(_dot(b_key, tl.trans(s_query), ACC) * (SCALE * LOG2E) - s_logarithm[None, :])
                p = tl.where((rows < key_stop)[:, None], p, 0.0)
                if token_keys is not None:
                    s_token_keys = tl.load(token_keys + queries, mask=queries < stop, other=0)
                    p = _drop(p, s_token_keys[None, :], (rows - start)[:, None], i_head, H, THRESHOLD, RESCALE)
                s_grad = _load(grad_output, queries, stop, H * E, columns, E)
                tile_gradient += _dot(p.to(s_grad.dtype), s_grad, ACC)
            _store(grad_value + i_head * E, rows, stop, H * E, columns, E, tile_gradient)


def _tile(query: Tensor, value: Tensor, widest: int) -> dict[str, int]:
    """The tile; `widest`: of the value columns.

    Blocks of 64 rows are what tensor cores take, and waste less of a cell of 513 tokens than 128 would. fp32 goes without
    tensor cores, operands in registers: smaller tiles, and twice the warps where heads are wide. At head widths up to 128 all
    of it fits 64 KiB of shared memory.
    """
    half = query.element_size() == 2
    block_e = min(widest if half else 64, max(16, triton.next_power_of_2(value.shape[2])))
    return {
        "BLOCK_D": max(16, triton.next_power_of_2(query.shape[2])), "BLOCK_E": block_e,
        "TILES": triton.cdiv(value.shape[2], block_e), "BLOCK": 64 if half else 32, "STEP": 32 if half else 16,
        "num_warps": 4 if half or query.shape[2] <= 64 else 8, "num_stages": 2,
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
        "ACC": tl.float64 if query.dtype == torch.float64 else tl.float32,
        "SCALE": scale, "THRESHOLD": random.keep_threshold(probability),
        "RESCALE": 65536 / (65536 - round(probability * 65536)), **_tile(query, value, widest),
    }  # fmt: skip


def _launch_forward(
    query: Tensor, key: Tensor, value: Tensor, cell_offsets: Tensor, scale: float, key_lengths: Tensor | None,
    token_keys: Tensor | None, probability: float,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Output [T, H, e] and logarithms [H, T]."""
    arguments = _arguments(query, key, value, cell_offsets, scale, probability, widest=128)
    tokens, heads, _ = query.shape
    output = torch.empty(value.shape, dtype=value.dtype, device=value.device)
    accumulated = torch.float64 if query.dtype == torch.float64 else torch.float32
    logarithm = torch.empty((heads, tokens), dtype=accumulated, device=query.device)
    blocks = tokens // arguments["BLOCK"] + arguments["cells"]
    _forward_kernel[(blocks * arguments["TILES"], heads)](
        query, key, value, cell_offsets, key_lengths, token_keys, output, logarithm, **arguments
    )
    return output, logarithm


def _launch_backward(
    query: Tensor, key: Tensor, value: Tensor, cell_offsets: Tensor, scale: float, key_lengths: Tensor | None,
    token_keys: Tensor | None, probability: float, output: Tensor, logarithm: Tensor, grad_output: Tensor,
) -> list[Tensor]:  # fmt: skip
    """The gradients of query, key and value."""
    arguments = _arguments(query, key, value, cell_offsets, scale, probability, widest=64)
    grads = [torch.empty(x.shape, dtype=x.dtype, device=x.device) for x in (query, key, value)]
    blocks = len(query) // arguments["BLOCK"] + arguments["cells"]
    _backward_kernel[(blocks, query.shape[1])](
        query, key, value, cell_offsets, key_lengths, token_keys, output, logarithm, grad_output.contiguous(), *grads,
        **arguments,
    )
    return grads


class TritonAttention(torch.autograd.Function):
    """Arguments as `attention`'s. Saves its inputs, its output and a logarithm a query and head."""

    @staticmethod
    def forward(
        ctx, query: Tensor, key: Tensor, value: Tensor, cell_offsets: Tensor, scale: float, key_lengths: Tensor | None,
        token_keys: Tensor | None, probability: float,
    ) -> Tensor:  # fmt: skip
        query, key, value = (x if x.stride(-1) == 1 else x.contiguous() for x in (query, key, value))
        ctx.options = scale, key_lengths, token_keys, probability
        output, logarithm = _launch_forward(query, key, value, cell_offsets, *ctx.options)
        ctx.save_for_backward(query, key, value, cell_offsets, output, logarithm)
        return output

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor | None, ...]:
        query, key, value, cell_offsets, output, logarithm = ctx.saved_tensors
        grads = _launch_backward(query, key, value, cell_offsets, *ctx.options, output, logarithm, grad)
        return *grads, None, None, None, None, None
