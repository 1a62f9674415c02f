"""Tests of the Triton kernels under the interpreter.

They run in a process of their own, with TRITON_INTERPRET=1 and SCBENCH_KERNELS=triton, because Triton reads the first when a
kernel is decorated: tests/kernels/test_triton.py starts it. Elsewhere nothing here is collected.
"""

import os
import sys
from pathlib import Path

import pytest
import torch

if os.environ.get("TRITON_INTERPRET") != "1" or os.environ.get("SCBENCH_KERNELS") != "triton":
    collect_ignore_glob = ["test_*.py"]
else:
    sys.path.insert(0, str(Path(__file__).parent))


@pytest.fixture(autouse=True)
def poisoned_memory(monkeypatch):
    """Memory that nobody has written holds NaN (integers: a value far out of range), so that reading it shows."""

    def poison(allocate):
        def poisoned(*arguments, **options):
            tensor = allocate(*arguments, **options)
            if tensor.is_floating_point():
                return tensor.fill_(torch.nan)
            return tensor.fill_(True if tensor.dtype == torch.bool else torch.iinfo(tensor.dtype).max // 2)

        return poisoned

    for owner, name in ((torch, "empty"), (torch, "empty_like"), (torch, "empty_strided"), (torch.Tensor, "new_empty")):
        monkeypatch.setattr(owner, name, poison(getattr(owner, name)))


@pytest.fixture
def assert_as_good():
    """assert_as_good(ours, plain, exact): no error of ours exceeds twice that of plain PyTorch in the same precision.

    Each is a sequence of tensors: `exact` in float64, `plain` by PyTorch in our dtype. One unit in the last place of the
    largest element is allowed besides: plain may be exact by luck.
    """

    def check(ours, plain, exact):
        assert len(ours) == len(plain) == len(exact)
        for number, (mine, theirs, truth) in enumerate(zip(ours, plain, exact, strict=True)):
            assert mine.shape == truth.shape, f"output {number}: shape {mine.shape}, not {truth.shape}"
            if mine.numel() == 0:
                continue
            largest = truth.abs().max()
            error, allowed = (mine.double() - truth).abs().max(), (theirs.double() - truth).abs().max()
            limit = 2 * allowed + torch.finfo(mine.dtype).eps * largest
            assert error <= limit, f"output {number}: error {error:.2e}, plain {allowed:.2e}, largest {largest:.2e}"

    return check


@pytest.fixture(autouse=True)
def checked_memory():
    """Every launch of every test here is checked: out of bounds, races, atomics. Gives the kernels launched."""
    from memory_check import checked

    with checked() as launched:
        yield launched
