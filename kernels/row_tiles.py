"""How the row-wise kernels cut [rows, D] tensors: a tile holds a few whole rows, a program a few tiles.

Also the sum of the programs' partial results: every parameter gradient here is first summed by each program over its own
rows and then over the programs, in a fixed order.
"""

import torch
from torch import Tensor

from scbench.kernels.backend import HAS_TRITON

TILE = 4096  # elements of a tile: 32 a thread and operand at 4 warps, one to three 16-byte loads in flight
PROGRAM_ROWS = 64  # rows a program adds up where it writes a partial: 8·D bytes against at least 64·D·2 read

if HAS_TRITON:
    import triton
    import triton.language as tl

    @triton.jit
    def _column_sums_kernel(
        partials, sums,
        n_rows, n_columns,
        ROWS: tl.constexpr, COLUMNS: tl.constexpr,
    ):  # fmt: skip
        columns = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
        total = tl.zeros([ROWS, COLUMNS], partials.dtype.element_ty)
        for start in range(0, n_rows, ROWS):
            rows = (start + tl.arange(0, ROWS)).to(tl.int64)
            mask = (rows < n_rows)[:, None] & (columns < n_columns)[None, :]
            total += tl.load(partials + rows[:, None] * n_columns + columns[None, :], mask=mask, other=0)
        tl.store(sums + columns, tl.sum(total, axis=0), mask=columns < n_columns)


def row_block(width: int) -> int:
    """Columns of a tile: the power of two that holds a row of `width` (at least 4: one word of the generator)."""
    return max(4, triton.next_power_of_2(width))


def rows_of_tile(width: int, tile: int = TILE) -> int:
    """Rows of a tile of about `tile` elements, a power of two."""
    return max(1, tile // row_block(width))


def accumulator(*dtypes: torch.dtype) -> torch.dtype:
    """The dtype in which operands of these dtypes are summed: float64 if one is float64, else float32."""
    return torch.float64 if torch.float64 in dtypes else torch.float32


def triton_accumulator(*dtypes: torch.dtype):
    """The same as a Triton type, for the kernels' ACC."""
    return tl.float64 if torch.float64 in dtypes else tl.float32


def column_sums(partials: Tensor) -> Tensor:
    """The sum of the rows of [P, N], each program's partial one row; [N] in the same dtype (float32 or float64).

    Programs own disjoint columns, so no two write the same element, and the order of the sum is fixed.
    """
    n_rows, n_columns = partials.shape
    sums = torch.empty(n_columns, dtype=partials.dtype, device=partials.device)
    columns = 32  # one 128-byte line a row of the tile
    _column_sums_kernel[(triton.cdiv(n_columns, columns),)](partials, sums, n_rows, n_columns, ROWS=32, COLUMNS=columns)
    return sums
