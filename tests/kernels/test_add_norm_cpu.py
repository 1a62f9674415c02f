"""The operations of add_norm.py in C: PyTorch's decisions to the bit, its values to rounding, its gradients."""

import math

import pytest
import torch

from scbench.kernels import add_norm_cpu, backend, random
from scbench.kernels.add_norm import add_norm, dropout, dropout_oracle, norm_gelu_add, relu_dropout, rms_norm

BF16, F32, F64 = torch.bfloat16, torch.float32, torch.float64
SHAPES = [(1, 1), (3, 5), (64, 256), (65, 33), (200, 48), (2, 16384), (0, 8)]
needs_native = pytest.mark.skipif(add_norm_cpu.library() is None, reason="no C compiler")


def draw(*shape, seed, dtype=BF16):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).bfloat16().to(dtype)


def both(monkeypatch, make, dtype):
    """What `make(dtype)` gives from the C code, and PyTorch in fp64."""
    ours = make(dtype)
    with monkeypatch.context() as patch:
        patch.setattr(backend, "FORCED", "torch")
        return ours, make(F64)


def keys_of(rows):
    return random.bits_torch(random.key(3, 8), torch.arange(rows))


@needs_native
@pytest.mark.parametrize("dtype", [BF16, F32])
@pytest.mark.parametrize(("rows", "width"), SHAPES)
def test_dropout_drops_what_pytorch_drops(monkeypatch, rows, width, dtype):
    def make(dtype):
        x = draw(rows, width, seed=0, dtype=dtype).requires_grad_()
        found = []
        for function in (dropout, relu_dropout):
            out = function(x, keys_of(rows), 0.3)
            found += [out.detach(), *torch.autograd.grad(out, x, draw(rows, width, seed=1, dtype=dtype))]
        return found

    for mine, exact in zip(*both(monkeypatch, make, dtype), strict=True):
        assert mine.dtype == dtype
        assert torch.equal(mine == 0, exact == 0)
        torch.testing.assert_close(mine, exact.to(dtype), rtol=2**-23 if dtype == F32 else 2**-7, atol=0)


@needs_native
@pytest.mark.parametrize("dropped", [True, False])
@pytest.mark.parametrize("dtype", [BF16, F32])
@pytest.mark.parametrize(("rows", "width"), [shape for shape in SHAPES if shape[1] > 1])
@pytest.mark.parametrize("function", [add_norm, norm_gelu_add])
def test_norms_and_their_gradients(monkeypatch, rows, width, dtype, dropped, function):
    def make(dtype):
        x, residual = (draw(rows, width, seed=i, dtype=dtype).requires_grad_() for i in range(2))
        weight, bias = (draw(width, seed=i, dtype=dtype).requires_grad_() for i in range(2, 4))
        out = function(x, residual, weight, bias, keys_of(rows) if dropped else None, 0.3)
        grads = torch.autograd.grad(out, (x, residual, weight, bias), draw(rows, width, seed=4, dtype=dtype))
        return [out.detach(), *grads]

    for mine, exact in zip(*both(monkeypatch, make, dtype), strict=True):
        assert mine.dtype == dtype
        if exact.numel():
            assert (mine - exact).abs().max() <= (2e-6 if dtype == F32 else 2**-8) * exact.abs().max()


@needs_native
@pytest.mark.parametrize("dtype", [BF16, F32])
@pytest.mark.parametrize(("rows", "width"), SHAPES)
def test_rms_norm_and_its_gradients(rows, width, dtype):
    x, weight = draw(rows, width, seed=0, dtype=dtype), draw(width, seed=1, dtype=dtype)

    def definition(x, weight, eps):
        return x / (x.square().mean(1, keepdim=True) + eps).sqrt() * weight

    def run(function, dtype):
        leaves = [tensor.to(dtype, copy=True).requires_grad_() for tensor in (x, weight)]
        out = function(*leaves, 1e-5)
        return [out.detach(), *torch.autograd.grad(out, leaves, draw(rows, width, seed=2, dtype=dtype).to(dtype))]

    for mine, exact in zip(run(rms_norm, dtype), run(definition, F64), strict=True):
        assert mine.dtype == dtype
        if exact.numel():  # of one column nothing but rounding is left in x's gradient
            assert (mine - exact).abs().max() <= (2e-6 if dtype == F32 else 2**-8) * max(exact.abs().max(), 0.1)


def test_rms_norm_names_wrong_shapes():
    with pytest.raises(ValueError, match=r"must be \[T, D\] and \[D\]"):
        rms_norm(torch.zeros(3, 4), torch.zeros(3), 1e-5)


@needs_native
def test_gelu_by_the_definition():
    x, bias = torch.linspace(-20, 20, 4001, dtype=F64), draw(4001, seed=0, dtype=F64)
    row = torch.stack([x, -x])  # of mean 0 and variance 133: normalised, weighted back to itself
    weight = (row[0].var(correction=0) + 1e-5).sqrt().expand(4001)
    exact = [value * 0.5 * math.erfc(-value / math.sqrt(2)) for value in x.tolist()]

    def run(*inputs):
        return add_norm_cpu.CpuNormGelu.apply(*(tensor.float() for tensor in inputs[:4]), *inputs[4:], 1e-5)

    ours = run(row, torch.zeros(2, 4001), weight, 0 * bias, None, 0.0)
    torch.testing.assert_close(ours[0].double(), torch.tensor(exact, dtype=F64), rtol=1e-6, atol=3e-6)
    kept = run(row, row, weight, bias, keys_of(2), 0.5).double() - row
    gelu = (row + bias) * 0.5 * torch.special.erfc(-(row + bias) / math.sqrt(2))
    torch.testing.assert_close(kept, dropout_oracle(gelu, keys_of(2), 0.5), rtol=1e-5, atol=1e-5)


@needs_native
def test_the_rounding_is_torchs():
    words = torch.arange(-(2**31), 2**31, 65_521 * 3, dtype=torch.int64).int()  # every sign and exponent, all kinds of rests
    x = words.view(F32)[None]
    x = x[:, : x.shape[1] // 16384 * 16384].reshape(-1, 16384)
    scale = 65536 / (65536 - round(0.3 * 65536))
    ours = dropout(x.bfloat16(), keys_of(len(x)), 0.3)
    kept = random.keep_torch(keys_of(len(x)), 16384, 0.3)
    expected = torch.where(kept, (x.bfloat16().float() * scale).bfloat16(), 0)
    torch.testing.assert_close(ours, expected, rtol=0, atol=0, equal_nan=True)


@needs_native
def test_the_same_bits_whatever_the_threads():
    before, found = torch.get_num_threads(), []
    try:
        for threads in (1, 2):
            torch.set_num_threads(threads)
            leaves = [draw(*shape, seed=i).requires_grad_() for i, shape in enumerate([(700, 40), (700, 40), (40,), (40,)])]
            found.append([])
            for function in (add_norm, norm_gelu_add):
                out = function(*leaves, keys_of(700), 0.1)
                found[-1] += [out, *torch.autograd.grad(out, leaves, draw(700, 40, seed=9))]
            out = rms_norm(leaves[0], leaves[2], 1e-5)
            found[-1] += [out, *torch.autograd.grad(out, [leaves[0], leaves[2]], draw(700, 40, seed=9))]
    finally:
        torch.set_num_threads(before)
    for one, two in zip(*found, strict=True):
        assert torch.equal(one, two)


@needs_native
def test_nan_stays_nan_and_strides_do_not_matter():
    x = draw(6, 8, seed=0)
    x[2, 3] = torch.nan
    for function in (add_norm, norm_gelu_add):
        assert function(x, x, x[0], x[1], None, 0.0)[2].isnan().all()
    assert rms_norm(x, x[0], 1e-5)[2].isnan().all()
    assert relu_dropout(x, keys_of(6), 0.001)[2, 3].isnan()
    across = x.T.contiguous().T
    assert torch.equal(dropout(across, keys_of(6), 0.5).nan_to_num(), dropout(x, keys_of(6), 0.5).nan_to_num())


def test_pytorch_where_there_is_no_compiler(monkeypatch, tmp_path):
    monkeypatch.setenv("SCBENCH_CACHE", str(tmp_path))
    monkeypatch.setenv("CC", "no-such-compiler")
    monkeypatch.setattr(add_norm_cpu, "library", add_norm_cpu.library.__wrapped__)  # nothing is kept
    x = draw(4, 8, seed=0)
    with pytest.warns(UserWarning, match=r"PyTorch does the work of add_norm_cpu\.c, slower: .*no-such-compiler"):
        ours = dropout(x, keys_of(4), 0.5)
    assert torch.equal(ours, torch.where(random.keep_torch(keys_of(4), 8, 0.5), x * 2, 0))
