"""Rows of a table plus rows of states, in one pass in C on a CPU (added_rows.c)."""

import ctypes
from functools import cache
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional as F

from scbench.kernels import backend, threads
from scbench.kernels.row_sums import DTYPES, sum_rows

SOURCE = Path(__file__).with_name("added_rows.c")


class _Job(ctypes.Structure):
    _fields_ = [
        *((name, ctypes.c_void_p) for name in ("table", "genes", "states", "index", "out")),
        *((name, ctypes.c_int64) for name in ("n", "width")),
        ("bf16", ctypes.c_int32), ("taken", ctypes.c_int64),
    ]  # fmt: skip


@cache
def library() -> ctypes.CDLL | None:
    """The compiled code; None where there is no compiler."""
    found = backend.compiled(SOURCE)
    if found is not None:
        found.add_rows.argtypes, found.add_rows.restype = [ctypes.c_void_p], None
    return found


def _sums(table: Tensor, genes: Tensor, states: Tensor, index: Tensor) -> Tensor:
    if table.dtype not in DTYPES or states.dtype != torch.float32 or not backend.use_native(table) or library() is None:
        return F.embedding(index, states).add_(F.embedding(genes, table)).to(table.dtype)
    if len(genes) and not 0 <= int(genes.min()) <= int(genes.max()) < len(table):  # C would read whatever is there
        raise IndexError(f"genes hold numbers outside 0 … {len(table) - 1}")
    table, genes, states, index = table.contiguous(), genes.long().contiguous(), states.contiguous(), index.contiguous()
    out = torch.empty(len(genes), table.shape[1], dtype=table.dtype)
    threads.run(library().add_rows, _Job(
        table=table.data_ptr(), genes=genes.data_ptr(), states=states.data_ptr(), index=index.data_ptr(), out=out.data_ptr(),
        n=len(genes), width=table.shape[1], bf16=table.dtype == torch.bfloat16,
    ))  # fmt: skip
    return out


class _AddedRows(torch.autograd.Function):
    """Keeps the indices alone."""

    @staticmethod
    def forward(ctx, table: Tensor, genes: Tensor, gene_order: Tensor, states: Tensor, index: Tensor) -> Tensor:
        ctx.save_for_backward(genes, gene_order, index)
        ctx.sums = (len(table), table.dtype), (len(states), states.dtype)
        return _sums(table, genes, states, index)

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor | None, ...]:
        genes, gene_order, index = ctx.saved_tensors
        of_table, of_states = ctx.sums
        grad_states = sum_rows(grad, index, torch.argsort(index, stable=True), *of_states)
        return sum_rows(grad, genes, gene_order, *of_table), None, None, grad_states, None


def added_rows(table: Tensor, genes: Tensor, gene_order: Tensor, states: Tensor, index: Tensor) -> Tensor:
    """table[genes] + states[index], [T, D] in the table's dtype, the sum in fp32 (fp64 if one of the dtypes is).

    Parameters
    ----------
    table, genes, gene_order
        [V, D], int [T], and int [T], the tokens sorted by gene.
    states, index
        [S, D] in fp32 or fp64, and int64 [T].
    """
    return _AddedRows.apply(table, genes, gene_order, states, index)
