"""Each op as plain PyTorch is usually written for it: what the kernels are compared with.

Same arguments as the public ops; all cells have the same number of tokens, so that "padded" costs nothing here. Dropout
draws from torch's generator.
"""

import torch
from torch import Tensor
from torch.nn import functional as F


def gene_value_embedding(genes, values, gene_order, table, weight1, bias1, weight2, bias2) -> Tensor:
    """Table row plus the value MLP, as two layers."""
    hidden = torch.relu(F.linear(values[:, None].to(weight1.dtype), weight1, bias1))
    return F.embedding(genes, table) + F.linear(hidden, weight2, bias2)


def table_rows(table, genes, gene_order) -> Tensor:
    """nn.Embedding."""
    return F.embedding(genes, table)


def masked_regression(hidden, weight, bias, targets) -> tuple[Tensor, Tensor]:
    """Last layer, squared error."""
    predictions = F.linear(hidden, weight, bias)[:, 0].to(targets.dtype)
    return (predictions - targets).square().sum(), predictions


def mvc(queries, query_index, query_order, cell_embedding, cell_index, targets) -> tuple[Tensor, Tensor]:
    """Gathered queries times gathered cell embeddings, squared error."""
    predictions = (queries[query_index] * cell_embedding[cell_index]).sum(1).to(targets.dtype)
    return (predictions - targets).square().sum(), predictions


def dropout(x, token_keys, probability) -> Tensor:
    """torch's fused dropout, which keeps a mask."""
    return x if token_keys is None else torch.native_dropout(x, probability, True)[0]


def add_norm(x, residual, weight, bias, token_keys, probability) -> Tensor:
    """Dropout, addition, LayerNorm."""
    return F.layer_norm(residual + dropout(x, token_keys, probability), weight.shape, weight, bias)


def relu_dropout(x, token_keys, probability) -> Tensor:
    """ReLU, dropout."""
    return dropout(torch.relu(x), token_keys, probability)


def attention(query, key, value, cell_offsets, *, scale=None, token_keys=None, probability=0.0) -> Tensor:
    """softmax(q kᵀ) v with the probabilities in memory."""
    cells = len(cell_offsets) - 1
    q, k, v = (x.unflatten(0, (cells, -1)).transpose(1, 2) for x in (query, key, value))  # [B, H, S, d]
    scores = q @ k.transpose(2, 3) * (query.shape[2] ** -0.5 if scale is None else scale)
    probabilities = dropout(torch.softmax(scores, -1), token_keys, probability)
    return (probabilities @ v).transpose(1, 2).flatten(0, 1)


def selective_scan(x, step, decay, input_matrix, output_matrix, skip, cell_offsets) -> Tensor:
    """Place by place with all factors in memory, as the reference implementation beside Mamba's own kernel."""
    cells, dtype = len(cell_offsets) - 1, torch.promote_types(x.dtype, torch.float32)
    u, delta, b, c = (rows.unflatten(0, (cells, -1)).to(dtype) for rows in (x, step, input_matrix, output_matrix))
    factors = torch.exp(delta[..., None] * decay)  # [B, S, E, N]
    inputs = (delta * u)[..., None] * b[:, :, None]
    state, rows = torch.zeros_like(inputs[:, 0]), []
    for factor, new, out in zip(factors.unbind(1), inputs.unbind(1), c.unbind(1), strict=True):
        state = factor * state + new
        rows.append((state @ out[..., None])[..., 0])
    return (torch.stack(rows, 1) + u * skip).flatten(0, 1).to(x.dtype)


def causal_conv(x, weight, bias, cell_offsets) -> Tensor:
    """torch's depthwise Conv1d, padded to the left by cutting the right."""
    rows = x.unflatten(0, (len(cell_offsets) - 1, -1)).transpose(1, 2)
    taps = weight.shape[1]
    mixed = F.conv1d(rows, weight[:, None], bias, padding=taps - 1, groups=len(weight))[..., : rows.shape[2]]
    return mixed.transpose(1, 2).flatten(0, 1)
