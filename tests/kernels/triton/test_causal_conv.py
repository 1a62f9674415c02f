"""The convolution's kernels against its definition: token and channel blocks, cells across them, precision, repetition."""

import pytest
import torch
from packed import F64, convolution_inputs, offsets_of, results

from scbench.kernels import causal_conv as module
from scbench.kernels.causal_conv import causal_conv, causal_conv_oracle


@pytest.mark.parametrize(("lengths", "channels", "taps"), [
    ([1], 6, 4), ([2], 24, 4), ([3, 1, 1, 4], 130, 4), ([0, 9, 0, 0, 2, 0], 6, 3), ([63, 1, 1, 64, 2], 6, 4),
    ([62, 4, 66], 1, 4), ([130], 6, 2), ([5, 7], 256, 1), ([1] * 70, 3, 4), ([20], 600, 4),
], ids=lambda x: str(x)[:20])  # fmt: skip
def test_fp64_equals_the_oracle(lengths, channels, taps):
    inputs = convolution_inputs(lengths, channels, taps)
    ours, exact = results(causal_conv, inputs, lengths), results(causal_conv_oracle, inputs, lengths)
    for mine, truth in zip(ours, exact, strict=True):
        torch.testing.assert_close(mine, truth, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("lengths", "channels"), [([70], 24), ([30, 1, 5], 130)], ids=str)
def test_low_precision_is_as_good_as_pytorch(dtype, lengths, channels, assert_as_good):
    inputs = convolution_inputs(lengths, channels, dtype=dtype)
    ours = results(causal_conv, inputs, lengths)
    assert [x.dtype for x in ours] == [dtype] * 4
    exact = results(causal_conv_oracle, inputs, lengths, F64)
    assert_as_good(ours, results(causal_conv_oracle, inputs, lengths), exact)


def test_more_cells_than_a_search_takes_at_once(monkeypatch):
    monkeypatch.setattr(module, "OFFSETS_AT_ONCE", 4)
    lengths = [9, 0, 40, 1, 1, 30, 2, 50, 0, 3]
    inputs = convolution_inputs(lengths)
    ours, exact = results(causal_conv, inputs, lengths), results(causal_conv_oracle, inputs, lengths)
    for mine, truth in zip(ours, exact, strict=True):
        torch.testing.assert_close(mine, truth, rtol=1e-12, atol=1e-12)


def test_gradcheck():
    leaves = [x.requires_grad_() for x in convolution_inputs([3, 0, 1, 10], 2)]
    assert torch.autograd.gradcheck(lambda *x: causal_conv(*x, offsets_of([3, 0, 1, 10])), leaves, fast_mode=True)


def test_views_are_taken_as_they_are():
    x, weight, bias = convolution_inputs([12, 2], 4)
    views = [torch.cat([x, x], 1).chunk(2, 1)[1], weight.T.contiguous().T, torch.stack([bias, bias], 1)[:, 0]]
    assert not any(view.is_contiguous() for view in views)
    ours, plain = results(causal_conv, views, [12, 2]), results(causal_conv, [x, weight, bias], [12, 2])
    assert all(torch.equal(mine, theirs) for mine, theirs in zip(ours, plain, strict=True))
    leaf = x.clone().requires_grad_()
    causal_conv(leaf, weight, bias, offsets_of([12, 2])).sum().backward()  # an expanded gradient
    torch.testing.assert_close(leaf.grad[0], weight.sum(1))
    offsets = torch.stack([offsets_of([12, 2])] * 2, 1)[:, 0]
    assert torch.equal(causal_conv(*views, offsets), plain[0])


def test_cells_never_see_each_other():
    lengths, others = [66, 70, 5], [*range(66), *range(136, 141)]
    x, weight, bias = convolution_inputs(lengths)
    spoiled = x.clone()
    spoiled[66:136] = float("nan")
    clean, dirty = (causal_conv(rows, weight, bias, offsets_of(lengths)) for rows in (x, spoiled))
    assert torch.equal(clean[others], dirty[others])
    leaf = x.clone().requires_grad_()
    upstream = torch.ones_like(x)
    upstream[66:136] = float("nan")
    causal_conv(leaf, weight, bias, offsets_of(lengths)).backward(upstream)
    assert leaf.grad[others].isfinite().all()


def test_two_runs_are_bit_identical():
    inputs = convolution_inputs([100, 40], 130, dtype=torch.float32)
    first, second = (results(causal_conv, inputs, [100, 40]) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def test_no_tokens():
    output, *gradients = results(causal_conv, convolution_inputs([0, 0]), [0, 0])
    assert output.shape == (0, 6)
    assert all((gradient == 0).all() for gradient in gradients)
