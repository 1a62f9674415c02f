"""Attention in C on a CPU: against the definition in fp64, whatever the shapes and threads; PyTorch where it cannot be had."""

import warnings

import pytest
import torch
from packed import offsets_of

from scbench.kernels import attention_cpu, backend
from scbench.kernels.attention import _CellAttention, attention, attention_oracle, self_attention

BF16, F64 = torch.bfloat16, torch.float64
needs_native = pytest.mark.skipif(attention_cpu.library() is None, reason="no bf16 instructions, or no C compiler")


def draw(*shape, seed, dtype=BF16):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).bfloat16().to(dtype)


def results(function, lengths, heads, width, value_width, dtype=BF16, **options):
    """Output and gradients; the same numbers in every precision."""
    tokens = sum(lengths)
    leaves = [draw(tokens, heads, w, seed=i, dtype=dtype).requires_grad_()
              for i, w in enumerate((width, width, value_width))]  # fmt: skip
    output = function(*leaves, offsets_of(lengths), **options)
    output.backward(draw(tokens, heads, value_width, seed=7, dtype=dtype))
    return [output.detach(), *(leaf.grad for leaf in leaves)]


@needs_native
@pytest.mark.parametrize(("lengths", "heads", "width", "value_width"), [
    ([1], 1, 1, 1), ([1, 1, 1], 2, 8, 8), ([48, 49, 47, 0, 12], 3, 40, 5), ([513, 2, 77], 2, 32, 32), ([33, 97], 1, 128, 256),
    ([65], 2, 64, 48), ([16, 32, 15, 31, 17, 33], 1, 16, 96),
])  # fmt: skip
def test_errs_no_more_than_plain_torch(lengths, heads, width, value_width):
    shape = lengths, heads, width, value_width
    ours, exact = results(attention, *shape), results(attention_oracle, *shape, dtype=F64)
    plain = results(lambda *x: _CellAttention.apply(*x), *shape)
    for mine, theirs, truth in zip(ours, plain, exact, strict=True):
        assert mine.dtype == BF16
        assert (mine - truth).abs().max() <= 1.1 * (theirs - truth).abs().max() + 1e-6 * truth.abs().max()


@needs_native
def test_pads_attend_but_are_not_attended_to():
    lengths, options = [5, 70, 33, 9], {"key_lengths": torch.tensor([3, 70, 20, 1], dtype=torch.int32), "scale": 0.7}
    ours = results(attention, lengths, 2, 24, 40, **options)
    exact = results(attention_oracle, lengths, 2, 24, 40, dtype=F64, **options)
    for mine, truth in zip(ours, exact, strict=True):
        assert (mine - truth).abs().max() <= 2**-7 * truth.abs().max()
    assert not ours[2][3:5].any()
    assert not ours[3][3:5].any()


@needs_native
@pytest.mark.parametrize("key_lengths", [None, [5, 130, 33, 1], [3, 130, 20, 1], [1, 7, 1, 1]])
def test_one_tensor_as_query_and_key_gets_the_sum_of_both_gradients(key_lengths):
    lengths = [5, 130, 33, 1]
    options = {} if key_lengths is None else {"key_lengths": torch.tensor(key_lengths, dtype=torch.int32)}
    found = []
    for dtype, function in ((BF16, attention), (F64, attention_oracle)):
        both, value = (draw(169, 2, width, seed=i, dtype=dtype).requires_grad_() for i, width in enumerate((24, 40)))
        out = function(both, both, value, offsets_of(lengths), scale=0.7, **options)
        out.backward(draw(169, 2, 40, seed=7, dtype=dtype))
        found.append([out.detach(), both.grad, value.grad])
    for mine, truth in zip(*found, strict=True):
        assert (mine - truth).abs().max() <= 2**-7 * truth.abs().max()


@needs_native
def test_large_and_small_scores():
    exact, ours = ([], [])
    for dtype, found in ((F64, exact), (BF16, ours)):
        query, key, value = (draw(40, 1, 32, seed=i, dtype=dtype) for i in range(3))
        function = attention if dtype == BF16 else attention_oracle
        found += [function(query * 64, key * 64, value, offsets_of([40])), function(query * 0, key, value, offsets_of([40]))]
    for mine, truth in zip(ours, exact, strict=True):
        torch.testing.assert_close(mine.to(F64), truth, rtol=2**-7, atol=2**-8)


@needs_native
def test_the_same_bits_whatever_the_threads_and_the_other_cells():
    lengths, before = [60, 7, 131], torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        one = results(attention, lengths, 2, 32, 32)
        torch.set_num_threads(2)
        two = results(attention, lengths, 2, 32, 32)
    finally:
        torch.set_num_threads(before)
    for a, b in zip(one, two, strict=True):
        assert torch.equal(a, b)
    tokens = [draw(sum(lengths), 2, 32, seed=i)[60:67] for i in range(3)]
    assert torch.equal(attention(*tokens, offsets_of([7])), one[0][60:67])


@needs_native
def test_takes_views_of_one_projection_and_any_strides():
    fused = draw(20, 3, 2, 32, seed=0)
    offsets = offsets_of([8, 12])
    expected = attention(*(x.contiguous() for x in fused.unbind(1)), offsets)
    assert torch.equal(attention(*fused.unbind(1), offsets), expected)
    across = [x.permute(1, 2, 0).contiguous().permute(2, 0, 1) for x in fused.unbind(1)]
    assert torch.equal(attention(*across, offsets), expected)


@needs_native
@pytest.mark.parametrize("options", [{}, {"scale": 0.3, "key_lengths": torch.tensor([5, 12], dtype=torch.int32)}])
def test_self_attention_is_attention(monkeypatch, options):
    fused, offsets, upstream = draw(20, 3, 2, 32, seed=0).requires_grad_(), offsets_of([8, 12]), draw(20, 2, 32, seed=1)
    found = [self_attention(fused, offsets, **options), attention(*fused.unbind(1), offsets, **options)]
    ours, plain = (torch.autograd.grad(output, fused, upstream)[0] for output in found)
    assert torch.equal(*found)
    assert torch.equal(ours, plain)
    with pytest.raises(ValueError, match="cell_offsets"):
        self_attention(fused, offsets[:-1])
    monkeypatch.setattr(backend, "FORCED", "torch")
    torch.testing.assert_close(self_attention(fused, offsets, **options), found[0], rtol=2**-6, atol=2**-6)


@needs_native
def test_scbench_kernels_chooses(monkeypatch):
    query = draw(3, 1, 4, seed=0)
    assert attention_cpu.takes(query)
    assert not attention_cpu.takes(query.float())
    monkeypatch.setattr(backend, "FORCED", "torch")
    assert not attention_cpu.takes(query)


def test_pytorch_where_there_is_no_compiler(monkeypatch, tmp_path):
    monkeypatch.setenv("SCBENCH_CACHE", str(tmp_path))
    monkeypatch.setenv("CC", "no-such-compiler")
    monkeypatch.setattr(attention_cpu, "library", attention_cpu.library.__wrapped__)  # nothing is kept
    exact = results(attention_oracle, [9, 4], 2, 8, 8, dtype=F64)
    with pytest.warns(UserWarning, match=r"PyTorch does the work of attention_cpu\.c, slower: .*no-such-compiler"):
        ours = results(attention, [9, 4], 2, 8, 8)
    for mine, truth in zip(ours, exact, strict=True):
        assert (mine - truth).abs().max() <= 2**-6 * truth.abs().max()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        attention(*(draw(3, 1, 4, seed=i).float() for i in range(3)), offsets_of([3]))  # fp32 never asks for it
