"""Softmax attention inside each cell of a packed batch."""

from collections.abc import Iterator

import torch
from torch import Tensor
from torch.nn import functional as F


def _heads_first(start: int, stop: int, *tensors: Tensor) -> Iterator[Tensor]:
    """One cell's [n, H, d] rows as [H, n, d] views."""
    return (x[start:stop].transpose(0, 1) for x in tensors)


def _probabilities(query: Tensor, key: Tensor) -> Tensor:
    """softmax(query · keyᵀ / √d) of one cell: [H, n, d] twice → [H, n, n]; the softmax itself is computed in fp32."""
    scores = torch.baddbmm(query.new_empty(1), query, key.transpose(1, 2), beta=0, alpha=query.shape[-1] ** -0.5)
    return torch.softmax(scores, -1)


class _CellAttention(torch.autograd.Function):
    """Attention cell by cell in matrix products: on a CPU with bf16 instructions twice as fast as torch's own kernel in
    bf16 (in fp32 torch's is faster). Saves its inputs only: the backward computes the probabilities again,
    which keeps memory at one cell's [H, n, n]."""

    @staticmethod
    def forward(ctx, query: Tensor, key: Tensor, value: Tensor, cell_offsets: Tensor) -> Tensor:
        ctx.save_for_backward(query, key, value)
        ctx.offsets = cell_offsets.tolist()
        output = torch.empty_like(query, memory_format=torch.contiguous_format)
        for start, stop in zip(ctx.offsets, ctx.offsets[1:], strict=False):
            q, k, v, out = _heads_first(start, stop, query, key, value, output)
            out.copy_(torch.bmm(_probabilities(q, k), v))
        return output

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor, Tensor, Tensor, None]:
        inputs = ctx.saved_tensors
        scale = grad.shape[-1] ** -0.5
        grads = [torch.empty_like(x, memory_format=torch.contiguous_format) for x in inputs]
        for start, stop in zip(ctx.offsets, ctx.offsets[1:], strict=False):
            q, k, v, g, grad_q, grad_k, grad_v = _heads_first(start, stop, *inputs, grad, *grads)
            p = _probabilities(q, k)
            grad_v.copy_(torch.bmm(p.transpose(1, 2), g))
            grad_p = torch.bmm(g, v.transpose(1, 2))
            grad_scores = torch.ops.aten._softmax_backward_data(grad_p, p, -1, p.dtype)
            grad_q.copy_(torch.bmm(grad_scores, k)).mul_(scale)
            grad_k.copy_(torch.bmm(grad_scores.transpose(1, 2), q)).mul_(scale)
        return *grads, None


def attention(query: Tensor, key: Tensor, value: Tensor, cell_offsets: Tensor) -> Tensor:
    """softmax(query · keyᵀ / √d) · value within each cell; cells never see each other.

    Parameters
    ----------
    query, key, value
        [T, H, d]: H heads of width d. In bf16 the scores are rounded to bf16, as every layer's output is.
    cell_offsets
        int32 [B+1], where each cell's tokens start; the last is T.

    Returns
    -------
    [T, H, d].
    """
    if not query.shape == key.shape == value.shape or query.ndim != 3:
        raise ValueError(f"query, key and value must be one [T, H, d], not {list(query.shape)}, {list(key.shape)} "
                         f"and {list(value.shape)}")
    if int(cell_offsets[-1]) != query.shape[0]:
        raise ValueError(f"cell_offsets end at {int(cell_offsets[-1])}, the batch has {query.shape[0]} tokens")
    if query.dtype == torch.bfloat16 and query.device.type == "cpu":
        return _CellAttention.apply(query, key, value, cell_offsets)
    lengths = cell_offsets.diff().tolist()
    # torch.split, not slices: the gradient of a split is one concatenation, that of n slices n whole buffers.
    cells = zip(*(x.transpose(0, 1).split(lengths, 1) for x in (query, key, value)), strict=True)
    return torch.cat([F.scaled_dot_product_attention(q[None], k[None], v[None])[0] for q, k, v in cells], 1).transpose(0, 1)


def attention_oracle(query: Tensor, key: Tensor, value: Tensor, cell_offsets: Tensor) -> Tensor:
    """The same by the definition, with one block-diagonal mask over the whole batch."""
    cell = torch.repeat_interleave(torch.arange(len(cell_offsets) - 1), cell_offsets.diff())
    scores = torch.einsum("qhd,khd->hqk", query, key) / query.shape[-1] ** 0.5
    scores = scores.masked_fill(cell[:, None] != cell[None, :], float("-inf"))
    return torch.einsum("hqk,khd->qhd", scores.softmax(-1), value)
