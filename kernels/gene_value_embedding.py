"""Token states: the gene's table row plus an MLP of its value."""

import torch
from torch import Tensor
from torch.nn import functional as F

from scbench.kernels.table_rows import table_rows


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
        int32 [T], rows of the table.
    values
        float32 [T]: log1p counts, 0 at `<cls>`, −1 where masked.
    gene_order
        int32 [T], a stable sort of `genes` (made on the host): the segments of the table's gradient.
    table
        [V, D].
    weight1, bias1, weight2, bias2
        [D, 1], [D], [D, D], [D]: the value MLP 1 → D → D with ReLU.

    Returns
    -------
    [T, D] in the table's dtype.
    """
    if table.ndim != 2 or weight2.shape != (table.shape[1], table.shape[1]) or weight1.shape != (table.shape[1], 1):
        raise ValueError(f"table, weight1 and weight2 must be [V, D], [D, 1] and [D, D], not {list(table.shape)}, "
                         f"{list(weight1.shape)} and {list(weight2.shape)}")
    if not genes.shape == values.shape == gene_order.shape:
        raise ValueError("genes, values and gene_order must have one element a token")
    dtype = torch.promote_types(table.dtype, torch.float32)
    hidden = torch.relu(values.to(dtype)[:, None] * weight1.to(dtype)[:, 0] + bias1.to(dtype))
    states = F.linear(hidden, weight2.to(dtype), bias2.to(dtype))
    return (states + table_rows(table, genes, gene_order)).to(table.dtype)


def gene_value_embedding_oracle(genes, values, table, weight1, bias1, weight2, bias2) -> Tensor:
    """The same by the definition, in the inputs' own precision."""
    return table[genes.long()] + torch.relu(values[:, None] @ weight1.T + bias1) @ weight2.T + bias2
