"""Rows of a per-gene table, with a gradient whose sums have a fixed order."""

import torch
from torch import Tensor
from torch.nn import functional as F


class _TableRows(torch.autograd.Function):
    """table[genes], whose gradient sums each gene's tokens segment by segment, in the order of the tokens."""

    @staticmethod
    def forward(ctx, table: Tensor, genes: Tensor, gene_order: Tensor) -> Tensor:
        ctx.save_for_backward(genes, gene_order)
        ctx.rows = table.shape[0]
        return F.embedding(genes, table)

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor, None, None]:
        genes, order = ctx.saved_tensors
        # Tokens sorted by gene make every row one run: no two writers share a row, and the sum's order is fixed.
        dtype = torch.promote_types(grad.dtype, torch.float32)
        table_grad = grad.new_zeros(ctx.rows, grad.shape[1], dtype=dtype)
        table_grad.index_add_(0, genes[order], grad[order].to(dtype))
        return table_grad.to(grad.dtype), None, None


def table_rows(table: Tensor, genes: Tensor, gene_order: Tensor) -> Tensor:
    """table[genes], [T, D].

    Parameters
    ----------
    table
        [V, D].
    genes
        int32 [T], rows of the table.
    gene_order
        int32 [T], an order of the tokens in which equal genes are neighbours and keep theirs (made on the host): the
        segments of the table's gradient, which is summed in fp32.
    """
    if table.ndim != 2 or genes.shape != gene_order.shape:
        raise ValueError(f"table must be [V, D] and genes and gene_order have one element a token, not {list(table.shape)}, "
                         f"{list(genes.shape)} and {list(gene_order.shape)}")
    return _TableRows.apply(table, genes, gene_order)
