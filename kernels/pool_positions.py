"""Average pool of neighbouring positions: out[i] = mean of x[2i … 2i + window − 1], adaptive pooling to half as many.

Windows are 2 wide (an odd number of positions: 3, the last position of one the first of the next), or everything where one
position is left. Positions come first, so that a window is a few long rows. Not torch's own adaptive pool, whose gradient has
no fixed order on a GPU.
"""

import torch
from torch import Tensor


def _window(positions: int, new_positions: int) -> int:
    return positions - 2 * (new_positions - 1)


class _PoolPositions(torch.autograd.Function):
    """Sums of a window in fp32, and one pass for the gradient."""

    @staticmethod
    def forward(ctx, x: Tensor, new_positions: int) -> Tensor:
        ctx.positions, window = len(x), _window(len(x), new_positions)
        if new_positions == 1:
            return x.mean(0, keepdim=True)
        pairs = x[: 2 * new_positions].view(new_positions, 2, *x.shape[1:])
        if window == 2:
            return pairs.mean(1)
        first, second = pairs.unbind(1)
        third = x[2::2]
        return first.lerp(second, 0.5).lerp_(third, 1 / 3)

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor, None]:
        window = _window(ctx.positions, len(grad))
        share = grad / window
        if len(grad) == 1:
            return share.expand(ctx.positions, *grad.shape[1:]), None
        grad_x = grad.new_empty(ctx.positions, *grad.shape[1:])
        grad_x[: 2 * len(grad)].view(len(grad), 2, *grad.shape[1:]).copy_(share[:, None])
        if window == 3:
            torch.add(share[:-1], share[1:], out=grad_x[2:-1:2])
            grad_x[-1] = share[-1]
        return grad_x, None


def pool_positions(x: Tensor, new_positions: int) -> Tensor:
    """[S, …] → [S', …]; S' is S // 2, or 1."""
    return _PoolPositions.apply(x, new_positions)
