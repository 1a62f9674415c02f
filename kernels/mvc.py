"""Masked value prediction from the cell embedding (MVC, scGPT's name): gene query · cell embedding."""

import torch
from torch import Tensor


def mvc(
    queries: Tensor, query_index: Tensor, cell_embedding: Tensor, cell_index: Tensor, targets: Tensor
) -> tuple[Tensor, Tensor]:
    """Predict each masked gene's value as its query times its cell's embedding and add up the squared errors, in fp32.

    Parameters
    ----------
    queries
        [U, D], one a distinct masked gene.
    query_index, cell_index
        integer [M]: the query and the cell of each masked token.
    cell_embedding
        [B, D].
    targets
        float32 [M].

    Returns
    -------
    (sum over tokens of (prediction − target)², a scalar; predictions [M]), float32 (float64 for float64 inputs).
    """
    if queries.shape[1:] != cell_embedding.shape[1:]:
        raise ValueError(f"queries and cell_embedding differ in width: {queries.shape[1]} and {cell_embedding.shape[1]}")
    if not query_index.shape == cell_index.shape == targets.shape:
        raise ValueError("query_index, cell_index and targets must have one element a masked token")
    dtype = torch.promote_types(queries.dtype, torch.float32)
    # One product of all queries with all cells, then a pick: never a [M, D] copy of either side.
    products = queries.to(dtype) @ cell_embedding.to(dtype).T  # [U, B]
    predictions = products.flatten().index_select(0, query_index.long() * cell_embedding.shape[0] + cell_index)
    return (predictions - targets).square().sum(), predictions


def mvc_oracle(queries, query_index, cell_embedding, cell_index, targets) -> tuple[Tensor, Tensor]:
    """The same by the definition, with gathered copies."""
    predictions = (queries[query_index.long()] * cell_embedding[cell_index.long()]).sum(1)
    return ((predictions - targets) ** 2).sum(), predictions
