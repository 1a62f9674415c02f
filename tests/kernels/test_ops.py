"""Each operation against its oracle: values, gradients (fp64 gradcheck), odd shapes, the edges, low precision."""

import pytest
import torch

from scbench.kernels import random
from scbench.kernels.add_norm import add_norm, dropout, dropout_oracle, relu_dropout
from scbench.kernels.attention import _CellAttention, attention, attention_oracle
from scbench.kernels.gene_value_embedding import gene_value_embedding, gene_value_embedding_oracle
from scbench.kernels.masked_regression import masked_regression, masked_regression_oracle
from scbench.kernels.mvc import mvc, mvc_oracle

F64 = torch.float64


def draw(*shape, dtype=F64, seed=0):
    return torch.randn(*shape, dtype=F64, generator=torch.Generator().manual_seed(seed * 1000 + sum(shape))).to(dtype)


def integers(high, *shape, seed=0):
    return torch.randint(high, shape, generator=torch.Generator().manual_seed(seed)).int()


def embedding_inputs(tokens=17, rows=11, width=7, dtype=F64):
    genes = integers(rows, tokens)
    if tokens > 2:
        genes[0], genes[1], genes[2] = 0, rows - 1, rows - 1  # both ends of the table, and a gene twice
    values = draw(tokens, seed=1).abs()
    values[::4], values[1::5] = -1.0, 0.0
    values[-1] = 512.0
    shapes = [(rows, width), (width, 1), (width,), (width, width), (width,)]
    weights = [draw(*shape, seed=seed) for seed, shape in enumerate(shapes, 2)]
    return genes, values.to(torch.promote_types(dtype, torch.float32)), [w.to(dtype) for w in weights]


def order(genes):
    return torch.argsort(genes, stable=True).int()


@pytest.mark.parametrize("tokens", [1, 2, 17, 64])
def test_embedding_equals_its_oracle(tokens):
    genes, values, weights = embedding_inputs(tokens)
    weights = [w.float() for w in weights]
    ours = gene_value_embedding(genes, values.float(), order(genes), *weights)
    oracle = gene_value_embedding_oracle(genes, values.double(), *(w.double() for w in weights))
    torch.testing.assert_close(ours, oracle.float(), rtol=1e-5, atol=1e-3 if tokens else 0)


def test_embedding_gradients_equal_the_oracles():
    genes, values, weights = embedding_inputs()
    upstream = draw(17, 7, seed=9)
    grads = []
    for function in ("ours", "oracle"):
        leaves = [w.float().requires_grad_() for w in weights]
        if function == "ours":
            out = gene_value_embedding(genes, values.float(), order(genes), *leaves)
        else:
            out = gene_value_embedding_oracle(genes, values.float(), *leaves)
        (out * upstream.float()).sum().backward()
        grads.append([leaf.grad for leaf in leaves])
    for mine, theirs in zip(*grads, strict=True):
        assert (mine - theirs).abs().max() <= 1e-5 * theirs.abs().max()


def test_embedding_keeps_values_in_fp32_when_weights_are_bf16():
    genes, values, weights = embedding_inputs(dtype=torch.bfloat16)
    values = values.clamp(max=9)
    ours = gene_value_embedding(genes, values, order(genes), *weights)
    assert ours.dtype == torch.bfloat16
    exact = gene_value_embedding_oracle(genes, values.double(), *(w.double() for w in weights))
    plain = gene_value_embedding_oracle(genes, values.bfloat16(), *weights)
    assert (ours - exact).abs().max() <= 2 * (plain - exact).abs().max() + 1e-6
    assert (ours - exact).abs().max() <= 2**-8 * exact.abs().max()  # one rounding at the end


@pytest.mark.parametrize("rows", [0, 1, 9])
def test_masked_regression_equals_its_oracle(rows):
    inputs = [draw(rows, 5), draw(1, 5, seed=1), draw(1, seed=2)]
    targets = draw(rows, seed=3)
    for mine, theirs in zip(masked_regression(*inputs, targets), masked_regression_oracle(*inputs, targets), strict=True):
        torch.testing.assert_close(mine, theirs)
    leaves = [x.clone().requires_grad_() for x in inputs]
    assert torch.autograd.gradcheck(lambda *x: masked_regression(*x, targets), leaves)


def mvc_inputs(tokens=13, genes=5, cells=3, width=4):
    indices = integers(genes, tokens), integers(cells, tokens, seed=2).sort().values
    return draw(genes, width), indices[0], draw(cells, width, seed=1), indices[1], draw(tokens, seed=3)


def test_mvc_equals_its_oracle():
    queries, query_index, cells, cell_index, targets = mvc_inputs()
    ours = mvc(queries, query_index, order(query_index), cells, cell_index, targets)
    oracle = mvc_oracle(queries, query_index, cells, cell_index, targets)
    for mine, theirs in zip(ours, oracle, strict=True):
        torch.testing.assert_close(mine, theirs)
    leaves = queries.requires_grad_(), cells.requires_grad_()
    assert torch.autograd.gradcheck(lambda q, c: mvc(q, query_index, order(query_index), c, cell_index, targets), leaves)


def test_nothing_masked_is_a_zero_loss_with_a_graph():
    queries, cells = torch.zeros(0, 4, requires_grad=True), torch.ones(2, 4, requires_grad=True)
    empty = torch.zeros(0, dtype=torch.int32)
    loss, predictions = mvc(queries, empty, empty, cells, empty, torch.zeros(0))
    loss.backward()
    assert loss == 0
    assert predictions.shape == (0,)
    assert torch.equal(cells.grad, torch.zeros(2, 4))


@pytest.mark.parametrize("lengths", [[1], [5], [1, 1, 1], [4, 1, 9, 2], [33, 7]])
def test_attention_equals_its_oracle(lengths):
    tokens = sum(lengths)
    q, k, v = (draw(tokens, 2, 3, seed=i) for i in range(3))
    offsets = torch.tensor([0, *torch.tensor(lengths).cumsum(0).tolist()], dtype=torch.int32)
    torch.testing.assert_close(attention(q, k, v, offsets), attention_oracle(q, k, v, offsets))
    if tokens < 20:
        leaves = [x.clone().requires_grad_() for x in (q, k, v)]
        assert torch.autograd.gradcheck(lambda *x: attention(*x, offsets), leaves)


def test_the_bf16_path_is_exact_in_fp64():
    leaves = [draw(12, 2, 3, seed=i).requires_grad_() for i in range(3)]
    offsets = torch.tensor([0, 1, 8, 12], dtype=torch.int32)
    torch.testing.assert_close(_CellAttention.apply(*leaves, offsets), attention_oracle(*leaves, offsets))
    assert torch.autograd.gradcheck(lambda *x: _CellAttention.apply(*x, offsets), leaves)


def test_attention_takes_views_of_one_projection():
    fused = draw(6, 3, 2, 4)
    offsets = torch.tensor([0, 2, 6], dtype=torch.int32)
    q, k, v = fused.unbind(1)
    torch.testing.assert_close(attention(q, k, v, offsets), attention_oracle(q, k, v, offsets))


def test_attention_in_bf16_errs_no_more_than_plain_torch():
    offsets = torch.tensor([0, 25, 40], dtype=torch.int32)
    results = []
    for function, dtype in ((attention, torch.bfloat16), (attention_oracle, torch.bfloat16), (attention_oracle, F64)):
        leaves = [draw(40, 2, 8, seed=i, dtype=torch.bfloat16).to(dtype).requires_grad_() for i in range(3)]
        output = function(*leaves, offsets)
        (output * draw(40, 2, 8, seed=7).to(dtype)).sum().backward()
        results.append([output, *(leaf.grad for leaf in leaves)])
    for ours, plain, exact in zip(*results, strict=True):
        assert (ours - exact).abs().max() <= 2 * (plain - exact).abs().max()


@pytest.mark.parametrize("width", [1, 4, 7, 32])
@pytest.mark.parametrize("probability", [0.15, 0.5, 0.001])
def test_dropout_equals_its_oracle_lane_by_lane(width, probability):
    x = draw(9, width)
    keys = random.bits_torch(5, torch.arange(9))
    torch.testing.assert_close(dropout(x, keys, probability), dropout_oracle(x, keys, probability))
    assert torch.autograd.gradcheck(lambda x: dropout(x, keys, probability), [x.requires_grad_()])


def test_dropout_keeps_the_mean_and_none_means_none():
    keys = random.bits_torch(random.key(0, 8), torch.arange(4000))
    kept = dropout(torch.ones(4000, 64), keys, 0.15)
    assert abs(float(kept.mean()) - 1) < 5 * (0.15 / 0.85 / kept.numel()) ** 0.5
    x = draw(3, 4)
    assert dropout(x, None, 0.5) is x


def test_add_norm_and_relu_dropout_equal_their_definitions():
    x, residual, weight, bias = draw(5, 8), draw(5, 8, seed=1), draw(8, seed=2), draw(8, seed=3)
    keys = random.bits_torch(1, torch.arange(5))
    summed = residual + dropout_oracle(x, keys, 0.25)
    centred = summed - summed.mean(1, keepdim=True)
    expected = centred / (centred.square().mean(1, keepdim=True) + 1e-5).sqrt() * weight + bias
    torch.testing.assert_close(add_norm(x, residual, weight, bias, keys, 0.25), expected)
    torch.testing.assert_close(relu_dropout(x, keys, 0.25), dropout_oracle(x.clamp(min=0), keys, 0.25))


@pytest.mark.parametrize(("call", "named"), [
    (lambda: attention(draw(3, 2, 4), draw(3, 2, 4), draw(2, 2, 4), torch.tensor([0, 3])), "query, key and value"),
    (lambda: attention(*[draw(3, 2, 4)] * 3, torch.tensor([0, 2])), "cell_offsets"),
    (lambda: masked_regression(draw(3, 4), draw(1, 5), draw(1), draw(3)), "weight"),
    (lambda: mvc(draw(2, 4), *[integers(2, 3)] * 2, draw(2, 5), integers(2, 3), draw(3)), "cell_embedding"),
    (lambda: mvc(draw(2, 4), *[integers(2, 3)] * 2, draw(2, 4), integers(2, 2), draw(3)), "cell_index"),
    (lambda: dropout(draw(3, 4), torch.arange(2), 0.5), "token_keys"),
    (lambda: gene_value_embedding(integers(3, 4), draw(5), integers(3, 4), draw(3, 2),
                                  draw(2, 1), draw(2), draw(2, 2), draw(2)), "genes, values"),
])
def test_wrong_shapes_are_named(call, named):
    with pytest.raises(ValueError, match=named):
        call()
