"""Table rows and the gradient of the table."""

import pytest
import torch

from scbench.kernels.table_rows import table_rows


def order(genes):
    return torch.argsort(genes, stable=True).int()


def test_rows_and_gradient():
    genes = torch.tensor([5, 0, 5, 2, 5, 6, 0], dtype=torch.int32)
    table = torch.randn(7, 3, dtype=torch.float64, requires_grad=True)
    assert torch.equal(table_rows(table, genes, order(genes)), table[genes.long()])
    assert torch.autograd.gradcheck(lambda t: table_rows(t, genes, order(genes)), [table])


def test_many_tokens_of_one_gene_add_up_in_bf16():
    genes = torch.zeros(1000, dtype=torch.int32)
    table = torch.zeros(2, 1, dtype=torch.bfloat16, requires_grad=True)
    table_rows(table, genes, order(genes)).sum().backward()
    assert table.grad.flatten().tolist() == [1000, 0]  # summed in bf16 it would stop at 256


def test_wrong_shapes_are_named():
    with pytest.raises(ValueError, match="gene_order"):
        table_rows(torch.zeros(3, 2), torch.zeros(4).int(), torch.zeros(5).int())
