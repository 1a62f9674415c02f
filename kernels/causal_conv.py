"""Depthwise causal convolution inside each cell of a packed batch."""

import torch
from torch import Tensor


class _CausalConvolution(torch.autograd.Function):
    """One shifted product a tap, cell by cell: a cell's rows stay in the cache, and no mask is needed."""

    @staticmethod
    def forward(ctx, x: Tensor, weight: Tensor, bias: Tensor, cell_offsets: Tensor) -> Tensor:
        ctx.save_for_backward(x, weight, bias)
        ctx.lengths = cell_offsets.diff().tolist()
        dtype = torch.promote_types(x.dtype, torch.float32)
        taps = weight.T.flip(0).to(dtype).contiguous()  # taps[s] weighs the token s places before
        output = torch.empty_like(x, memory_format=torch.contiguous_format)
        for cell, out in zip(x.split(ctx.lengths), output.split(ctx.lengths), strict=True):
            cell = cell.to(dtype)
            mixed = torch.addcmul(bias.to(dtype), cell, taps[0])
            for shift in range(1, len(taps)):
                mixed[shift:].addcmul_(cell[:-shift], taps[shift])
            out.copy_(mixed)
        return output

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor, Tensor, Tensor, None]:
        x, weight, bias = ctx.saved_tensors
        dtype = torch.promote_types(x.dtype, torch.float32)
        taps = weight.T.flip(0).to(dtype).contiguous()
        grad_x, grad_taps = torch.empty_like(x, memory_format=torch.contiguous_format), torch.zeros_like(taps)
        grad_bias = taps.new_zeros(bias.shape)
        for cell, g, out in zip(*(rows.split(ctx.lengths) for rows in (x, grad, grad_x)), strict=True):
            cell, g = cell.to(dtype), g.to(dtype)
            grad_cell = g * taps[0]
            grad_taps[0] += (g * cell).sum(0)
            for shift in range(1, len(taps)):
                grad_cell[:-shift].addcmul_(g[shift:], taps[shift])
                grad_taps[shift] += (g[shift:] * cell[:-shift]).sum(0)
            grad_bias += g.sum(0)
            out.copy_(grad_cell)
        return grad_x, grad_taps.flip(0).T.to(weight.dtype), grad_bias.to(bias.dtype), None


def causal_conv(x: Tensor, weight: Tensor, bias: Tensor, cell_offsets: Tensor) -> Tensor:
    """y_t = bias + Σ_k weight[:, k] · x_(t − K + 1 + k) in each channel, with x = 0 before the cell's first token.

    The weights stand as in torch's Conv1d: the last one weighs the token itself. Sums in fp32 (fp64 for fp64 inputs).

    Parameters
    ----------
    x
        [T, E].
    weight, bias
        [E, K] and [E].
    cell_offsets
        int32 [B+1], where each cell's tokens start; the last is T.

    Returns
    -------
    [T, E] in the dtype of `x`.
    """
    if x.ndim != 2 or weight.ndim != 2 or not weight.shape[:1] == bias.shape == x.shape[1:]:
        raise ValueError(f"x, weight and bias must be [T, E], [E, K] and [E], not {list(x.shape)}, {list(weight.shape)} and "
                         f"{list(bias.shape)}")
    if int(cell_offsets[-1]) != x.shape[0]:
        raise ValueError(f"cell_offsets end at {int(cell_offsets[-1])}, the batch has {x.shape[0]} tokens")
    return _CausalConvolution.apply(x, weight, bias, cell_offsets)


def causal_conv_oracle(x: Tensor, weight: Tensor, bias: Tensor, cell_offsets: Tensor) -> Tensor:
    """The same by the definition, token by token and tap by tap."""
    taps = weight.shape[1]
    rows = []
    for start, stop in zip(cell_offsets.tolist(), cell_offsets.tolist()[1:], strict=False):
        for t in range(start, stop):
            past = [(k, t - taps + 1 + k) for k in range(taps)]
            rows.append(bias + sum(weight[:, k] * x[s] for k, s in past if s >= start))
    return torch.stack(rows)
