"""Mamba's selective scan in plain PyTorch, as fast as its operations go: position by position in place, over memory that lies
position by position, with a backward of its own (autograd's would keep every intermediate of every position)."""

import torch
from torch import Tensor


class _Scan(torch.autograd.Function):
    """u, delta [L, B, E], a [N, E], b, c [L, B, N], all float32 → y [L, B, E]."""

    @staticmethod
    def forward(ctx, u, delta, a, b, c) -> Tensor:
        factors = torch.mul(delta[:, :, None], a).exp_()  # [L, B, N, E]
        states = b[..., None] * (delta * u)[:, :, None]
        for before, factor, state in zip(states, factors[1:], states[1:], strict=False):
            state.addcmul_(factor, before)
        ctx.save_for_backward(u, delta, a, b, c, factors, states)
        return (c[:, :, None] @ states)[:, :, 0]

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor, ...]:
        u, delta, a, b, c, factors, states = ctx.saved_tensors
        grad_c = (states @ grad[..., None])[..., 0]
        grad_states = c[..., None] * grad[:, :, None]
        for t in range(len(grad) - 2, -1, -1):
            grad_states[t].addcmul_(factors[t + 1], grad_states[t + 1])
        inputs = (b[:, :, None] @ grad_states)[:, :, 0]  # of delta · u
        grad_b = (grad_states @ (delta * u)[..., None])[..., 0]
        exponents = torch.zeros_like(states)  # of delta · a
        torch.mul(grad_states[1:], factors[1:], out=exponents[1:]).mul_(states[:-1])
        grad_a = (exponents * delta[:, :, None]).sum((0, 1))
        return inputs * delta, (exponents * a).sum(2).addcmul_(inputs, u), grad_a, grad_b, grad_c


def selective_scan(x: Tensor, step: Tensor, decay: Tensor, b: Tensor, c: Tensor, skip: Tensor) -> Tensor:
    """h_t = exp(Δ_t A) h_(t−1) + Δ_t B_t u_t and y_t = C_t · h_t + D u_t along each cell.

    x, step [B, L, E]; decay [E, N]; b, c [B, L, N]; skip [E]; the result is [B, L, E] in x's dtype.
    """
    rows = [tensor.transpose(0, 1).float().contiguous() for tensor in (x, step, b, c)]
    with torch.autocast(x.device.type, enabled=False):
        y = _Scan.apply(rows[0], rows[1], decay.T.float().contiguous(), *rows[2:]) + rows[0] * skip.float()
    return y.transpose(0, 1).to(x.dtype)
