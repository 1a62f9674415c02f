"""Convolution and pool along the rows of cells: what torch's own give in fp64, each cell alone, whatever the threads."""

import pytest
import torch
from torch.nn import functional as F

from scbench.kernels import backend, convolution_cpu
from scbench.kernels.convolution import convolution_pool

BF16, F32, F64 = torch.bfloat16, torch.float32, torch.float64
TOLERANCE = {BF16: 2**-7, F32: 1e-5, F64: 1e-13}
SHAPES = [  # cells, rows, width, output's width, taps, stride, cells' lengths
    (3, 13, 40, 70, 9, 1, None), (3, 13, 40, 70, 9, 2, None), (3, 13, 40, 70, 9, 2, [13, 1, 6]),
    (3, 13, 40, 40, 9, 1, [4, 13, 12]), (1, 1, 6, 6, 9, 1, None), (2, 1, 64, 64, 9, 2, None), (2, 2, 8, 5, 9, 2, [2, 1]),
    (1, 7, 130, 33, 3, 2, None),
    (20, 31, 66, 270, 9, 2, None), (1, 300, 8, 8, 5, 1, None), (2, 9, 64, 64, 1, 1, None),
]  # fmt: skip


def draw(*shape, seed):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).bfloat16()


def exact(states, weight, bias, stride, lengths):
    """torch's own, each cell alone; zeros behind it."""
    found = []
    for cell, length in zip(states, lengths or [states.shape[1]] * len(states), strict=True):
        alone = cell[None, :length].transpose(1, 2)
        rows = F.conv1d(alone, weight, bias, stride, weight.shape[2] // 2), F.max_pool1d(alone, stride, ceil_mode=True)
        past = -(-len(cell) // stride) - rows[0].shape[2]
        found.append([F.pad(x[0].T, (0, 0, 0, past)) for x in rows])
    return [torch.stack(cells) for cells in zip(*found, strict=True)]


def run(function, shape, dtype, layout=lambda x: x):
    """[convolution, pool, gradients]; `layout` changes how inputs lie. What lies past the cells' ends has no
    meaning: zeros in all."""
    cells, rows, width, out_width, taps, stride, lengths = shape
    inputs = [draw(cells, rows, width, seed=0), draw(out_width, width, taps, seed=1), draw(out_width, seed=2)]
    for cell, length in enumerate(lengths or []):
        inputs[0][cell, length:] = 0
    inputs = [layout(x.to(dtype)).requires_grad_() for x in inputs]
    found = function(*inputs, stride, lengths)
    upstream = [draw(*x.shape, seed=3 + i).to(dtype) for i, x in enumerate(found)]
    for cell, length in enumerate(lengths or []):
        for x, gradient in zip(found, upstream, strict=True):
            x.data[cell, -(-length // stride) :] = 0
            gradient[cell, -(-length // stride) :] = 0
    gradients = torch.autograd.grad(found, inputs, upstream)
    for cell, length in enumerate(lengths or []):
        gradients[0][cell, length:] = 0
    return [*(x.detach() for x in found), *gradients]


def ours(states, weight, bias, stride, lengths):
    lengths = None if lengths is None else torch.tensor(lengths, dtype=torch.int32)
    return convolution_pool(states, weight, bias, stride, lengths)


@pytest.mark.parametrize("dtype", [BF16, F32, F64])
@pytest.mark.parametrize("shape", SHAPES)
def test_values_and_gradients(monkeypatch, shape, dtype):
    expected = run(exact, shape, F64)
    for forced in ("", "torch"):
        monkeypatch.setattr(backend, "FORCED", forced)
        for name, mine, theirs in zip(("mixed", "pooled", "states", "weight", "bias"), run(ours, shape, dtype), expected,
                                      strict=True):
            assert mine.dtype == dtype
            assert (mine.double() - theirs).norm() <= TOLERANCE[dtype] * theirs.norm(), (name, forced)


@pytest.mark.parametrize("dtype", [BF16, F32])
def test_inputs_may_lie_anyhow(dtype):
    shape = (2, 11, 32, 48, 9, 2, None)
    straight = run(ours, shape, dtype)
    turned = run(ours, shape, dtype, lambda x: x.transpose(0, -1).contiguous().transpose(0, -1).detach())
    for a, b in zip(straight, turned, strict=True):
        torch.testing.assert_close(a, b, rtol=TOLERANCE[dtype], atol=TOLERANCE[dtype] * float(b.abs().max()))


@pytest.mark.parametrize("shape", [(5, 37, 64, 160, 9, 1, None), (5, 37, 64, 160, 9, 2, [37, 2, 30, 5, 1])])
@pytest.mark.parametrize("dtype", [BF16, F32])
def test_the_same_bits_whatever_the_threads(shape, dtype):
    before, found = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 1):
            torch.set_num_threads(threads)
            found.append(run(ours, shape, dtype))
    finally:
        torch.set_num_threads(before)
    for results in zip(*found, strict=True):
        assert torch.equal(results[0], results[1]) and torch.equal(results[0], results[2])


def test_the_first_of_equals_gets_the_gradient_and_not_a_number_is_the_largest():
    states = torch.tensor([[[1.0, 2, float("nan"), 4], [1, 3, 0, float("nan")]]], requires_grad=True)
    pooled = convolution_pool(states, torch.zeros(4, 4, 9), torch.zeros(4), 2)[1]
    torch.testing.assert_close(pooled, F.max_pool1d(states.detach().transpose(1, 2), 2).transpose(1, 2), equal_nan=True)
    (gradient,) = torch.autograd.grad(pooled, states, torch.full_like(pooled, 5))
    assert gradient.tolist() == [[[5, 0, 5, 0], [0, 5, 0, 5]]]


def test_what_does_not_fit_is_an_error():
    states, weight, bias = torch.ones(2, 5, 3), torch.ones(4, 3, 9), torch.ones(4)
    for bad in ((states, weight[:, :, 1:], bias, 1), (states, weight, bias[1:], 1), (states, weight, bias, 3),
                (states, weight[:, 1:], bias, 2), (states, weight.double(), bias, 1), (states[0], weight, bias, 1)):
        with pytest.raises(ValueError, match="must be"):
            convolution_pool(*bad)


def test_the_weights_gradient_does_not_depend_on_how_it_is_cut(monkeypatch):
    states, weight, grad = draw(3, 20, 70, seed=0), draw(300, 70, 9, seed=1), draw(3, 10, 300, seed=2)
    if not convolution_cpu.takes(states) or not convolution_cpu.library().scratch_bytes(9, 2):
        pytest.skip("no compiler, or no AVX-512 for bf16")
    whole = convolution_cpu._weight_gradient(states, weight, grad, 2)
    monkeypatch.setattr(convolution_cpu.threads, "count", lambda: 30)
    monkeypatch.setattr(convolution_cpu.threads, "run", lambda function, job: function(convolution_cpu.ctypes.addressof(job)))
    for a, b in zip(whole, convolution_cpu._weight_gradient(states, weight, grad, 2), strict=True):
        assert torch.equal(a, b)
