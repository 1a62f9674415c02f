"""MVC's loss and gradients against the definition."""

import pytest
import torch

from scbench.kernels import backend
from scbench.kernels.mvc import mvc, mvc_oracle

F64 = torch.float64


def draw(*shape, dtype=F64, seed=0):
    return torch.randn(*shape, dtype=F64, generator=torch.Generator().manual_seed(seed + sum(shape))).to(dtype)


def integers(high, n, seed=0):
    return torch.randint(high, (n,), generator=torch.Generator().manual_seed(seed))


def order(index):
    return torch.argsort(index, stable=True).int()


def inputs_of(tokens=40, queries=9, cells=5, width=6, dtype=F64):
    """Query 1 and cell 1 have no token if there are others; query 0 has many."""
    query_index, cell_index = integers(queries, tokens), integers(cells, tokens, seed=1).sort().values
    query_index[query_index == 1] = 0
    cell_index[cell_index == 1] = 0
    query_index[-1:] = queries - 1
    targets = draw(tokens, seed=3, dtype=F64 if dtype == F64 else torch.float32)
    return [draw(queries, width, dtype=dtype), draw(cells, width, seed=1, dtype=dtype)], query_index.int(), cell_index, targets


def results(function, leaves, query_index, cell_index, targets):
    queries, cells = (x.detach().clone().requires_grad_() for x in leaves)
    orders = [order(query_index)] if function is mvc else []
    loss, predictions = function(queries, query_index, *orders, cells, cell_index, targets)
    (0.37 * loss).backward()
    return [loss.detach(), predictions.detach(), queries.grad, cells.grad]


@pytest.mark.parametrize("shape", [(1, 1, 1, 24), (40, 9, 5, 6), (70, 3, 2, 130), (60, 70, 3, 256), (12, 30, 1, 1)], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_equals_its_oracle(dtype, shape, assert_as_good):
    leaves, *rest, targets = inputs_of(*shape, dtype=dtype)
    ours = results(mvc, leaves, *rest, targets)
    assert [x.dtype for x in ours] == [torch.float32] * 2 + [dtype] * 2
    plain = results(mvc_oracle, leaves, *rest, targets.to(dtype))
    assert_as_good(ours, plain, results(mvc_oracle, [x.double() for x in leaves], *rest, targets.double()))


def test_fp64():
    leaves, *rest = inputs_of()
    for mine, theirs in zip(results(mvc, leaves, *rest), results(mvc_oracle, leaves, *rest), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-12, atol=1e-12)
    leaves, query_index, cell_index, targets = inputs_of(7, 4, 3, 3)
    leaves = [x.requires_grad_() for x in leaves]
    orders = query_index, order(query_index)
    assert torch.autograd.gradcheck(lambda q, c: mvc(q, *orders, c, cell_index, targets)[0], leaves)


def test_queries_in_half_precision_and_cells_in_full():
    (queries, cells), *rest = inputs_of(dtype=torch.float32)
    queries = queries.half()
    ours, exact = results(mvc, [queries, cells], *rest), results(mvc_oracle, [queries.double(), cells.double()], *rest)
    assert [x.dtype for x in ours] == [torch.float32, torch.float32, torch.float16, torch.float32]
    for number, (mine, truth) in enumerate(zip(ours, exact, strict=True)):
        assert (mine - truth).abs().max() <= (2e-3 if number == 2 else 1e-5) * truth.abs().max()


def test_nothing_masked_is_a_zero_loss_with_a_graph():
    none = torch.zeros(0, dtype=torch.int32)
    loss, predictions, *grads = results(mvc, [draw(0, 4), draw(2, 4)], none, none, torch.zeros(0, dtype=F64))
    assert loss == 0
    assert predictions.shape == (0,)
    assert [g.shape for g in grads] == [(0, 4), (2, 4)]
    assert not grads[1].any()


def test_cells_alone_may_want_a_gradient():
    (queries, cells), query_index, cell_index, targets = inputs_of()
    expected = results(mvc, [queries, cells], query_index, cell_index, targets)[3]
    cells = cells.requires_grad_()
    (0.37 * mvc(queries, query_index, order(query_index), cells, cell_index, targets)[0]).backward()
    assert torch.equal(cells.grad, expected)


def test_predictions_have_no_gradient_and_need_none():
    (queries, cells), query_index, cell_index, targets = inputs_of(dtype=torch.float32)
    loss, predictions = mvc(queries.requires_grad_(), query_index, order(query_index), cells, cell_index, targets)
    assert not predictions.requires_grad
    with torch.no_grad():
        again = mvc(queries, query_index, order(query_index), cells, cell_index, targets)
    assert torch.equal(loss, again[0])
    assert torch.equal(predictions, again[1])


def test_inputs_need_not_be_contiguous():
    (queries, cells), query_index, cell_index, targets = inputs_of(40, 9, 9, 9, dtype=torch.float32)
    spread = torch.stack([query_index, query_index], 1)[:, 1]
    ours = results(mvc, [queries.T, cells.T], spread, cell_index, targets)
    theirs = results(mvc, [queries.T.contiguous(), cells.T.contiguous()], query_index, cell_index, targets)
    assert all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))


def test_two_runs_are_bit_identical():
    leaves, *rest = inputs_of(70, 3, 2, 24, dtype=torch.float32)
    runs = [results(mvc, leaves, *rest) for _ in range(2)]
    assert all(torch.equal(a, b) for a, b in zip(*runs, strict=True))


@pytest.mark.parametrize(("change", "named"), [
    (lambda q, o, c: (q + 9, o, c), "query_index holds"), (lambda q, o, c: (q, o // 2, c), "query_order must hold"),
    (lambda q, o, c: (q, o.flip(0), c), "query_order must sort"), (lambda q, o, c: (q, o, c - 1), "cell_index holds"),
    (lambda q, o, c: (q, o, c.flip(0)), "ascend"),
])  # fmt: skip
def test_indices_are_checked_in_debug_mode(change, named, monkeypatch):
    monkeypatch.setattr(backend, "DEBUG", True)
    (queries, cells), query_index, cell_index, targets = inputs_of()
    mvc(queries, query_index, order(query_index), cells, cell_index, targets)
    query_index, query_order, cell_index = change(query_index, order(query_index), cell_index)
    with pytest.raises(ValueError, match=named):
        mvc(queries, query_index, query_order, cells, cell_index, targets)
