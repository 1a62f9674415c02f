"""The check that every test here runs under (memory_check.py) finds planted faults, and nothing where there is none."""

import ast
from pathlib import Path

import pytest
import torch
import triton
import triton.language as tl

import scbench.kernels as module


@triton.jit
def copy_kernel(x, y, n, FROM: tl.constexpr, TO: tl.constexpr, STEP: tl.constexpr, N: tl.constexpr):
    """N elements a program, STEP apart, from place FROM of x to place TO of y; `n` bounds both."""
    i = (tl.program_id(0) * N + tl.arange(0, N)) * STEP
    tl.store(y + TO + i, tl.load(x + FROM + i, mask=i < n, other=0), mask=i < n)


@triton.jit
def same_place_kernel(x, y, N: tl.constexpr):
    """Every lane of every program writes one element."""
    tl.store(y + tl.zeros([N], tl.int32), tl.load(x + tl.arange(0, N)))


@triton.jit
def first_place_kernel(x, y):
    """Every program writes the first element, which they all read."""
    tl.store(y, tl.load(x) + 1)


@triton.jit
def add_kernel(x, y):
    tl.atomic_add(y, tl.load(x))


def copy(x, y, n=8, programs=2, FROM=0, TO=0, STEP=1):
    copy_kernel[(programs,)](x, y, n, FROM=FROM, TO=TO, STEP=STEP, N=4)


def test_what_is_right_passes(checked_memory):
    x, y = torch.arange(8.0), torch.zeros(16)
    copy(x, y[4:12])  # a view, all of it
    assert torch.equal(y, torch.cat([torch.zeros(4), x, torch.zeros(4)]))
    copy(y[::2], y[1::2], n=15, programs=2, STEP=2)  # one storage, elements that alternate
    assert torch.equal(y[1::2], y[::2])
    assert checked_memory == ["copy_kernel"] * 2


@pytest.mark.parametrize(("options", "message"), [
    ({"FROM": 1}, r"copy_kernel, program \(1, 0, 0\): a load of x touches place 8 of \[8\]"),
    ({"FROM": -1}, r"program \(0, 0, 0\): a load of x touches place -1"),
    ({"TO": 1}, "a store of y touches place 8"),
    ({"n": 9, "programs": 3}, "a load of x touches place 8"),
    ({"FROM": 2**31 - 4}, "a load of x touches place 2147483644"),
])  # fmt: skip
def test_an_access_outside_its_tensor_is_found(options, message):
    with pytest.raises(Exception, match=message):
        copy(torch.zeros(8), torch.zeros(8), **options)


def test_an_access_outside_its_view_is_found():
    """In the storage, and even between the view's own elements."""
    storage = torch.zeros(16)
    for view, place in ((storage[:7], 7), (storage[::2], 1), (storage.view(4, 4)[:, :2], 2)):
        with pytest.raises(Exception, match=rf"a load of x touches place {place} of"):
            copy(view, torch.zeros(8))


def test_two_programs_that_write_one_element_are_found():
    with pytest.raises(Exception, match=r"program \(1, 0, 0\): a store of y writes what another program .* has written"):
        first_place_kernel[(2,)](torch.zeros(1), torch.zeros(1))
    with pytest.raises(Exception, match="a store of y writes an element twice in one store"):
        same_place_kernel[(1,)](torch.zeros(4), torch.zeros(4), N=4)


def test_a_program_that_reads_what_another_one_writes_is_found():
    x = torch.zeros(12)
    with pytest.raises(Exception, match=r"program \(1, 0, 0\): a load of x reads what another program .* has written"):
        copy(x[:8], x[4:])
    with pytest.raises(Exception, match=r"program \(1, 0, 0\): a store of y writes what another program .* has read"):
        copy(x[4:], x[:8])
    first_place_kernel[(1,)](x, x)  # one program may


def test_an_atomic_is_found():
    with pytest.raises(Exception, match="add_kernel: an atomic"):
        add_kernel[(1,)](torch.zeros(1), torch.zeros(1))


def test_every_masked_load_says_what_the_rest_is():
    """A GPU gives it no value; the interpreter gives 0, so that running a kernel would not show it."""
    folder = Path(module.__file__).parent
    loads = [node for path in sorted(folder.glob("*.py")) for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
             if isinstance(node, ast.Call) and ast.unparse(node.func) == "tl.load"]
    masked = [node for node in loads if len(node.args) > 1 or any(word.arg == "mask" for word in node.keywords)]
    assert len(masked) > 50
    assert [ast.unparse(node) for node in masked if not any(word.arg == "other" for word in node.keywords)] == []
