"""The convolution against its definition and torch's own Conv1d."""

import pytest
import torch
from packed import F64, convolution_inputs, offsets_of, output_and_gradients
from torch.nn import functional as F

from scbench.kernels import causal_conv_cpu
from scbench.kernels.causal_conv import causal_conv, causal_conv_oracle, causal_conv_silu

needs_native = pytest.mark.skipif(causal_conv_cpu.library() is None, reason="no C compiler")


def conv1d(x, weight, bias, offsets):
    """Each cell by torch's depthwise Conv1d, zeros before it."""
    cells = x.split(offsets.diff().tolist())
    padded = [F.pad(cell.T, (weight.shape[1] - 1, 0)) for cell in cells]
    return torch.cat([F.conv1d(cell[None], weight[:, None], bias, groups=len(weight))[0].T for cell in padded])


@pytest.mark.parametrize("lengths", [[1], [2], [3, 1, 1, 4], [4, 1, 9, 2], [33, 7]])
@pytest.mark.parametrize(("channels", "taps"), [(5, 4), (1, 1), (17, 3)])
@pytest.mark.parametrize("oracle", [causal_conv_oracle, conv1d])
def test_values_and_gradients_equal_the_oracles(lengths, channels, taps, oracle):
    inputs, offsets = convolution_inputs(lengths, channels, taps), offsets_of(lengths)
    ours = output_and_gradients(causal_conv, inputs, offsets)
    for mine, theirs in zip(ours, output_and_gradients(oracle, inputs, offsets), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-12, atol=1e-12)


def test_gradcheck():
    leaves = [x.requires_grad_() for x in convolution_inputs([3, 0, 1, 6], 3)]
    assert torch.autograd.gradcheck(lambda *x: causal_conv(*x, offsets_of([3, 0, 1, 6])), leaves)


def test_half_of_a_projection_is_taken_as_it_is():
    x, weight, bias = convolution_inputs([6, 2], 4)
    view = torch.cat([x, x], 1).chunk(2, 1)[1]
    assert torch.equal(causal_conv(view, weight, bias, offsets_of([6, 2])), causal_conv(x, weight, bias, offsets_of([6, 2])))


def test_cells_never_see_each_other_whatever_their_order():
    lengths = [4, 9, 1]
    x, weight, bias = convolution_inputs(lengths)
    first, second, third = x.split(lengths)
    together = causal_conv(x, weight, bias, offsets_of(lengths)).split(lengths)
    company = torch.cat([third, torch.full_like(second, float("nan")), first])
    ours = causal_conv(company, weight, bias, offsets_of([1, 9, 4])).split([1, 9, 4])
    assert torch.equal(ours[0], together[2])
    assert torch.equal(ours[2], together[0])


def test_bf16_is_rounded_at_the_end_only_and_repeats():
    inputs, offsets = convolution_inputs([25, 15], 8, dtype=torch.bfloat16), offsets_of([25, 15])
    ours, again = (output_and_gradients(causal_conv, inputs, offsets) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(ours, again, strict=True))
    exact = output_and_gradients(causal_conv_oracle, inputs, offsets, F64)
    for mine, theirs in zip(ours, exact, strict=True):
        assert mine.dtype == torch.bfloat16
        assert (mine - theirs).abs().max() <= 2**-8 * theirs.abs().max()


@needs_native
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("lengths", [[1], [3, 1, 0, 4], [33, 7]])
@pytest.mark.parametrize(("channels", "taps"), [(5, 4), (1, 1), (48, 4), (17, 3)])
def test_silu_of_it_in_one_pass(channels, taps, lengths, dtype):
    inputs, offsets = convolution_inputs(lengths, channels, taps, dtype), offsets_of(lengths)
    assert causal_conv_cpu.takes(*inputs)
    ours = output_and_gradients(causal_conv_silu, inputs, offsets)
    exact = output_and_gradients(lambda *x: F.silu(causal_conv_oracle(*x)), inputs, offsets, F64)
    for mine, truth in zip(ours, exact, strict=True):
        assert mine.dtype == dtype
        assert (mine - truth).abs().max() <= (2e-6 if dtype == torch.float32 else 2**-8) * truth.abs().max()


@needs_native
def test_silu_of_half_of_a_projection_and_of_any_strides():
    x, weight, bias = convolution_inputs([6, 2], 20, dtype=torch.bfloat16)
    expected = causal_conv_silu(x, weight, bias, offsets_of([6, 2]))
    for view in (torch.cat([x, x], 1).chunk(2, 1)[1], x.T.contiguous().T):
        assert torch.equal(causal_conv_silu(view, weight, bias, offsets_of([6, 2])), expected)


@needs_native
def test_silu_gives_the_same_bits_whatever_the_threads():
    inputs, offsets = convolution_inputs([30, 2, 17, 8], 40, dtype=torch.bfloat16), offsets_of([30, 2, 17, 8])
    before, found = torch.get_num_threads(), []
    try:
        for threads in (1, 2):
            torch.set_num_threads(threads)
            found.append(output_and_gradients(causal_conv_silu, inputs, offsets))
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(one, two) for one, two in zip(*found, strict=True))


@pytest.mark.parametrize(("call", "named"), [
    (lambda x, w, b: causal_conv(x, w[:3], b, offsets_of([6])), "weight"),
    (lambda x, w, b: causal_conv(x, w, b[:3], offsets_of([6])), "bias"),
    (lambda x, w, b: causal_conv(x, w[:, :0], b, offsets_of([6])), "weight"),
    (lambda x, w, b: causal_conv(x, w, b, offsets_of([5])), "cell_offsets must ascend from 0 to the 6 tokens"),
    (lambda x, w, b: causal_conv(x, w, b, torch.tensor([1, 6])), "cell_offsets must ascend"),
    (lambda x, w, b: causal_conv(x, w, b, torch.tensor([0, 4, 3, 6])), "cell_offsets must ascend"),
    (lambda x, w, b: causal_conv(x, w, b, offsets_of([6]).float()), "cell_offsets must be int32"),
    (lambda x, w, b: causal_conv(x, w.long(), b, offsets_of([6])), "weight must be float32"),
    (lambda x, w, b: causal_conv(x, w, b.to("meta"), offsets_of([6])), "bias must be on cpu"),
    (lambda x, w, b: causal_conv(x, w, b, offsets_of([6])[:0]), "cell_offsets must be"),
])
def test_wrong_shapes_are_named(monkeypatch, call, named):
    with pytest.raises(ValueError, match=named):
        call(*convolution_inputs([6]))
    monkeypatch.setitem(globals(), "causal_conv", causal_conv_silu)
    with pytest.raises(ValueError, match=named):
        call(*convolution_inputs([6]))
