"""Softmax attention inside each cell of a packed batch."""

import torch
from torch import Tensor
from torch.nn import functional as F


def attention(query: Tensor, key: Tensor, value: Tensor, cell_offsets: Tensor) -> Tensor:
    """softmax(query · keyᵀ / √d) · value within each cell; cells never see each other.

    Parameters
    ----------
    query, key, value
        [T, H, d]: H heads of width d.
    cell_offsets
        int32 [B+1], where each cell's tokens start; the last is T.

    Returns
    -------
    [T, H, d].
    """
    if not query.shape == key.shape == value.shape or query.ndim != 3:
        raise ValueError(f"query, key and value must be one [T, H, d], not {list(query.shape)}, {list(key.shape)} "
                         f"and {list(value.shape)}")
    lengths = cell_offsets.diff().tolist()
    if sum(lengths) != query.shape[0]:
        raise ValueError(f"cell_offsets end at {sum(lengths)}, the batch has {query.shape[0]} tokens")
    outputs = []
    # torch.split, not slices: the gradient of a split is one concatenation, that of n slices n whole buffers.
    for q, k, v in zip(*(x.transpose(0, 1).split(lengths, 1) for x in (query, key, value)), strict=True):
        outputs.append(F.scaled_dot_product_attention(q[None], k[None], v[None])[0])
    return torch.cat(outputs, 1).transpose(0, 1)


def attention_oracle(query: Tensor, key: Tensor, value: Tensor, cell_offsets: Tensor) -> Tensor:
    """The same by the definition, with one block-diagonal mask over the whole batch."""
    cell = torch.repeat_interleave(torch.arange(len(cell_offsets) - 1), cell_offsets.diff())
    scores = torch.einsum("qhd,khd->hqk", query, key) / query.shape[-1] ** 0.5
    scores = scores.masked_fill(cell[:, None] != cell[None, :], float("-inf"))
    return torch.einsum("hqk,khd->qhd", scores.softmax(-1), value)
