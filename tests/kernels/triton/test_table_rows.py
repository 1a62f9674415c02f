"""Table rows and the gradient of the table by segments."""

import pytest
import torch

from scbench.kernels import backend
from scbench.kernels.table_rows import table_rows, table_rows_oracle

F64 = torch.float64


def draw(*shape, dtype=F64, seed=0):
    return torch.randn(*shape, dtype=F64, generator=torch.Generator().manual_seed(seed + sum(shape))).to(dtype)


def genes_of(tokens, rows):
    """Both ends of the table, and one gene that a third of the tokens have."""
    genes = torch.randint(rows, (tokens,), generator=torch.Generator().manual_seed(tokens)).int()
    genes[::3] = rows // 2
    genes[-1:], genes[:1] = 0, rows - 1
    return genes


def order(genes):
    return torch.argsort(genes, stable=True).int()


def results(function, table, upstream):
    leaf = table.detach().clone().requires_grad_()
    out = function(leaf)
    out.backward(upstream.to(out.dtype))
    return [out.detach(), leaf.grad]


@pytest.mark.parametrize("shape", [(1, 1, 6), (100, 9, 24), (20, 40, 130), (140, 5, 256)], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, F64], ids=str)
def test_equals_its_oracle(dtype, shape, assert_as_good):
    tokens, rows, width = shape
    table, genes, upstream = draw(rows, width, dtype=dtype), genes_of(tokens, rows), draw(tokens, width).to(dtype)
    ours = results(lambda t: table_rows(t, genes, order(genes)), table, upstream)
    assert torch.equal(ours[0], table[genes.long()])
    exact = results(lambda t: table_rows_oracle(t, genes), table.double(), upstream)
    if dtype != F64:
        assert_as_good(ours, results(lambda t: table_rows_oracle(t, genes), table, upstream), exact)
    torch.testing.assert_close(ours[1], exact[1].to(dtype))


def test_gradcheck():
    genes = torch.tensor([5, 0, 5, 2, 5, 6, 0], dtype=torch.int32)
    assert torch.autograd.gradcheck(lambda t: table_rows(t, genes, order(genes)), [draw(7, 3).requires_grad_()])


def test_many_tokens_of_one_gene_add_up_in_half_precision():
    genes = torch.zeros(3000, dtype=torch.int32)
    sums = results(lambda t: table_rows(t, genes, order(genes)), torch.zeros(2, 1).half(), torch.ones(3000, 1))[1]
    assert sums.flatten().tolist() == [3000, 0]  # summed in fp16 it would stop at 2048


def test_inputs_need_not_be_contiguous():
    table, genes = draw(6, 8, dtype=torch.float32), genes_of(20, 8)
    spread = torch.stack([genes, genes], 1)[:, 0]
    spread_order = torch.stack([order(genes)] * 2, 1)[:, 0]
    upstream = torch.ones(()).expand(20, 6)
    ours = results(lambda t: table_rows(t, spread, spread_order), table.T, upstream)
    theirs = results(lambda t: table_rows(t, genes, order(genes)), table.T.contiguous(), upstream.contiguous())
    assert all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))


def test_no_tokens():
    none = torch.zeros(0, dtype=torch.int32)
    out, grad = results(lambda t: table_rows(t, none, none), draw(3, 4), draw(0, 4))
    assert out.shape == (0, 4)
    assert torch.equal(grad, torch.zeros(3, 4, dtype=F64))


def test_two_runs_are_bit_identical():
    table, genes, upstream = draw(9, 24, dtype=torch.float32), genes_of(100, 9), draw(100, 24)
    runs = [results(lambda t: table_rows(t, genes, order(genes)), table, upstream) for _ in range(2)]
    assert all(torch.equal(a, b) for a, b in zip(*runs, strict=True))


@pytest.mark.parametrize(("change", "named"), [
    (lambda g, o: (g + 9, o), "genes holds"), (lambda g, o: (g, o // 2), "once"),
    (lambda g, o: (g, o.flip(0)), "sort genes"),
])  # fmt: skip
def test_indices_are_checked_in_debug_mode(change, named, monkeypatch):
    monkeypatch.setattr(backend, "DEBUG", True)
    table, genes = draw(9, 2), genes_of(20, 9)
    table_rows(table, genes, order(genes))
    genes, wrong = change(genes, order(genes))
    with pytest.raises(ValueError, match=named):
        table_rows(table, genes, wrong)
