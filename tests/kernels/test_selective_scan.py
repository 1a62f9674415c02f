"""The scan against the recurrence itself: values, gradients, cells of all lengths and companies, low precision."""

import pytest
import torch
from packed import F64, offsets_of, output_and_gradients, scan_inputs

from scbench.kernels import backend
from scbench.kernels.selective_scan import selective_scan, selective_scan_oracle


@pytest.mark.parametrize("lengths", [[1], [5], [1, 1, 1], [4, 1, 9, 2], [8, 16], [17, 7, 8, 24, 1], [3, 0, 40]])
@pytest.mark.parametrize(("channels", "states"), [(5, 3), (1, 1), (33, 4)])
def test_values_and_gradients_equal_the_oracles(lengths, channels, states):
    inputs, offsets = scan_inputs(lengths, channels, states), offsets_of(lengths)
    ours = output_and_gradients(selective_scan, inputs, offsets)
    for mine, theirs in zip(ours, output_and_gradients(selective_scan_oracle, inputs, offsets), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-11, atol=1e-12)


@pytest.mark.parametrize("lengths", [[1], [3, 1, 10]])
def test_gradcheck(lengths):
    leaves = [x.requires_grad_() for x in scan_inputs(lengths, 3, 2)]
    assert torch.autograd.gradcheck(lambda *x: selective_scan(*x, offsets_of(lengths)), leaves)


def test_views_are_taken_as_they_are():
    lengths = [6, 2]
    x, step, decay, b, c, skip = scan_inputs(lengths, 4, 3)
    fused, matrices = torch.cat([x, step], 1), torch.stack([b, c], 2)
    views = [*fused.chunk(2, 1), decay.T.contiguous().T, *matrices.unbind(2), torch.stack([skip, skip], 1)[:, 0]]
    assert not any(view.is_contiguous() for view in views)
    ours = output_and_gradients(selective_scan, views, offsets_of(lengths))
    plain = output_and_gradients(selective_scan, [x, step, decay, b, c, skip], offsets_of(lengths))
    assert all(torch.equal(mine, theirs) for mine, theirs in zip(ours, plain, strict=True))
    leaf = x.clone().requires_grad_()
    selective_scan(leaf, step, decay, b, c, skip, offsets_of(lengths)).sum().backward()  # an expanded gradient
    assert leaf.grad.abs().min() > 0


def test_cells_never_see_each_other():
    inputs, offsets = scan_inputs([4, 9, 3]), offsets_of([4, 9, 3])
    spoiled = [x.clone() for x in inputs]
    for i in (0, 1, 3, 4):
        spoiled[i][4:13] = float("nan")
    clean, dirty = (selective_scan(*x, offsets) for x in (inputs, spoiled))
    others = [0, 1, 2, 3, 13, 14, 15]
    assert torch.equal(clean[others], dirty[others])
    leaves = [x.clone().requires_grad_() for x in inputs]
    selective_scan(*leaves, offsets)[4:13].sum().backward()
    for i in (0, 1, 3, 4):
        assert leaves[i].grad[others].abs().max() == 0
        assert leaves[i].grad[4:13].abs().max() > 0


def test_a_token_sees_the_past_alone():
    inputs, offsets = scan_inputs([12]), offsets_of([12])
    changed = [x.clone() for x in inputs]
    for i in (0, 1, 3, 4):
        changed[i][7:] += 1
    before, after = selective_scan(*inputs, offsets), selective_scan(*changed, offsets)
    assert torch.equal(before[:7], after[:7])
    assert (before[7:] != after[7:]).all()


@pytest.mark.parametrize(("dtype", "tolerance"), [(F64, 1e-12), (torch.float32, 1e-5)])
def test_company_and_order_of_cells_change_nothing(dtype, tolerance):
    lengths = [5, 1, 18, 9]
    inputs = scan_inputs(lengths, 6, 4, dtype)
    together = selective_scan(*inputs, offsets_of(lengths)).split(lengths)
    parts = [x.split(lengths) if len(x) == sum(lengths) else x for x in inputs]
    for order in ([2, 0, 3, 1], [1, 3], [2]):
        chosen = [torch.cat([x[i] for i in order]) if isinstance(x, tuple) else x for x in parts]
        ours = selective_scan(*chosen, offsets_of([lengths[i] for i in order]))
        torch.testing.assert_close(ours, torch.cat([together[i] for i in order]), rtol=tolerance, atol=tolerance)


def test_a_repetition_is_bit_identical():
    inputs, offsets = scan_inputs([30, 2, 17], 40, 4, torch.float32), offsets_of([30, 2, 17])
    first, second = (output_and_gradients(selective_scan, inputs, offsets) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def test_long_cells_keep_fp32_precision():
    inputs, offsets = scan_inputs([400, 3], 4, 4, torch.float32), offsets_of([400, 3])
    exact = output_and_gradients(selective_scan, inputs, offsets, F64)
    for mine, theirs in zip(output_and_gradients(selective_scan, inputs, offsets), exact, strict=True):
        assert (mine - theirs).abs().max() <= 1e-5 * theirs.abs().max()


def test_bf16_is_rounded_at_the_end_only():
    lengths = [25, 15]
    inputs, offsets = scan_inputs(lengths, 8, 4, torch.bfloat16), offsets_of(lengths)
    ours = output_and_gradients(selective_scan, inputs, offsets)
    exact = output_and_gradients(selective_scan_oracle, inputs, offsets, F64)
    assert all(mine.dtype == torch.bfloat16 for mine in ours)
    for mine, theirs in zip(ours, exact, strict=True):
        assert (mine - theirs).abs().max() <= 2**-8 * theirs.abs().max()


def test_a_wide_step_keeps_its_precision_beside_bf16_tokens():
    lengths = [20]
    x, step, decay, b, c, skip = scan_inputs(lengths, 8, 4)
    x, b, c, skip = (v.bfloat16() for v in (x, b, c, skip))
    inputs = [x, step.float(), decay.float(), b, c, skip]
    ours = output_and_gradients(selective_scan, inputs, offsets_of(lengths))
    exact = output_and_gradients(selective_scan_oracle, inputs, offsets_of(lengths), F64)
    assert [mine.dtype for mine in ours[1:]] == [v.dtype for v in inputs]
    for mine, theirs in zip(ours, exact, strict=True):
        assert (mine - theirs).abs().max() <= 2**-8 * theirs.abs().max()


def test_few_states_are_kept_for_the_gradients(monkeypatch):
    monkeypatch.setattr(backend, "FORCED", "torch")  # the C code keeps none
    lengths, states = [512] * 4, 4
    inputs = [x.requires_grad_() for x in scan_inputs(lengths, 6, states, torch.float32)]
    output = selective_scan(*inputs, offsets_of(lengths))
    assert sum(before.untyped_storage().nbytes() for *_, before in output.grad_fn.chunks) == 4 * output.numel() * states / 8


@pytest.mark.parametrize(("position", "shape", "named"), [
    (1, (4, 5), "x and step"), (2, (6, 3), "decay"), (2, (), "decay"), (2, (5, 0), "decay"), (5, (4,), "skip"),
    (3, (5, 2), "input_matrix"), (4, (4, 3), "output_"),
])
def test_wrong_shapes_are_named(position, shape, named):
    inputs = scan_inputs([3, 2], 5, 3)
    inputs[position] = torch.zeros(shape, dtype=F64)
    with pytest.raises(ValueError, match=named):
        selective_scan(*inputs, offsets_of([3, 2]))


@pytest.mark.parametrize("offsets", [[0, 4], [1, 5], [0, 3, 2, 5]], ids=str)
def test_offsets_that_do_not_fit_are_named(offsets):
    with pytest.raises(ValueError, match="cell_offsets must ascend from 0 to the 5 tokens"):
        selective_scan(*scan_inputs([5]), torch.tensor(offsets))


def test_wrong_dtypes_and_devices_are_named():
    inputs, offsets = scan_inputs([5]), offsets_of([5])
    names = ["x", "step", "decay", "input_matrix", "output_matrix", "skip"]
    for position, name in enumerate(names):
        wrong = list(inputs)
        wrong[position] = inputs[position].long()
        with pytest.raises(ValueError, match=f"{name} must be float32"):
            selective_scan(*wrong, offsets)
    with pytest.raises(ValueError, match="cell_offsets must be int32"):
        selective_scan(*inputs, offsets.float())
    with pytest.raises(ValueError, match="skip must be on cpu"):
        selective_scan(*inputs[:-1], inputs[-1].to("meta"), offsets)
    with pytest.raises(ValueError, match=r"cell_offsets must be \[B\+1\]"):
        selective_scan(*inputs, offsets[None])
