"""Gene table row + value MLP as a piecewise-linear function, against the definition."""

import pytest
import torch

from scbench.kernels import backend, gene_value_embedding_triton
from scbench.kernels.gene_value_embedding import gene_value_embedding, gene_value_embedding_oracle

F64 = torch.float64
SHAPES = [(1, 1, 6), (60, 11, 24), (300, 7, 6), (20, 40, 130)]


def draw(*shape, dtype=F64, seed=0):
    return torch.randn(*shape, dtype=F64, generator=torch.Generator().manual_seed(seed + sum(shape))).to(dtype)


def order(genes):
    return torch.argsort(genes, stable=True).int()


def inputs_of(tokens=60, rows=11, width=24, dtype=F64, largest=512.0):
    """Both ends of the table, a gene that a third of the tokens have, masked values, zeros, counts and the largest value."""
    genes = torch.randint(rows, (tokens,), generator=torch.Generator().manual_seed(tokens)).int()
    genes[::3] = rows // 2
    genes[-1:], genes[:1] = 0, rows - 1
    values = torch.log1p(torch.arange(tokens) % 17.0)
    values[::4], values[1::5] = -1.0, 0.0
    values[-1] = largest
    shapes = [(rows, width), (width, 1), (width,), (width, width), (width,)]
    weights = [draw(*shape, seed=1000 * number).to(dtype) for number, shape in enumerate(shapes)]
    return genes, values.to(F64 if dtype == F64 else torch.float32), weights


def results(function, genes, values, weights, upstream):
    leaves = [w.detach().clone().requires_grad_() for w in weights]
    if function is gene_value_embedding:
        out = function(genes, values, order(genes), *leaves)
    else:
        out = function(genes, values, *leaves)
    out.backward(upstream.to(out.dtype))
    return [out.detach(), *(leaf.grad for leaf in leaves)]


def assert_equal_in_fp64(genes, values, weights):
    upstream = draw(len(genes), weights[0].shape[1], seed=9)
    ours = results(gene_value_embedding, genes, values, weights, upstream)
    exact = results(gene_value_embedding_oracle, genes, values, weights, upstream)
    for mine, truth in zip(ours, exact, strict=True):
        assert (mine - truth).abs().max() <= 1e-13 * truth.abs().max().clamp(min=1)


@pytest.mark.parametrize(("shape", "dtype"), [
    *((shape, dtype) for shape in SHAPES for dtype in (torch.float32, torch.float16)), ((20, 9, 256), torch.float32),
], ids=str)  # fmt: skip
def test_equals_its_oracle(shape, dtype, assert_as_good):
    half = dtype == torch.float16
    genes, values, weights = inputs_of(*shape, dtype=dtype, largest=9.0 if half else 512.0)
    values = values.half().float() if half else values
    upstream = draw(shape[0], shape[2], seed=9).to(dtype).double()
    ours = results(gene_value_embedding, genes, values, weights, upstream)
    assert [x.dtype for x in ours] == [dtype] * 6
    plain = results(gene_value_embedding_oracle, genes, values.to(dtype), weights, upstream)
    exact = results(gene_value_embedding_oracle, genes, values.double(), [w.double() for w in weights], upstream)
    assert_as_good(ours, plain, exact)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_fp64(shape):
    assert_equal_in_fp64(*inputs_of(*shape))


def test_gradcheck():
    genes, values, weights = inputs_of(5, 3, 3, largest=3.0)
    leaves = [w.requires_grad_() for w in weights]
    assert torch.autograd.gradcheck(lambda *w: gene_value_embedding(genes, values, order(genes), *w), leaves)


def test_as_initialised_all_breakpoints_are_zero_and_cls_lies_on_them():
    genes, values, weights = inputs_of()
    weights[2].zero_()
    assert (values == 0).any()
    assert_equal_in_fp64(genes, values, weights)


def test_equal_breakpoints_zero_slopes_and_values_on_a_breakpoint():
    genes, values, weights = inputs_of()
    weight, bias = weights[1][:, 0], weights[2]
    weight[:4], bias[:4] = torch.tensor([1.0, -1.0, 2.0, -2.0]), torch.tensor([1.0, -1.0, 2.0, -2.0])  # all at −1: masked
    weight[4:8], bias[4:8] = 0, torch.tensor([0.5, -0.5, 0.0, -0.0])  # always, never, never, never
    weight[8:10], bias[8:10] = torch.tensor([1.0, -1.0]), torch.tensor([-512.0, 512.0])  # at the largest value
    weight[10:12], bias[10:12] = torch.tensor([1e-300, -1e-300]), 1e10  # breakpoints beyond the largest number
    weight[12:14], bias[12:14] = torch.tensor([0.0, -0.0]), torch.tensor([1.0, 1.0])
    assert_equal_in_fp64(genes, values, weights)


def test_values_that_are_no_numbers_stay_in_their_tokens():
    genes, values, weights = inputs_of(dtype=torch.float32)
    values[5], values[7], values[8] = torch.nan, torch.inf, -torch.inf
    ours, *grads = results(gene_value_embedding, genes, values, weights, torch.ones(60, 24))
    assert ours[5].isnan().all()
    assert ours[[*range(5), 6, *range(9, 60)]].isfinite().all()
    assert grads[0].isfinite().all()  # the table's
    assert grads[3].isnan().any()


def test_all_slopes_of_one_sign_and_none():
    genes, values, weights = inputs_of()
    for weight in (weights[1].abs(), -weights[1].abs(), torch.zeros_like(weights[1])):
        assert_equal_in_fp64(genes, values, [weights[0], weight, *weights[2:]])


def test_every_bucket_occupied_in_many_chunks(monkeypatch):
    monkeypatch.setattr(gene_value_embedding_triton, "CHUNK", 16)
    genes, _, weights = inputs_of(100, 5, 6)
    assert_equal_in_fp64(genes, torch.linspace(-3, 3, 100, dtype=F64), weights)
    assert_equal_in_fp64(genes, torch.full((100,), 0.7, dtype=F64), weights)


def test_columns_are_taken_in_several_launches(monkeypatch):
    monkeypatch.setattr(gene_value_embedding_triton, "cache_bytes", lambda x: 0)
    assert_equal_in_fp64(*inputs_of(40, 7, 70))


def test_no_tokens_and_no_gradient():
    genes, values, weights = inputs_of(60, dtype=torch.float32)
    out, *grads = results(gene_value_embedding, genes[:0], values[:0], weights, torch.zeros(0, 24))
    assert out.shape == (0, 24)
    assert not any(g.any() for g in grads)
    with torch.no_grad():
        assert gene_value_embedding(genes, values, order(genes), *weights).isfinite().all()


def test_inputs_need_not_be_contiguous():
    genes, values, weights = inputs_of(24, 24, 24, dtype=torch.float32)
    views = [w.T if w.shape == (24, 24) else torch.stack([w, w], -1)[..., 0] for w in weights]
    spread = [torch.stack([x, x], 1)[:, 0] for x in (genes, values)]
    upstream = torch.ones(()).expand(24, 24)
    ours = results(gene_value_embedding, *spread, views, upstream)
    theirs = results(gene_value_embedding, genes, values, [v.contiguous() for v in views], upstream.contiguous())
    assert all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))


def test_two_runs_are_bit_identical():
    inputs = inputs_of(300, 7, 24, dtype=torch.float32)
    runs = [results(gene_value_embedding, *inputs, draw(300, 24)) for _ in range(2)]
    assert all(torch.equal(a, b) for a, b in zip(*runs, strict=True))


def test_genes_are_checked_in_debug_mode(monkeypatch):
    monkeypatch.setattr(backend, "DEBUG", True)
    genes, values, weights = inputs_of()
    gene_value_embedding(genes, values, order(genes), *weights)
    with pytest.raises(ValueError, match="genes holds"):
        gene_value_embedding(genes - 1, values, order(genes), *weights)
