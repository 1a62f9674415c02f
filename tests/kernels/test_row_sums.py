"""Sums of rows by key: in C to the bit what PyTorch gives, whatever the threads; zeros where a key does not occur."""

import pytest
import torch

from scbench.kernels import backend, row_sums
from scbench.kernels.row_sums import sum_rows

BF16, F32, F64 = torch.bfloat16, torch.float32, torch.float64
needs_native = pytest.mark.skipif(row_sums.library() is None, reason="no C compiler")


def inputs(n, n_keys, width, dtype):
    generator = torch.Generator().manual_seed(n + width)
    keys = (torch.rand(n, generator=generator) ** 3 * n_keys).int()  # some occur often, most never
    return torch.randn(n, width, generator=generator).to(dtype), keys, torch.argsort(keys, stable=True).int(), n_keys


@needs_native
@pytest.mark.parametrize("dtypes", [(BF16, BF16), (BF16, F32), (F32, F32), (F32, BF16)])
@pytest.mark.parametrize(("n", "n_keys", "width"), [(1, 1, 1), (0, 3, 4), (50, 9, 33), (400, 1000, 7), (3000, 513, 64)])
def test_equals_pytorch_to_the_bit(monkeypatch, n, n_keys, width, dtypes):
    arguments = inputs(n, n_keys, width, dtypes[0])
    ours = sum_rows(*arguments, dtypes[1])
    monkeypatch.setattr(backend, "FORCED", "torch")
    assert ours.dtype == dtypes[1]
    assert torch.equal(ours, sum_rows(*arguments, dtypes[1]))


def test_equals_a_loop():
    rows, keys, order, n_keys = inputs(40, 12, 5, F64)
    expected = torch.zeros(n_keys, 5, dtype=F64)
    for row, key in zip(rows, keys.tolist(), strict=True):
        expected[key] += row
    torch.testing.assert_close(sum_rows(rows, keys, order, n_keys, F64), expected)
    torch.testing.assert_close(sum_rows(rows.float(), keys, order, n_keys, F32), expected.float())


@needs_native
def test_the_same_bits_whatever_the_threads():
    before, found = torch.get_num_threads(), []
    try:
        for threads in (1, 2):
            torch.set_num_threads(threads)
            found.append(sum_rows(*inputs(3000, 2000, 16, BF16), F32))
    finally:
        torch.set_num_threads(before)
    assert torch.equal(*found)


def test_pytorch_where_there_is_no_compiler(monkeypatch, tmp_path):
    monkeypatch.setenv("SCBENCH_CACHE", str(tmp_path))
    monkeypatch.setenv("CC", "no-such-compiler")
    monkeypatch.setattr(row_sums, "library", row_sums.library.__wrapped__)  # nothing is kept
    with pytest.warns(UserWarning, match=r"PyTorch does the work of row_sums\.c, slower: .*no-such-compiler"):
        sums = sum_rows(torch.ones(3, 1), torch.tensor([2, 0, 2]), torch.tensor([1, 0, 2]), 4, F32)
    assert sums.flatten().tolist() == [1, 0, 2, 0]
