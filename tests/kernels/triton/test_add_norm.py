"""Dropout, ReLU + dropout and dropout + residual + LayerNorm against their definitions."""

import pytest
import torch
from torch.nn import functional as F

from scbench.kernels import random
from scbench.kernels.add_norm import add_norm, dropout, dropout_oracle, relu_dropout

F64 = torch.float64
SHAPES = [(1, 256), (70, 6), (5, 24), (3, 130), (2, 1)]


def draw(*shape, dtype=F64, seed=0):
    return torch.randn(*shape, dtype=F64, generator=torch.Generator().manual_seed(seed + sum(shape))).to(dtype)


def keys_of(tokens):
    return random.bits_torch(random.key(3, random.Stream.DROPOUT), torch.arange(tokens))


def keep_scale(keys, columns, probability):
    return random.keep_torch(keys, columns, probability) * 65536 / (65536 - round(probability * 65536))


def outputs_and_gradients(function, inputs, upstream):
    leaves = [x.clone().requires_grad_() for x in inputs]
    out = function(*leaves)
    out.backward(upstream.to(out.dtype))
    return [out.detach(), *(leaf.grad for leaf in leaves)]


def plain_add_norm(keep):
    def function(x, residual, weight, bias):
        dropped = x if keep is None else x * keep.to(x.dtype)
        return F.layer_norm(residual + dropped, weight.shape, weight, bias, 1e-5)

    return function


@pytest.mark.parametrize("probability", [0.0, 0.15])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_add_norm(dtype, shape, probability, assert_as_good):
    tokens, width = shape
    inputs = [draw(*s, dtype=dtype, seed=n) for n, s in enumerate([shape, shape, (width,), (width,)])]
    keys, upstream = keys_of(tokens), draw(*shape, seed=9).to(dtype).double()
    keep = keep_scale(keys, width, probability) if probability else None
    ours = outputs_and_gradients(lambda *x: add_norm(*x, keys, probability), inputs, upstream)
    plain = outputs_and_gradients(plain_add_norm(keep), inputs, upstream)
    exact = outputs_and_gradients(plain_add_norm(keep), [x.double() for x in inputs], upstream)
    assert [x.dtype for x in ours] == [dtype] * 5
    assert_as_good(ours, plain, exact)


@pytest.mark.parametrize("probability", [0.0, 0.5])
def test_add_norm_in_fp64(probability):
    shapes = [(5, 6), (5, 6), (6,), (6,)]
    leaves = [draw(*shape, seed=n).requires_grad_() for n, shape in enumerate(shapes)]
    keys = keys_of(5)
    keep = keep_scale(keys, 6, probability) if probability else None
    torch.testing.assert_close(add_norm(*leaves, keys, probability), plain_add_norm(keep)(*leaves), rtol=1e-13, atol=1e-13)
    assert torch.autograd.gradcheck(lambda *x: add_norm(*x, keys, probability), leaves)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, F64], ids=str)
def test_dropout(dtype, shape):
    x, upstream, keys = draw(*shape, dtype=dtype), draw(*shape, seed=1), keys_of(shape[0])
    out, grad = outputs_and_gradients(lambda x: dropout(x, keys, 0.15), [x], upstream)
    torch.testing.assert_close(out, dropout_oracle(x.double(), keys, 0.15).to(dtype))
    torch.testing.assert_close(grad, dropout_oracle(upstream.to(dtype).double(), keys, 0.15).to(dtype))
    assert torch.equal(out != 0, random.keep_torch(keys, shape[1], 0.15))


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, F64], ids=str)
def test_relu_dropout(dtype, shape):
    x, upstream, keys = draw(*shape, dtype=dtype), draw(*shape, seed=1), keys_of(shape[0])
    x.view(-1)[::5] = 0
    out, grad = outputs_and_gradients(lambda x: relu_dropout(x, keys, 0.15), [x], upstream)
    torch.testing.assert_close(out, dropout_oracle(x.double().relu(), keys, 0.15).to(dtype))
    exact = dropout_oracle(upstream.to(dtype).double() * (x > 0), keys, 0.15)
    torch.testing.assert_close(grad, exact.to(dtype))
    assert torch.equal(relu_dropout(x, None, 0.15), x.relu())


def test_no_keys_means_no_dropout():
    x, residual, weight, bias = draw(3, 8), draw(3, 8, seed=1), draw(8), draw(8, seed=1)
    assert dropout(x, None, 0.5) is x
    assert torch.equal(add_norm(x, residual, weight, bias, None, 0.5), add_norm(x, residual, weight, bias, keys_of(3), 0.0))


def test_nearly_everything_dropped():
    x, residual, weight, bias = draw(3, 8), draw(3, 8, seed=1), torch.ones(8, dtype=F64), torch.zeros(8, dtype=F64)
    probability = 65535 / 65536  # one kept in 65536 on average: none here
    torch.testing.assert_close(add_norm(x, residual, weight, bias, keys_of(3), probability), F.layer_norm(residual, (8,)))
    assert torch.equal(dropout(x, keys_of(3), probability), torch.zeros_like(x))


def test_inputs_need_not_be_contiguous():
    keys = keys_of(10)[::2]
    wide = draw(5, 48, dtype=torch.float32)
    x, residual = wide[:, :24], draw(24, 5, seed=1, dtype=torch.float32).T
    weight, bias = draw(48, dtype=torch.float32)[::2], draw(24, dtype=torch.float32)
    straight = [y.clone(memory_format=torch.contiguous_format) for y in (x, residual, weight, bias)]
    upstream = torch.ones(()).expand(5, 24)
    for probability in (0.0, 0.15):
        ours = outputs_and_gradients(lambda *y: add_norm(*y, keys, probability), (x, residual, weight, bias), upstream)  # noqa: B023
        theirs = outputs_and_gradients(lambda *y: add_norm(*y, keys.clone(), probability), straight, upstream)  # noqa: B023
        assert all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))
    for function in (dropout, relu_dropout):
        ours = outputs_and_gradients(lambda y: function(y, keys, 0.15), [x], upstream)  # noqa: B023
        theirs = outputs_and_gradients(lambda y: function(y, keys.clone(), 0.15), [straight[0]], upstream)  # noqa: B023
        assert all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))


def test_no_tokens():
    keys = torch.zeros(0, dtype=torch.int64)
    shapes = [(0, 8), (0, 8), (8,), (8,)]
    out, *grads = outputs_and_gradients(lambda *x: add_norm(*x, keys, 0.15), [draw(*s) for s in shapes], draw(0, 8))
    assert [out.shape, *(g.shape for g in grads)] == [(0, 8), (0, 8), (0, 8), (8,), (8,)]
    assert grads[2].abs().sum() + grads[3].abs().sum() == 0
    assert relu_dropout(draw(0, 8), keys, 0.15).shape == dropout(draw(0, 8), keys, 0.15).shape == (0, 8)


def test_two_runs_are_bit_identical():
    inputs = [draw(*s, dtype=torch.float32, seed=n) for n, s in enumerate([(130, 24), (130, 24), (24,), (24,)])]
    runs = [outputs_and_gradients(lambda *x: add_norm(*x, keys_of(130), 0.15), inputs, draw(130, 24)) for _ in range(2)]
    assert all(torch.equal(a, b) for a, b in zip(*runs, strict=True))


@pytest.mark.parametrize(("call", "named"), [
    (lambda: add_norm(draw(3, 4), draw(2, 4), draw(4), draw(4), None, 0.0), "residual"),
    (lambda: add_norm(draw(3, 4), draw(3, 4), draw(5), draw(4), None, 0.0), "weight"),
    (lambda: add_norm(draw(3, 4), draw(3, 4), draw(4), draw(4), keys_of(2), 0.5), "token_keys"),
    (lambda: relu_dropout(draw(3, 4), keys_of(3).int(), 0.5), "token_keys"),
])  # fmt: skip
def test_wrong_arguments_are_named(call, named):
    with pytest.raises(ValueError, match=named):
        call()
