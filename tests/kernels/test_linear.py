"""oneDNN's product gives what PyTorch's does in fp64, to rounding, with its gradients; the rest is torch's own."""

import pytest
import torch
from torch.nn import functional as F

from scbench.kernels import backend
from scbench.kernels import linear as module
from scbench.kernels.linear import left_product, linear, linear_relu

BF16, F32, F64 = torch.bfloat16, torch.float32, torch.float64
TOLERANCE = {BF16: 2**-7, F32: 1e-5}


def draw(*shape, seed, dtype):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).bfloat16().to(dtype)


def run(shape, width, biased, dtype):
    """(output, gradients) of our product and of F.linear in fp64."""
    found = []
    for function, of in ((linear, dtype), (F.linear, F64)):
        x, weight = draw(*shape, seed=0, dtype=of), draw(width, shape[-1], seed=1, dtype=of)
        inputs = [x, weight, draw(width, seed=2, dtype=of)][: 3 if biased else 2]
        inputs = [tensor.requires_grad_() for tensor in inputs]
        out = function(*inputs)
        found.append([out.detach(), *torch.autograd.grad(out, inputs, draw(*shape[:-1], width, seed=3, dtype=of))])
    return found


@pytest.mark.parametrize("biased", [True, False])
@pytest.mark.parametrize("dtype", [BF16, F32])
@pytest.mark.parametrize(("shape", "width"), [((300, 48), 40), ((7, 33, 64), 5), ((1, 3), 1)])
def test_values_and_gradients(monkeypatch, shape, width, biased, dtype):
    if not module._has_product(dtype):
        pytest.skip("this processor or torch has no such product")
    monkeypatch.setattr(module, "SMALLEST", 0)
    for mine, exact in zip(*run(shape, width, biased, dtype), strict=True):
        assert mine.dtype == dtype and mine.is_contiguous()
        error = (mine.double() - exact).norm() / exact.norm()
        assert error < TOLERANCE[dtype]


@pytest.mark.parametrize("smallest", [0, 2**24])
@pytest.mark.parametrize("dtype", [BF16, F32])
def test_relu_is_the_same_to_the_bit_with_gradients_and_without(monkeypatch, dtype, smallest):
    monkeypatch.setattr(module, "SMALLEST", smallest)
    x, weight, bias = draw(5, 33, 48, seed=0, dtype=dtype), draw(40, 48, seed=1, dtype=dtype), draw(40, seed=2, dtype=dtype)
    leaves = [tensor.requires_grad_() for tensor in (x, weight, bias)]
    expected = linear(*leaves).relu()
    assert 0.4 < (expected > 0).float().mean() < 0.6
    with torch.no_grad():
        assert torch.equal(linear_relu(*leaves), expected)
        assert torch.equal(linear_relu(x, weight), linear(x, weight).relu())
    out = linear_relu(*leaves)
    assert torch.equal(out, expected)
    for mine, theirs in zip(*(torch.autograd.grad(y, leaves, torch.ones_like(y)) for y in (out, expected)), strict=True):
        assert torch.equal(mine, theirs)


@pytest.mark.parametrize("dtype", [BF16, F32, F64])
@pytest.mark.parametrize(("rows", "inner", "columns"), [(5, 13, 64), (256, 1, 40), (1, 33, 7)])
def test_left_product(monkeypatch, rows, inner, columns, dtype):
    monkeypatch.setattr(module, "SMALLEST", 0)
    found = []
    for function, of in ((left_product, dtype), (torch.mm, F64)):
        inputs = [draw(*shape, seed=i, dtype=of).requires_grad_() for i, shape in enumerate([(rows, inner), (inner, columns)])]
        out = function(*inputs)
        found.append([out.detach(), *torch.autograd.grad(out, inputs, draw(rows, columns, seed=3, dtype=of))])
    for mine, exact in zip(*found, strict=True):
        assert mine.dtype == dtype and mine.is_contiguous()
        assert (mine.double() - exact).norm() / exact.norm() < TOLERANCE.get(dtype, 1e-14)
    with pytest.raises(ValueError, match="must be"):
        left_product(draw(2, 3, seed=0, dtype=F32), draw(2, 3, seed=0, dtype=F32))


def test_products_that_are_too_small_or_not_ours_are_torchs(monkeypatch):
    monkeypatch.setattr(module, "_product", None)
    x, weight = draw(4, 8, seed=0, dtype=F32), draw(3, 8, seed=1, dtype=F32)
    assert torch.equal(linear(x, weight), F.linear(x, weight))  # too small to compile for
    monkeypatch.setattr(module, "SMALLEST", 0)
    torch.testing.assert_close(linear(x.double(), weight.double()), F.linear(x.double(), weight.double()))
    with monkeypatch.context() as patch:
        patch.setattr(backend, "FORCED", "torch")
        assert torch.equal(linear(x, weight), F.linear(x, weight))
    monkeypatch.setattr(module, "_has_product", lambda dtype: False)
    assert torch.equal(linear(x, weight), F.linear(x, weight))
    assert torch.equal(linear(x[0], weight), F.linear(x[0], weight))


def test_gradients_that_nobody_asks_for_are_not_made(monkeypatch):
    monkeypatch.setattr(module, "SMALLEST", 0)
    x, weight = draw(30, 8, seed=0, dtype=F32), draw(4, 8, seed=1, dtype=F32).requires_grad_()
    (grad,) = torch.autograd.grad(linear(x, weight).sum(), weight)
    torch.testing.assert_close(grad, x.sum(0).expand(4, 8))


def test_what_does_not_fit_is_an_error():
    x, weight = torch.ones(2, 3), torch.ones(4, 3)
    for bad in ((x, torch.ones(4, 2)), (x, weight, torch.ones(3)), (x, weight.bfloat16()), (x.long(), weight)):
        with pytest.raises(ValueError, match="must be"):
            linear(*bad)
