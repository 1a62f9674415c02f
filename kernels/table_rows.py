"""Rows of a per-gene table, with a gradient whose sums have a fixed order.

    out[t] = table[genes[t]],   ∂table[v] = Σ ∂out[t] over the tokens t of gene v, in `gene_order`'s order, in fp32

The gradient is made by segments (kernels/segments.py) in one launch: no atomics, and rows without tokens are written as zeros
in the same pass. Layout: [V, D] and [T, D] row-major, a tile of whole rows in registers (D ≤ 16384).

Races: a program writes only its own rows of `out`; each row of ∂table has one program.

Bytes that must move, e the size of an element and W the distinct genes:
    forward     W D e + T D e + 4 T     (rows that occur, which fit the cache; out; genes)
    backward    T D e + V D e + 8 T     (∂out, ∂table, genes and gene_order)
    besides     nothing: the searches stay within genes and gene_order
"""

import torch
from torch import Tensor
from torch.nn import functional as F

from scbench.kernels import backend
from scbench.kernels.checks import FLOATS, INDICES, check, check_order
from scbench.kernels.row_sums import sum_rows
from scbench.kernels.row_tiles import row_block, rows_of_tile
from scbench.kernels.segments import segment_sums

if backend.HAS_TRITON:
    import triton
    import triton.language as tl

    @triton.jit
    def _forward_kernel(
        table, genes, out,
        n_tokens, D,
        ROWS: tl.constexpr, D_BLOCK: tl.constexpr,
    ):  # fmt: skip
        column = tl.arange(0, D_BLOCK)
        token = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
        gene = tl.load(genes + token, mask=token < n_tokens, other=0).to(tl.int64)
        mask = (token < n_tokens)[:, None] & (column < D)[None, :]
        rows = tl.load(table + gene[:, None] * D + column[None, :], mask=mask, other=0)
        tl.store(out + token[:, None] * D + column[None, :], rows, mask=mask)


def _launch_forward(table: Tensor, genes: Tensor) -> Tensor:
    """Tile: TILE elements of whole rows, 4 warps."""
    width, rows = table.shape[1], rows_of_tile(table.shape[1])
    out = torch.empty(len(genes), width, dtype=table.dtype, device=table.device)
    _forward_kernel[(triton.cdiv(len(genes), rows),)](
        table, genes, out, len(genes), width, ROWS=rows, D_BLOCK=row_block(width), num_warps=4
    )
    return out


class _TableRowsTriton(torch.autograd.Function):
    """table[genes] and the segments' sums."""

    @staticmethod
    def forward(ctx, table: Tensor, genes: Tensor, gene_order: Tensor) -> Tensor:
        genes, gene_order = genes.contiguous(), gene_order.contiguous()
        ctx.save_for_backward(genes, gene_order)
        ctx.rows = table.shape[0]
        return _launch_forward(table.contiguous(), genes)

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor, None, None]:
        genes, gene_order = ctx.saved_tensors
        return segment_sums(grad.contiguous(), genes, gene_order, ctx.rows, grad.dtype), None, None


class _TableRows(torch.autograd.Function):
    """The same in PyTorch, the sums in C on a CPU (row_sums.py)."""

    @staticmethod
    def forward(ctx, table: Tensor, genes: Tensor, gene_order: Tensor) -> Tensor:
        ctx.save_for_backward(genes, gene_order)
        ctx.rows = table.shape[0]
        return F.embedding(genes, table)

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor, None, None]:
        return sum_rows(grad, *ctx.saved_tensors, ctx.rows, grad.dtype), None, None


def table_rows(table: Tensor, genes: Tensor, gene_order: Tensor) -> Tensor:
    """table[genes], [T, D].

    Parameters
    ----------
    table
        [V, D].
    genes
        int32 or int64 [T], rows of the table.
    gene_order
        int32 or int64 [T], the tokens sorted by gene, stable (made on the host): the segments of the table's gradient, which
        is summed in fp32.
    """
    if table.ndim != 2 or genes.ndim != 1 or genes.shape != gene_order.shape:
        raise ValueError(f"table must be [V, D] and genes and gene_order have one element a token, not {list(table.shape)}, "
                         f"{list(genes.shape)} and {list(gene_order.shape)}")
    check(table.device, FLOATS, table=table)
    check(table.device, INDICES, genes=genes, gene_order=gene_order)
    if backend.DEBUG:
        check_order("genes", genes, "gene_order", gene_order, table.shape[0])
    function = _TableRowsTriton if backend.use_triton(table) else _TableRows
    return function.apply(table, genes, gene_order)


def table_rows_oracle(table: Tensor, genes: Tensor) -> Tensor:
    """The same by the definition."""
    return torch.stack([table[gene] for gene in genes.tolist()])
