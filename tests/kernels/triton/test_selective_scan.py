"""The scan's kernels against the recurrence itself: chunks, channel blocks, cells of all lengths, precision, repetition."""

import pytest
import torch
from packed import F64, offsets_of, results, scan_inputs

from scbench.kernels.selective_scan import selective_scan, selective_scan_oracle


@pytest.mark.parametrize(("lengths", "channels", "states"), [
    ([1], 6, 4), ([2, 1], 24, 4), ([16, 17, 15, 33], 6, 4), ([3, 0, 40], 5, 3), ([20], 130, 4), ([9, 5], 256, 2),
    ([7, 1], 1, 1), ([6, 11], 3, 16),
], ids=str)  # fmt: skip
def test_fp64_equals_the_oracle(lengths, channels, states):
    inputs = scan_inputs(lengths, channels, states)
    ours, exact = results(selective_scan, inputs, lengths), results(selective_scan_oracle, inputs, lengths)
    for mine, truth in zip(ours, exact, strict=True):
        torch.testing.assert_close(mine, truth, rtol=1e-11, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("lengths", "channels"), [([40], 24), ([18, 1, 5], 130)], ids=str)
def test_low_precision_is_as_good_as_pytorch(dtype, lengths, channels, assert_as_good):
    inputs = scan_inputs(lengths, channels, dtype=dtype)
    ours = results(selective_scan, inputs, lengths)
    assert [x.dtype for x in ours] == [dtype] * 7
    exact = results(selective_scan_oracle, inputs, lengths, F64)
    assert_as_good(ours, results(selective_scan_oracle, inputs, lengths), exact)


def test_a_wide_step_beside_half_precision_tokens():
    x, step, decay, b, c, skip = scan_inputs([19, 3], 24)
    inputs = [x.half(), step.float(), decay.float(), b.half(), c.half(), skip.half()]
    ours = results(selective_scan, inputs, [19, 3])
    assert [mine.dtype for mine in ours[1:]] == [v.dtype for v in inputs]
    for mine, truth in zip(ours, results(selective_scan_oracle, inputs, [19, 3], F64), strict=True):
        assert (mine - truth).abs().max() <= (1e-3 if mine.dtype == torch.float16 else 1e-6) * truth.abs().max()


def test_gradcheck():
    leaves = [x.requires_grad_() for x in scan_inputs([1, 17], 2, 2)]
    assert torch.autograd.gradcheck(lambda *x: selective_scan(*x, offsets_of([1, 17])), leaves, fast_mode=True)


def test_views_are_taken_as_they_are():
    lengths = [18, 2]
    x, step, decay, b, c, skip = scan_inputs(lengths, 6)
    fused, matrices = torch.cat([x, step], 1), torch.stack([b, c], 2)
    views = [*fused.chunk(2, 1), decay.T.contiguous().T, *matrices.unbind(2), torch.stack([skip, skip], 1)[:, 0]]
    assert not any(view.is_contiguous() for view in views)
    ours, plain = results(selective_scan, views, lengths), results(selective_scan, [x, step, decay, b, c, skip], lengths)
    assert all(torch.equal(mine, theirs) for mine, theirs in zip(ours, plain, strict=True))
    leaf = x.clone().requires_grad_()
    selective_scan(leaf, step, decay, b, c, skip, offsets_of(lengths)).sum().backward()  # an expanded gradient
    assert leaf.grad.abs().min() > 0
    offsets = torch.stack([offsets_of(lengths)] * 2, 1)[:, 0]
    assert torch.equal(selective_scan(*views, offsets), plain[0])


def test_cells_never_see_each_other():
    lengths, others = [17, 20, 3], [*range(17), 37, 38, 39]
    inputs = scan_inputs(lengths)
    spoiled = [x.clone() for x in inputs]
    for i in (0, 1, 3, 4):
        spoiled[i][17:37] = float("nan")
    clean, dirty = results(selective_scan, inputs, lengths), results(selective_scan, spoiled, lengths)
    for i in (0, 1, 2, 4, 5):  # y and the gradients of what tokens have
        assert torch.equal(clean[i][others], dirty[i][others])


def test_two_runs_are_bit_identical():
    inputs = scan_inputs([18, 5], 130, dtype=torch.float32)
    first, second = (results(selective_scan, inputs, [18, 5]) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def test_states_are_saved_for_gradients_only():
    inputs = scan_inputs([33, 40, 1])
    output = selective_scan(*(x.requires_grad_() for x in inputs), offsets_of([33, 40, 1]))
    assert output.grad_fn.saved_tensors[-1].shape == (73 // 16, 6, 4)
    with torch.no_grad():
        assert torch.equal(selective_scan(*inputs, offsets_of([33, 40, 1])), output)


def test_no_tokens():
    inputs = scan_inputs([0, 0])
    output, *gradients = results(selective_scan, inputs, [0, 0])
    assert output.shape == (0, 6)
    assert all((gradient == 0).all() for gradient in gradients)
