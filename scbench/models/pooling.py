"""The mean of each cell's token states."""

import torch
from torch import Tensor

from scbench.kernels import backend
from scbench.kernels.row_sums import sum_rows


class _MeanStates(torch.autograd.Function):
    """Keeps no states; the gradient is one row a cell, copied to its tokens in the states' dtype."""

    @staticmethod
    def forward(ctx, states: Tensor, cell_offsets: Tensor, cell_index: Tensor, without_first: bool) -> Tensor:
        lengths = cell_offsets.diff()
        dtype = torch.promote_types(states.dtype, torch.float32)
        if backend.use_native(states):
            order = torch.arange(len(cell_index), device=cell_index.device)
            sums = sum_rows(states, cell_index, order, len(lengths), dtype)
        else:
            sums = torch.segment_reduce(states.to(dtype), "sum", lengths=lengths.long())
        numbers = lengths[:, None]
        if without_first:
            sums, numbers = sums - states.index_select(0, cell_offsets[:-1]).to(dtype), (numbers - 1).clamp(min=1)
        ctx.save_for_backward(cell_offsets, cell_index, numbers)
        ctx.dtype, ctx.without_first = states.dtype, without_first
        return sums / numbers

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor | None, ...]:
        cell_offsets, cell_index, numbers = ctx.saved_tensors
        grad_states = (grad / numbers).to(ctx.dtype).index_select(0, cell_index)
        if ctx.without_first:
            grad_states.index_fill_(0, cell_offsets[:-1].long(), 0)
        return grad_states, None, None, None


def mean_states(states: Tensor, cell_offsets: Tensor, cell_index: Tensor, *, without_first: bool) -> Tensor:
    """Means over the tokens of each cell, [B, D] in fp32 (fp64 for fp64 states), sums in that precision too.

    Parameters
    ----------
    states, cell_offsets, cell_index
        [T, D]; int [B+1], where each cell's tokens start; int64 [T], the cell of each.
    without_first
        Leave the first token of each cell, `<cls>`, out; the mean of no others is 0.
    """
    return _MeanStates.apply(states, cell_offsets, cell_index, without_first)
