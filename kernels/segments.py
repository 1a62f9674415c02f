"""Sums of rows that share a key, without atomics: each key's rows are one run of an order that keeps equal keys together.

    out[k] = Σ coefficient[i] · rows[i]  over the i with keys[i] = k, in the order's order

First every run's ends are written down by its first and last element, then a program takes a tile of keys and writes their
rows of `out`, zeros where a key does not occur: every row of `out` is written once, by one program.
"""

import torch
from torch import Tensor

from scbench.kernels.backend import HAS_TRITON
from scbench.kernels.row_tiles import TILE, row_block, rows_of_tile

if HAS_TRITON:
    import triton
    import triton.language as tl

    SHORT = tl.constexpr(16)  # a longer run has the program's lanes for itself

    @triton.jit
    def _bounds_kernel(
        keys, order, bounds,
        n_elements, n_keys,
        BLOCK: tl.constexpr,
    ):  # fmt: skip
        place = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
        inside = place < n_elements
        key = tl.load(keys + tl.load(order + place, mask=inside, other=0), mask=inside, other=0)
        has_before, has_after = inside & (place > 0), place + 1 < n_elements
        before = tl.load(keys + tl.load(order + place - 1, mask=has_before, other=0), mask=has_before, other=0)
        after = tl.load(keys + tl.load(order + place + 1, mask=has_after, other=0), mask=has_after, other=0)
        tl.store(bounds + key, place.to(tl.int32), mask=inside & ((place == 0) | (before != key)))
        tl.store(bounds + n_keys + key, (place + 1).to(tl.int32), mask=inside & ((place + 1 == n_elements) | (after != key)))

    @triton.jit
    def _rows_at(
        rows, order, row_index, coefficients, place, mask, column, column_mask, D,
        WEIGHTED: tl.constexpr, ACC: tl.constexpr,
    ):  # fmt: skip
        """The rows of the elements at some places of the order, times their coefficients: [places, columns]."""
        element = tl.load(order + place, mask=mask, other=0).to(tl.int64)
        row = tl.load(row_index + element, mask=mask, other=0).to(tl.int64) if WEIGHTED else element
        tile_mask = mask[:, None] & column_mask[None, :]
        tile = tl.load(rows + row[:, None] * D + column[None, :], mask=tile_mask, other=0).to(ACC)
        if WEIGHTED:
            tile *= tl.load(coefficients + element, mask=mask, other=0).to(ACC)[:, None]
        return tile

    @triton.jit
    def add_up_segments(
        rows, order, bounds, row_index, coefficients, out,
        first_key, n_keys, column, column_mask, D,
        KEYS: tl.constexpr, WEIGHTED: tl.constexpr, ACC: tl.constexpr,
    ):  # fmt: skip
        """Some columns of KEYS rows of `out`. Short runs are added side by side, long ones one after the other."""
        key = first_key + tl.arange(0, KEYS)
        start = tl.load(bounds + key, mask=key < n_keys, other=0)
        count = tl.load(bounds + n_keys + key, mask=key < n_keys, other=0) - start
        short = count <= SHORT
        total = tl.zeros([KEYS, column.shape[0]], ACC)
        for k in range(tl.max(tl.where(short, count, 0), axis=0)):
            total += _rows_at(
                rows, order, row_index, coefficients, start + k, short & (k < count), column, column_mask, D, WEIGHTED, ACC
            )
        out_offset = key.to(tl.int64)[:, None] * D + column[None, :]
        out_mask = (short & (key < n_keys))[:, None] & column_mask[None, :]
        tl.store(out + out_offset, total.to(out.dtype.element_ty), mask=out_mask)
        if tl.max(count, axis=0) > SHORT:
            for number in range(KEYS):
                long_start = tl.sum(tl.where(tl.arange(0, KEYS) == number, start, 0), axis=0)
                long_count = tl.sum(tl.where(tl.arange(0, KEYS) == number, count, 0), axis=0)
                if long_count > SHORT:
                    long_total = tl.zeros([KEYS, column.shape[0]], ACC)
                    for k in range(0, long_count, KEYS):
                        lane = k + tl.arange(0, KEYS)
                        long_total += _rows_at(
                            rows, order, row_index, coefficients, long_start + lane, lane < long_count, column, column_mask, D,
                            WEIGHTED, ACC,
                        )  # fmt: skip
                    sums = tl.sum(long_total, axis=0).to(out.dtype.element_ty)
                    tl.store(out + (first_key + number).to(tl.int64) * D + column, sums, mask=column_mask)

    @triton.jit
    def _segments_kernel(
        rows, order, bounds, row_index, coefficients, out,
        n_keys, D,
        KEYS: tl.constexpr, D_BLOCK: tl.constexpr, WEIGHTED: tl.constexpr, ACC: tl.constexpr,
    ):  # fmt: skip
        column = tl.arange(0, D_BLOCK)
        add_up_segments(
            rows, order, bounds, row_index, coefficients, out,
            tl.program_id(0) * KEYS, n_keys, column, column < D, D, KEYS, WEIGHTED, ACC,
        )  # fmt: skip


def tile_elements(rows: Tensor) -> int:
    """Elements of the segments' tile: 8 KB of `rows` (TILE in 16 bits; so many fp32 ones spill on sm_80)."""
    return 2 * TILE // rows.element_size()


def segment_bounds(keys: Tensor, order: Tensor, n_keys: int) -> Tensor:
    """int32 [2, n_keys]: where each key's run starts and ends in `order`; 0 and 0 if it does not occur.

    `order` keeps equal keys together, so a key has one first and one last element, which write its bounds.
    """
    bounds = torch.zeros(2, n_keys, dtype=torch.int32, device=keys.device)
    _bounds_kernel[(triton.cdiv(len(keys), 1024),)](keys, order, bounds, len(keys), n_keys, BLOCK=1024)
    return bounds


def segment_sums(
    rows: Tensor,
    order: Tensor,
    bounds: Tensor,
    dtype: torch.dtype,
    row_index: Tensor | None = None,
    coefficients: Tensor | None = None,
) -> Tensor:
    """Each key's sum of rows, [n_keys, D] in `dtype`, added up in fp32 (fp64 for fp64).

    Parameters
    ----------
    rows
        [N, D]: a row an element; with `row_index`, rows that elements share.
    order
        int [N], the elements, equal keys together.
    bounds
        From `segment_bounds`.
    row_index, coefficients
        Both or none, [N]: the row of each element and its factor.
    """
    width, n_keys = rows.shape[1], bounds.shape[1]
    out = torch.empty(n_keys, width, dtype=dtype, device=rows.device)
    keys = rows_of_tile(width, tile_elements(rows))
    _segments_kernel[(triton.cdiv(n_keys, keys),)](
        rows, order, bounds, row_index, coefficients, out, n_keys, width,
        KEYS=keys, D_BLOCK=row_block(width), WEIGHTED=row_index is not None,
        ACC=tl.float64 if rows.dtype == torch.float64 else tl.float32, num_warps=4,
    )  # fmt: skip
    return out
