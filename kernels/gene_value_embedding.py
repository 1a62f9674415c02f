"""Token states: the gene's table row plus an MLP of its value, in one pass.

    out[t] = table[genes[t]] + W₂ relu(w values[t] + b) + b₂

In Triton the MLP is evaluated as a piecewise-linear function of one scalar (kernels/gene_value_embedding_triton.py):
a token costs D multiply-adds, not D², and nothing of size [T, D] is kept for the backward pass. Elsewhere plain PyTorch; on
a CPU the MLP is evaluated once a distinct value: most counts are small, and all masked genes have the value −1.

Layout: [T, D] and [V, D] row-major, a tile of whole rows in registers (D ≤ 4096). The value MLP in fp32 (fp64 for fp64).

Races: a program writes its own rows of `out`, its own rows and columns of ∂table, its own chunk's partial sums (why no two
share a number: see that file) and its own tile of ∂W₂.

Bytes that must move, e the size of an element, W the distinct genes, P = e (D² + 4 D) the MLP's parameters:
    forward     W D e + T D e + 8 T + P     (rows that occur, out, genes and values, parameters)
    backward    T D e + V D e + 12 T + 2 P     (∂out, ∂table; genes, values and order; parameters and their gradients)
    besides     forward 4 T of buckets, 8 D (D + 1) of pieces written, those that occur read; backward 16 T for the sort by
                bucket (a device's needs several times that) and 12 T of it read, twice 8 D a partial sum, one a chunk of 256
                tokens and bucket that occurs in it, and in each launch but the first 24 T of genes, values and orders again
"""

import torch
from torch import Tensor

from scbench.kernels import backend
from scbench.kernels.added_rows import added_rows
from scbench.kernels.checks import FLOATS, INDICES, VALUES, check, check_order
from scbench.kernels.gene_value_embedding_triton import launch_backward, launch_forward
from scbench.kernels.linear import linear
from scbench.kernels.table_rows import table_rows


class _GeneValueEmbedding(torch.autograd.Function):
    """Keeps its inputs but the table, and 4 bytes a token."""

    @staticmethod
    def forward(ctx, genes, values, gene_order, table, weight1, bias1, weight2, bias2, save: bool) -> Tensor:
        genes, values, gene_order = genes.contiguous(), values.contiguous(), gene_order.contiguous()
        table, *parameters = (x.contiguous() for x in (table, weight1, bias1, weight2, bias2))
        out, *kept = launch_forward(genes, values, table, *parameters, save)
        ctx.save_for_backward(genes, values, gene_order, *kept, *parameters[:3])
        ctx.table_shape = table.shape
        return out

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor | None, ...]:
        *kept, weight1, bias1, weight2 = ctx.saved_tensors
        grads = launch_backward(grad.contiguous(), *kept, ctx.table_shape, weight1, bias1, weight2)
        return None, None, None, *grads, None


def gene_value_embedding(
    genes: Tensor,
    values: Tensor,
    gene_order: Tensor,
    table: Tensor,
    weight1: Tensor,
    bias1: Tensor,
    weight2: Tensor,
    bias2: Tensor,
) -> Tensor:
    """table[genes] + weight2 · relu(weight1 · value + bias1) + bias2, the value MLP in fp32 (fp64 for fp64 weights).

    Parameters
    ----------
    genes
        int32 or int64 [T], rows of the table.
    values
        float32 [T] (float64 will do for float64 weights): log1p counts, 0 at `<cls>`, −1 where masked.
    gene_order
        int32 or int64 [T], the tokens sorted by gene, stable (made on the host): the segments of the table's gradient.
    table
        [V, D].
    weight1, bias1, weight2, bias2
        [D, 1], [D], [D, D], [D] in the table's dtype: the value MLP 1 → D → D with ReLU.

    Returns
    -------
    [T, D] in the table's dtype.
    """
    if table.ndim != 2 or weight2.shape != (table.shape[1], table.shape[1]) or weight1.shape != (table.shape[1], 1):
        raise ValueError(f"table, weight1 and weight2 must be [V, D], [D, 1] and [D, D], not {list(table.shape)}, "
                         f"{list(weight1.shape)} and {list(weight2.shape)}")
    if not bias1.shape == bias2.shape == table.shape[1:]:
        raise ValueError(f"bias1 and bias2 must be [D], not {list(bias1.shape)} and {list(bias2.shape)}")
    if genes.ndim != 1 or not genes.shape == values.shape == gene_order.shape:
        raise ValueError("genes, values and gene_order must have one element a token")
    check(table.device, FLOATS, table=table)
    check(table.device, (table.dtype,), weight1=weight1, bias1=bias1, weight2=weight2, bias2=bias2)
    check(table.device, INDICES, genes=genes, gene_order=gene_order)
    check(table.device, VALUES, values=values)
    if backend.DEBUG:
        check_order("genes", genes, "gene_order", gene_order, table.shape[0])
    if backend.use_triton(table):
        trained = (table, weight1, bias1, weight2, bias2)
        save = torch.is_grad_enabled() and any(x.requires_grad for x in trained)
        return _GeneValueEmbedding.apply(genes, values, gene_order, *trained, save)
    dtype = torch.promote_types(table.dtype, torch.float32)
    # a GPU's host would wait for the number of distinct values
    each, index = values.unique(return_inverse=True) if backend.use_native(values) else (values, None)
    hidden = torch.relu(each.to(dtype)[:, None] * weight1.to(dtype)[:, 0] + bias1.to(dtype))
    states = linear(hidden, weight2.to(dtype), bias2.to(dtype))
    if index is not None:
        return added_rows(table, genes, gene_order, states, index)
    return (states + table_rows(table, genes, gene_order)).to(table.dtype)


def gene_value_embedding_oracle(genes, values, table, weight1, bias1, weight2, bias2) -> Tensor:
    """The same by the definition, in the inputs' own precision."""
    return table[genes.long()] + torch.relu(values[:, None] @ weight1.T + bias1) @ weight2.T + bias2
