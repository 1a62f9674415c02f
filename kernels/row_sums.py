"""Sums of rows that share a key, in C on a CPU (row_sums.c): gradients of tables whose rows were looked up.

The Triton kernels have their own (segments.py).
"""

import ctypes
from functools import cache
from pathlib import Path

import torch
from torch import Tensor

from scbench.kernels import backend, threads

SOURCE = Path(__file__).with_name("row_sums.c")
WIDEST = 16384  # the C file's
DTYPES = torch.bfloat16, torch.float32


class _Job(ctypes.Structure):
    _fields_ = [
        *((name, ctypes.c_void_p) for name in ("rows", "keys", "order", "out")),
        *((name, ctypes.c_int64) for name in ("n", "n_keys", "width")),
        ("rows_bf16", ctypes.c_int32), ("out_bf16", ctypes.c_int32), ("taken", ctypes.c_int64),
    ]  # fmt: skip


@cache
def library() -> ctypes.CDLL | None:
    """The compiled code; None where there is no compiler."""
    found = backend.compiled(SOURCE)
    if found is not None:
        found.sum_rows.argtypes, found.sum_rows.restype = [ctypes.c_void_p], None
    return found


def sum_rows(rows: Tensor, keys: Tensor, order: Tensor, n_keys: int, dtype: torch.dtype) -> Tensor:
    """Each key's sum of rows, [n_keys, D] in `dtype`, added up in the order's order in fp32 (fp64 if one of the dtypes is).

    Parameters
    ----------
    rows
        [N, D], on a CPU or a GPU.
    keys
        int [N], each in 0 … n_keys − 1.
    order
        int [N]: the rows, sorted by key.
    """
    order = order.long()
    sorted_keys = keys.long()[order]
    native = rows.dtype in DTYPES and dtype in DTYPES and rows.shape[1] <= WIDEST and backend.use_native(rows)
    if native and library() is not None:
        rows, out = rows.contiguous(), torch.empty(n_keys, rows.shape[1], dtype=dtype)
        threads.run(library().sum_rows, _Job(
            rows=rows.data_ptr(), keys=sorted_keys.data_ptr(), order=order.data_ptr(), out=out.data_ptr(), n=len(order),
            n_keys=n_keys, width=rows.shape[1], rows_bf16=rows.dtype == torch.bfloat16, out_bf16=dtype == torch.bfloat16,
        ))  # fmt: skip
        return out
    # Rows sorted by key make every key one run: no two writers share a sum, and its order is fixed.
    sum_dtype = torch.promote_types(torch.promote_types(rows.dtype, dtype), torch.float32)
    sums = rows.new_zeros(n_keys, rows.shape[1], dtype=sum_dtype)
    return sums.index_add_(0, sorted_keys, rows[order].to(sums.dtype)).to(dtype)
