"""The regression head's last layer and its loss against the definition."""

import pytest
import torch

from scbench.kernels.masked_regression import masked_regression, masked_regression_oracle

F64 = torch.float64
SHAPES = [(1, 6), (70, 24), (3, 130), (5, 256), (64, 1)]


def draw(*shape, dtype=F64, seed=0):
    return torch.randn(*shape, dtype=F64, generator=torch.Generator().manual_seed(seed + sum(shape))).to(dtype)


def inputs_of(rows, width, dtype=F64):
    targets = draw(rows, seed=3, dtype=F64 if dtype == F64 else torch.float32)
    targets[::3], targets[-1:] = 0, 512
    return [draw(rows, width, dtype=dtype), draw(1, width, seed=1, dtype=dtype), draw(1, seed=2, dtype=dtype)], targets


def results(function, inputs, targets):
    leaves = [x.detach().clone().requires_grad_() for x in inputs]
    loss, predictions = function(*leaves, targets)
    (0.37 * loss).backward()
    return [loss.detach(), predictions.detach(), *(leaf.grad for leaf in leaves)]


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_equals_its_oracle(dtype, shape, assert_as_good):
    inputs, targets = inputs_of(*shape, dtype)
    if dtype == torch.float16:
        targets = targets.clamp(max=9)  # plain PyTorch's gradients overflow
    ours = results(masked_regression, inputs, targets)
    assert [x.dtype for x in ours] == [torch.float32] * 2 + [dtype] * 3
    plain = results(masked_regression_oracle, inputs, targets.to(dtype))
    assert_as_good(ours, plain, results(masked_regression_oracle, [x.double() for x in inputs], targets.double()))


@pytest.mark.parametrize("rows", [1, 9, 65])
def test_fp64(rows):
    inputs, targets = inputs_of(rows, 5)
    for mine, theirs in zip(results(masked_regression, inputs, targets), results(masked_regression_oracle, inputs, targets),
                            strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-12, atol=1e-12)
    if rows < 10:
        leaves = [x.requires_grad_() for x in inputs]
        assert torch.autograd.gradcheck(lambda *x: masked_regression(*x, targets / 100)[0], leaves)


def test_nothing_masked_is_a_zero_loss_with_a_graph():
    loss, predictions, *grads = results(masked_regression, *inputs_of(0, 4, torch.float32))
    assert loss == 0
    assert predictions.shape == (0,)
    assert [g.shape for g in grads] == [(0, 4), (1, 4), (1,)]
    assert not any(g.any() for g in grads)


def test_predictions_have_no_gradient_and_need_none():
    inputs, targets = inputs_of(7, 6, torch.float32)
    leaves = [x.requires_grad_() for x in inputs]
    loss, predictions = masked_regression(*leaves, targets)
    assert not predictions.requires_grad
    with torch.no_grad():
        again = masked_regression(*leaves, targets)
    assert torch.equal(loss, again[0])
    assert torch.equal(predictions, again[1])
    assert not again[0].requires_grad


def test_inputs_need_not_be_contiguous():
    (hidden, weight, bias), targets = inputs_of(24, 24, torch.float32)
    ours = results(masked_regression, [hidden.T, weight, bias], targets[torch.arange(24)])
    # clone() in results keeps strides: hidden.T stays a transposed view
    theirs = results(masked_regression, [hidden.T.contiguous(), weight, bias], targets)
    assert all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))


def test_two_runs_are_bit_identical():
    inputs, targets = inputs_of(130, 24, torch.float32)
    runs = [results(masked_regression, inputs, targets) for _ in range(2)]
    assert all(torch.equal(a, b) for a, b in zip(*runs, strict=True))


@pytest.mark.parametrize(("call", "named"), [
    (lambda: masked_regression(draw(3, 4), draw(1, 5), draw(1), draw(3)), "weight"),
    (lambda: masked_regression(draw(3, 4), draw(1, 4), draw(2), draw(3)), "bias"),
    (lambda: masked_regression(draw(3, 4), draw(1, 4).float(), draw(1), draw(3)), "weight must be float64"),
])  # fmt: skip
def test_wrong_arguments_are_named(call, named):
    with pytest.raises(ValueError, match=named):
        call()
