"""The scan in C against the recurrence in fp64, whatever the shapes and threads; PyTorch where it cannot be had."""

import pytest
import torch
from packed import F64, gated_scan_inputs, gated_scan_oracle, offsets_of, output_and_gradients, scan_inputs

from scbench.kernels import backend, selective_scan_cpu
from scbench.kernels.selective_scan import gated_selective_scan, selective_scan, selective_scan_oracle

BF16, F32 = torch.bfloat16, torch.float32
needs_native = pytest.mark.skipif(selective_scan_cpu.library() is None, reason="no C compiler")


@needs_native
@pytest.mark.parametrize("dtype", [F32, BF16])
@pytest.mark.parametrize(("channels", "states"), [(1, 1), (16, 4), (33, 4), (50, 16)])
@pytest.mark.parametrize("lengths", [[1], [4, 1, 9, 2], [3, 0, 40]])
@pytest.mark.parametrize(("function", "oracle", "draw"), [
    (selective_scan, selective_scan_oracle, scan_inputs), (gated_selective_scan, gated_scan_oracle, gated_scan_inputs),
])  # fmt: skip
def test_values_and_gradients(function, oracle, draw, lengths, channels, states, dtype):
    inputs, offsets = draw(lengths, channels, states, dtype), offsets_of(lengths)
    assert selective_scan_cpu.takes(inputs[0], inputs[3])
    ours = output_and_gradients(function, inputs, offsets)
    exact = output_and_gradients(oracle, inputs, offsets, F64)
    for mine, truth in zip(ours, exact, strict=True):
        assert mine.dtype == dtype
        assert (mine - truth).abs().max() <= (3e-6 if dtype == F32 else 2**-8) * truth.abs().max()


@needs_native
def test_decays_from_none_to_all():
    inputs, offsets = scan_inputs([20], 3, 2, F32), offsets_of([20])
    inputs[1] = torch.logspace(-8, 4, 60).reshape(20, 3)  # exponents to −10⁴: exp underflows
    ours = output_and_gradients(selective_scan, inputs, offsets)
    for mine, truth in zip(ours, output_and_gradients(selective_scan_oracle, inputs, offsets, F64), strict=True):
        torch.testing.assert_close(mine, truth.float(), rtol=1e-5, atol=1e-5 * float(truth.abs().max()))


@needs_native
def test_steps_and_gates_from_none_to_all():
    inputs, offsets = gated_scan_inputs([21], 3, 2, F32), offsets_of([21])
    inputs[1] = torch.linspace(-120, 80, 63).reshape(21, 3)  # softplus underflows, and is its argument
    inputs[7] = torch.linspace(-200, 200, 63).reshape(21, 3)
    inputs[4] *= torch.linspace(1e4, 1, 21)[:, None]  # small steps do something too
    ours = output_and_gradients(gated_selective_scan, inputs, offsets)
    for mine, truth in zip(ours, output_and_gradients(gated_scan_oracle, inputs, offsets, F64), strict=True):
        torch.testing.assert_close(mine, truth.float(), rtol=2e-5, atol=1e-6 * float(truth.abs().max()))


@needs_native
def test_small_steps_are_not_lost():
    """Softplus far below 0 is exp, whose relative error is that of its argument in fp32."""
    step = torch.linspace(-80, 5, 400)[:, None]
    one = torch.ones(400, 1)
    inputs = step, torch.zeros(1), torch.zeros(1, 1), one, one, torch.zeros(1), one  # each step alone: a cell of one token
    ours = gated_selective_scan(one, *inputs, torch.arange(401, dtype=torch.int32))
    exact = torch.log1p(step.double().exp()) * torch.sigmoid(one.double())
    torch.testing.assert_close(ours.double(), exact, rtol=1e-5, atol=0)


@needs_native
def test_a_gate_in_wider_rows_is_taken_as_it_is():
    inputs, offsets = gated_scan_inputs([7, 3], 20, 4, BF16), offsets_of([7, 3])
    expected = gated_selective_scan(*inputs, offsets)
    for gate in (torch.cat([inputs[0], inputs[7]], 1)[:, 20:], inputs[7].T.contiguous().T):
        assert torch.equal(gated_selective_scan(*inputs[:7], gate, offsets), expected)


@needs_native
def test_the_same_bits_whatever_the_threads():
    inputs, offsets = gated_scan_inputs([30, 2, 17, 8], 40, 4, BF16), offsets_of([30, 2, 17, 8])
    before, found = torch.get_num_threads(), []
    try:
        for threads in (1, 2):
            torch.set_num_threads(threads)
            found.append(output_and_gradients(gated_selective_scan, inputs, offsets))
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(one, two) for one, two in zip(*found, strict=True))


@needs_native
def test_who_takes_what(monkeypatch):
    x, _, decay, *_ = scan_inputs([3], 4, 2, F32)
    assert selective_scan_cpu.takes(x, decay)
    assert not selective_scan_cpu.takes(x, decay.double())
    assert not selective_scan_cpu.takes(x, torch.zeros(4, 17))
    monkeypatch.setattr(backend, "FORCED", "torch")
    assert not selective_scan_cpu.takes(x, decay)


@pytest.mark.parametrize(("place", "wrong"), [(7, torch.zeros(6, 3)), (2, torch.zeros(3))])
def test_wrong_shapes_are_named(place, wrong):
    inputs = gated_scan_inputs([6], 4)
    inputs[place] = wrong
    with pytest.raises(ValueError, match="gate and step_bias must be"):
        gated_selective_scan(*inputs, offsets_of([6]))


def test_pytorch_where_there_is_no_compiler(monkeypatch, tmp_path):
    monkeypatch.setenv("SCBENCH_CACHE", str(tmp_path))
    monkeypatch.setenv("CC", "no-such-compiler")
    monkeypatch.setattr(selective_scan_cpu, "library", selective_scan_cpu.library.__wrapped__)  # nothing is kept
    inputs, offsets = scan_inputs([5, 2], 4, 3, F32), offsets_of([5, 2])
    with pytest.warns(UserWarning, match=r"PyTorch does the work of selective_scan_cpu\.c, slower: .*no-such-compiler"):
        ours = selective_scan(*inputs, offsets)
    torch.testing.assert_close(ours, selective_scan_oracle(*inputs, offsets), rtol=1e-5, atol=1e-5)
