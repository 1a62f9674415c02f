"""Rows of a table plus rows of states: the C code against PyTorch."""

import pytest
import torch

from scbench.kernels import added_rows as module
from scbench.kernels.added_rows import added_rows

needs_native = pytest.mark.skipif(module.library() is None, reason="no C compiler")


def inputs(tokens: int, width: int, dtype: torch.dtype) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(tokens)
    genes = torch.randint(0, 11, (tokens,), generator=generator).int()
    return {
        "table": torch.randn(11, width, generator=generator).to(dtype).requires_grad_(), "genes": genes,
        "gene_order": torch.argsort(genes, stable=True).int(),
        "states": torch.randn(3, width, generator=generator).requires_grad_(),
        "index": torch.randint(0, 3, (tokens,), generator=generator),
    }


@needs_native
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("tokens", "width"), [(0, 4), (1, 1), (5, 33), (600, 64)])
def test_sums_have_the_bits_of_pytorch_s(tokens, width, dtype, monkeypatch):
    given = inputs(tokens, width, dtype)
    ours = added_rows(**given)
    monkeypatch.setattr(module, "library", lambda: None)
    theirs = added_rows(**given)
    assert ours.dtype == dtype
    assert torch.equal(ours, theirs)
    assert torch.equal(ours, (given["table"].float()[given["genes"].long()] + given["states"][given["index"]]).to(dtype))


def test_gradients_are_sums_of_rows():
    given = inputs(40, 6, torch.float32)
    grad = torch.randn(40, 6, generator=torch.Generator().manual_seed(1))
    added_rows(**given).backward(grad)
    for name, keys in (("table", given["genes"].long()), ("states", given["index"])):
        expected = torch.stack([grad[keys == key].sum(0) for key in range(len(given[name]))])
        torch.testing.assert_close(given[name].grad, expected)


@pytest.mark.parametrize("gene", [-1, 11])
def test_a_gene_that_the_table_lacks(gene):
    given = inputs(4, 8, torch.float32)
    given["genes"][2] = gene
    with pytest.raises(IndexError):
        added_rows(**given)
