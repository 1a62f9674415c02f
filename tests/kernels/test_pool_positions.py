"""The average pool of positions."""

import pytest
import torch
from torch.nn import functional as F

from scbench.kernels.pool_positions import pool_positions


@pytest.mark.parametrize("positions", [1, 2, 3, 16, 17, 513])
def test_it_is_torchs_adaptive_one(positions):
    x = torch.randn(positions, 2, 3, dtype=torch.float64, requires_grad=True)
    for new in {1, max(1, positions // 2)}:
        expected = F.adaptive_avg_pool1d(x.permute(1, 2, 0), new).permute(2, 0, 1)
        pooled = pool_positions(x, new)
        torch.testing.assert_close(pooled, expected)
        upstream = torch.randn(pooled.shape, dtype=torch.float64)
        torch.testing.assert_close(*(torch.autograd.grad(y, x, upstream)[0] for y in (pooled, expected)))


@pytest.mark.parametrize("positions", [2, 3, 16, 17])
def test_bf16_is_near_the_mean(positions):
    x = torch.randn(positions, 4, 8).to(torch.bfloat16).requires_grad_()
    new = positions // 2
    pooled, expected = pool_positions(x, new), pool_positions(x.double(), new)
    assert pooled.dtype == torch.bfloat16
    assert float((pooled - expected).detach().abs().max()) <= 2**-7 * float(x.detach().abs().max())
    gradient, = torch.autograd.grad(pooled.sum(), x)
    exact, = torch.autograd.grad(expected.sum(), x)
    assert float((gradient - exact).abs().max()) <= 2**-7
