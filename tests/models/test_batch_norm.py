"""Batch norm against torch's, and its statistics under casts."""

import pytest
import torch
from torch import nn

from scbench.errors import UserError
from scbench.models.encoders.batch_norm import BatchNorm


def test_it_is_torchs_in_training_and_evaluation():
    ours, theirs = BatchNorm(5).double(), nn.BatchNorm1d(5).double()
    with torch.no_grad():
        ours.weight.uniform_(0.5, 2)
        ours.bias.normal_()
        theirs.load_state_dict(ours.state_dict(), strict=False)
    for mode in (True, True, False):
        x = torch.randn(3, 4, 5, dtype=torch.float64)
        mine, expected = ours.train(mode)(x), theirs.train(mode)(x.transpose(1, 2)).transpose(1, 2)
        torch.testing.assert_close(mine, expected)
        for name in ("running_mean", "running_var"):
            torch.testing.assert_close(getattr(ours, name), getattr(theirs, name))


def test_statistics_and_arithmetic_stay_fp32_when_the_model_is_bf16():
    norm, exact = BatchNorm(5), BatchNorm(5)
    x = torch.randn(3, 4, 5).bfloat16()
    norm.running_mean.fill_(1 / 3)
    norm.bfloat16()
    assert norm.weight.dtype == torch.bfloat16
    assert norm.running_mean.dtype == norm.running_var.dtype == torch.float32
    assert torch.equal(norm.running_mean, torch.full((5,), 1 / 3))  # not even rounded on the way
    assert torch.equal(norm(x), exact(x.float()).bfloat16())
    assert set(dict(norm.named_buffers())) == {"running_mean", "running_var"}


def test_one_value_has_no_variance():
    norm, x = BatchNorm(3), torch.ones(1, 1, 3)
    with pytest.raises(UserError, match="one cell"):
        norm(x)
    assert norm.eval()(x).shape == (1, 1, 3)
