"""Sums of rows that share a key, without atomics: sorted by key, each key's rows are one run.

    out[k] = Σ coefficient[i] · rows[i]  over the i with keys[i] = k, in the order's order

A program takes a tile of keys, finds their runs by binary search and writes their rows of `out`, zeros where a key does not
occur: every row of `out` is written once, by one program, and nothing else is.
"""

import torch
from torch import Tensor

from scbench.kernels.backend import HAS_TRITON
from scbench.kernels.row_tiles import TILE, row_block, rows_of_tile, triton_accumulator

if HAS_TRITON:
    import triton
    import triton.language as tl

    SHORT = tl.constexpr(16)  # a longer run has the program's lanes for itself

    @triton.jit
    def first_places(keys, order, key, n_elements, search_steps):
        """For each `key` (any shape) how many elements have a smaller one: where its run starts, by binary search.

        No `order` if `keys` ascend; `search_steps` is n_elements.bit_length(), halvings that leave one of n + 1 places.
        """
        low = key * 0
        high = low + n_elements
        for _ in range(search_steps):
            middle = low + (high - low) // 2
            element = middle if order is None else tl.load(order + middle, mask=low < high, other=0)
            smaller = (low < high) & (tl.load(keys + element, mask=low < high, other=0) < key)
            low = tl.where(smaller, middle + 1, low)
            high = tl.where(smaller, high, middle)
        return low

    @triton.jit
    def _rows_at(
        rows, order, row_index, predictions, targets, grad_loss, place, mask, column, column_mask, D,
        ERRORS: tl.constexpr, ACC: tl.constexpr,
    ):  # fmt: skip
        """The rows of the elements at some places of the order, times their coefficients: [places, columns]."""
        element = tl.load(order + place, mask=mask, other=0).to(tl.int64)
        row = tl.load(row_index + element, mask=mask, other=0).to(tl.int64) if ERRORS else element
        tile_mask = mask[:, None] & column_mask[None, :]
        tile = tl.load(rows + row[:, None] * D + column[None, :], mask=tile_mask, other=0).to(ACC)
        if ERRORS:
            error = tl.load(predictions + element, mask=mask, other=0) - tl.load(targets + element, mask=mask, other=0)
            tile *= (2 * tl.load(grad_loss) * error).to(ACC)[:, None]
        return tile

    @triton.jit
    def add_up_segments(
        rows, keys, order, row_index, predictions, targets, grad_loss, out,
        first_key, n_elements, n_keys, search_steps, column, column_mask, D,
        KEYS: tl.constexpr, ERRORS: tl.constexpr, ACC: tl.constexpr,
    ):  # fmt: skip
        """Some columns of KEYS rows of `out`. Short runs are added side by side, long ones one after the other."""
        key = first_key + tl.arange(0, KEYS)
        bounds = key[:, None] + tl.arange(0, 2)[None, :]  # a run ends where the next key's starts
        start, stop = tl.split(first_places(keys, order, bounds, n_elements, search_steps))
        count = stop - start
        short = count <= SHORT
        total = tl.zeros([KEYS, column.shape[0]], ACC)
        for k in range(tl.max(tl.where(short, count, 0), axis=0)):
            total += _rows_at(
                rows, order, row_index, predictions, targets, grad_loss, start + k, short & (k < count),
                column, column_mask, D, ERRORS, ACC,
            )  # fmt: skip
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
                            rows, order, row_index, predictions, targets, grad_loss, long_start + lane, lane < long_count,
                            column, column_mask, D, ERRORS, ACC,
                        )  # fmt: skip
                    sums = tl.sum(long_total, axis=0).to(out.dtype.element_ty)
                    tl.store(out + (first_key + number).to(tl.int64) * D + column, sums, mask=column_mask)

    @triton.jit
    def _segments_kernel(
        rows, keys, order, row_index, predictions, targets, grad_loss, out,
        n_elements, n_keys, search_steps, D,
        KEYS: tl.constexpr, D_BLOCK: tl.constexpr, ERRORS: tl.constexpr, ACC: tl.constexpr,
    ):  # fmt: skip
        column = tl.arange(0, D_BLOCK)
        add_up_segments(
            rows, keys, order, row_index, predictions, targets, grad_loss, out,
            tl.program_id(0) * KEYS, n_elements, n_keys, search_steps, column, column < D, D, KEYS, ERRORS, ACC,
        )  # fmt: skip


def tile_elements(rows: Tensor) -> int:
    """Elements of the segments' tile: 8 KB of `rows` (TILE in 16 bits; so many fp32 ones spill on sm_80)."""
    return 2 * TILE // rows.element_size()


def segment_sums(
    rows: Tensor,
    keys: Tensor,
    order: Tensor,
    n_keys: int,
    dtype: torch.dtype,
    row_index: Tensor | None = None,
    predictions: Tensor | None = None,
    targets: Tensor | None = None,
    grad_loss: Tensor | None = None,
) -> Tensor:
    """Each key's sum of rows, [n_keys, D] in `dtype`, added up in fp32 (fp64 if one of the dtypes is).

    Parameters
    ----------
    rows
        [N, D]: a row an element; with `row_index`, rows that elements share.
    keys
        int [N], each in 0 … n_keys − 1.
    order
        int [N]: the elements, sorted by key.
    row_index, predictions, targets, grad_loss
        All or none, [N] and a scalar: the row of each element, and its coefficient 2 (prediction − target) · grad_loss.
    """
    width, keys_of_tile = rows.shape[1], rows_of_tile(rows.shape[1], tile_elements(rows))
    out = torch.empty(n_keys, width, dtype=dtype, device=rows.device)
    _segments_kernel[(triton.cdiv(n_keys, keys_of_tile),)](
        rows, keys, order, row_index, predictions, targets, grad_loss, out,
        len(keys), n_keys, len(keys).bit_length(), width,
        KEYS=keys_of_tile, D_BLOCK=row_block(width), ERRORS=row_index is not None,
        ACC=triton_accumulator(rows.dtype, dtype), num_warps=4,
    )  # fmt: skip
    return out
