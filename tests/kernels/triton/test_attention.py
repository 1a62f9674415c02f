"""Our attention kernels against the definition: packed cells, wider values, a scale, pads, dropout."""

import pytest
import torch

from scbench.kernels import attention_triton, random
from scbench.kernels.attention import _CellAttention, attention, attention_oracle, attention_path

F64 = torch.float64
LENGTHS, KEY_LENGTHS = [4, 70, 1], [3, 66, 1]


def draw(*shape, dtype=F64, seed=0):
    return torch.randn(*shape, dtype=F64, generator=torch.Generator().manual_seed(seed)).to(dtype)


def offsets_of(lengths):
    return torch.tensor([0, *torch.tensor(lengths).cumsum(0).tolist()], dtype=torch.int32)


def options_of(name, width, tokens, key_lengths):
    """The scale keeps scores of all widths alike: a GPU fuses the product and the difference in their exponent, the
    interpreter rounds each, which where scores are tens is four times a plain softmax's error."""
    options = {
        "scale": {"scale": 0.8 * width**-0.5},
        "pads": {"key_lengths": torch.tensor(key_lengths, dtype=torch.int32)},
        "dropout": {"token_keys": random.bits_torch(7, torch.arange(tokens)), "probability": 0.4},
    }
    return {key: x for part, values in options.items() if name in (part, "all") for key, x in values.items()}


def outputs_and_gradients(function, inputs, upstream, *arguments, **options):
    leaves = [x.detach().clone().requires_grad_() for x in inputs]
    output = function(*leaves, *arguments, **options)
    output.backward(upstream.to(output.dtype))
    return [output.detach(), *(leaf.grad for leaf in leaves)]


def check(lengths, key_lengths, heads, width, value_width, dtype, name, assert_as_good):
    tokens, offsets = sum(lengths), offsets_of(lengths)
    inputs = [draw(tokens, heads, w, dtype=dtype, seed=n) for n, w in enumerate([width, width, value_width])]
    upstream = draw(tokens, heads, value_width, dtype=dtype, seed=9).double()
    options = options_of(name, width, tokens, key_lengths)
    assert attention_path(inputs[0], plain=True) == "triton"
    ours = outputs_and_gradients(attention, inputs, upstream, offsets, **options)
    exact = outputs_and_gradients(attention_oracle, [x.double() for x in inputs], upstream, offsets, **options)
    if dtype == F64:
        for mine, truth in zip(ours, exact, strict=True):
            torch.testing.assert_close(mine, truth, rtol=1e-12, atol=1e-12)
        return
    assert [x.dtype for x in ours] == [dtype] * 4
    options = {"scale": None, "key_lengths": None, "token_keys": None, "probability": 0.0, **options}
    plain = outputs_and_gradients(_CellAttention.apply, inputs, upstream, offsets, *options.values())
    # Where scores do not matter (one key), their gradient is a difference of two sums that are equal: 0 up to their rounding.
    rounding = 4 * torch.finfo(torch.float32).eps * upstream.abs().max() * inputs[2].abs().max()
    for x, truth in zip(ours, exact, strict=True):
        x[truth == 0] = torch.where(x[truth == 0].abs() <= rounding, 0, x[truth == 0])
    assert_as_good(ours, plain, exact)


@pytest.mark.parametrize("name", ["plain", "scale", "pads", "dropout", "all"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, F64], ids=str)
def test_outputs_and_gradients_equal_the_definition(dtype, name, assert_as_good):
    check(LENGTHS, KEY_LENGTHS, 2, 6, 6, dtype, name, assert_as_good)


@pytest.mark.parametrize(("width", "value_width"), [(3, 5), (24, 24), (128, 256), (8, 130), (256, 16), (1, 1)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_widths(dtype, width, value_width, assert_as_good):
    check([33, 7], [20, 7], 1, width, value_width, dtype, "all", assert_as_good)


@pytest.mark.parametrize("lengths", [[1], [1, 1, 1], [130], [32, 64]], ids=str)
def test_lengths(lengths, assert_as_good):
    check(lengths, lengths, 2, 6, 6, torch.float32, "all", assert_as_good)


def test_more_cells_than_are_compared_at_once():
    lengths = [1] * 135 + [0, 40]
    tokens, offsets = sum(lengths), offsets_of(lengths)
    inputs = [draw(tokens, 1, 4, seed=n) for n in range(3)]
    torch.testing.assert_close(attention(*inputs, offsets), attention_oracle(*inputs, offsets), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(("value_width", "name"), [(2, "plain"), (3, "all")])
def test_gradients_in_fp64(value_width, name):
    leaves = [draw(5, 2, w, seed=n).requires_grad_() for n, w in enumerate([2, 2, value_width])]
    options = options_of(name, 2, 5, [2, 2])
    assert torch.autograd.gradcheck(lambda *x: attention(*x, offsets_of([3, 2]), **options), leaves, fast_mode=True)


def test_two_runs_agree_to_the_bit():
    inputs, upstream = [draw(40, 1, w, dtype=torch.float32, seed=w) for w in (6, 6, 70)], draw(40, 1, 70)
    options = options_of("all", 6, 40, [30, 2])
    runs = [outputs_and_gradients(attention, inputs, upstream, offsets_of([37, 3]), **options) for _ in range(2)]
    for first, second in zip(*runs, strict=True):
        assert torch.equal(first, second)


def test_views_and_gradients_that_are_views():
    fused = draw(9, 3, 2, 4).requires_grad_()
    crossed = draw(2, 9, 4, seed=1).transpose(0, 1)
    crossed_last = draw(9, 4, 2, seed=2).transpose(1, 2)
    offsets = offsets_of([7, 2])
    for query, key, value in (fused.unbind(1), (crossed, fused[:, 1], crossed_last)):
        ours, theirs = (f(query, key, value, offsets) for f in (attention, attention_oracle))
        torch.testing.assert_close(ours, theirs)
        for backwards in (torch.Tensor.sum, lambda x: (x.transpose(0, 2) * draw(4, 2, 9, seed=3)).sum()):
            grads = [torch.autograd.grad(backwards(x), fused, retain_graph=True)[0] for x in (ours, theirs)]
            torch.testing.assert_close(*grads)


def test_strided_offsets_lengths_and_keys():
    def spread(x):
        return torch.stack([x, x + 1], 1)[:, 0]

    inputs, offsets = [draw(20, 2, 4, seed=n) for n in range(3)], offsets_of([16, 4])
    options = {"key_lengths": torch.tensor([13, 2]), "token_keys": random.bits_torch(7, torch.arange(20)), "probability": 0.4}
    strided = {name: spread(x) if torch.is_tensor(x) else x for name, x in options.items()}
    assert torch.equal(attention(*inputs, spread(offsets), **strided), attention(*inputs, offsets, **options))


def test_pads_are_not_seen_whatever_they_hold():
    inputs = [draw(20, 2, 4, seed=n) for n in range(3)]
    lengths = torch.tensor([13, 2], dtype=torch.int32)
    clean = outputs_and_gradients(attention, inputs, draw(20, 2, 4, seed=9), offsets_of([16, 4]), key_lengths=lengths)
    for x in inputs[1:]:
        x[13:16] = torch.inf
    dirty = outputs_and_gradients(attention, inputs, draw(20, 2, 4, seed=9), offsets_of([16, 4]), key_lengths=lengths)
    for expected, result in zip(clean, dirty, strict=True):
        torch.testing.assert_close(result, expected, rtol=0, atol=0)
    assert not dirty[2][13:16].any()


def test_heads_wider_than_the_kernels_take_go_cell_by_cell():
    inputs = [draw(3, 1, 257, seed=n) for n in range(3)]
    assert attention_path(inputs[0], plain=True) == "cells"
    torch.testing.assert_close(attention(*inputs, offsets_of([3])), attention_oracle(*inputs, offsets_of([3])))


def test_a_large_batch_takes_several_launches(monkeypatch):
    """Launches of one head, of one block, of some blocks that cut a cell in two: nothing changes, to the bit."""
    monkeypatch.setattr(attention_triton.backend, "cache_bytes", lambda x: 10**9)
    offsets, inputs = offsets_of([70, 1, 0, 150, 30]), [draw(251, 2, w, dtype=torch.float32, seed=w) for w in (4, 4, 6)]
    once = outputs_and_gradients(attention, inputs, draw(251, 2, 6, seed=9), offsets)
    counted = []
    launches = attention_triton._launches
    monkeypatch.setattr(attention_triton, "_launches", lambda *x: counted.append(list(launches(*x))) or counted[-1])
    for size in (1, 7_000, 12_000):
        monkeypatch.setattr(attention_triton.backend, "cache_bytes", lambda x, size=size: size)
        for mine, whole in zip(outputs_and_gradients(attention, inputs, draw(251, 2, 6, seed=9), offsets), once, strict=True):
            assert torch.equal(mine, whole)
    assert [len(launches) for launches in counted] == [16, 16, 8, 16, 2, 6]
