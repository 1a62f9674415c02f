"""The mean of each cell's states, against loops."""

import pytest
import torch

from scbench.models.pooling import mean_states


def cells(lengths: list[int], dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    states = torch.randn(sum(lengths), 5, generator=torch.Generator().manual_seed(0), dtype=torch.float64).to(dtype)
    offsets = torch.tensor([0, *lengths]).cumsum(0).int()
    return states.requires_grad_(), offsets, torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(lengths))


def means(states: torch.Tensor, lengths: list[int], without_first: bool) -> torch.Tensor:
    """By the definition; no gene, no mean: 0."""
    parts = [cell[int(without_first):].double() for cell in states.split(lengths)]
    return torch.stack([part.sum(0) / max(len(part), 1) for part in parts])


@pytest.mark.parametrize("without_first", [False, True])
@pytest.mark.parametrize("lengths", [[1], [2], [3, 1, 7, 1], [300, 2]])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_means_and_their_gradient(dtype, lengths, without_first):
    states, offsets, cell_index = cells(lengths, dtype)
    result = mean_states(states, offsets, cell_index, without_first=without_first)
    assert result.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    torch.testing.assert_close(result.double(), means(states, lengths, without_first), rtol=1e-5, atol=1e-6)

    weights = torch.randn(result.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    (result.double() * weights).sum().backward()
    plain = states.detach().double().requires_grad_()
    (means(plain, lengths, without_first) * weights).sum().backward()
    assert states.grad.dtype == dtype
    tolerance = {torch.bfloat16: 2**-8, torch.float32: 1e-6, torch.float64: 1e-12}[dtype]
    torch.testing.assert_close(states.grad.double(), plain.grad, rtol=tolerance, atol=0)
