"""Rows that lie past 2³¹ elements: the interpreter's 32-bit integers wrap as a GPU's do.

Tensors of such a size commit no memory until it is touched. Only the last programs of each launch run, and only the last rows
hold numbers; these must equal the definition on the same rows alone. Every access is checked besides (memory_check.py): an
offset that has wrapped lies outside its tensor. What adds up over all rows (the parameters' gradients) is not compared here.
"""

import inspect
from itertools import product

import pytest
import torch
import triton
import triton.language as tl
from triton.runtime import interpreter
from triton.runtime.interpreter import GridExecutor

from scbench.kernels import random
from scbench.kernels.add_norm import add_norm, dropout, dropout_oracle, relu_dropout
from scbench.kernels.attention import attention, attention_oracle
from scbench.kernels.causal_conv import causal_conv, causal_conv_oracle
from scbench.kernels.gene_value_embedding import gene_value_embedding
from scbench.kernels.masked_regression import masked_regression, masked_regression_oracle
from scbench.kernels.mvc import mvc, mvc_oracle
from scbench.kernels.selective_scan import selective_scan, selective_scan_oracle
from scbench.kernels.table_rows import table_rows

WIDTH = 2048
ROWS = 2**31 // WIDTH + 37  # ROWS · WIDTH elements, 4 GB of float16
LAST = 3  # rows with numbers in them
PROGRAMS = 3  # that run: the last ones, along each axis of the grid
SMALL = 2**28  # bytes; larger tensors stay as they come
HALF, F64 = torch.float16, torch.float64


def run_last_programs(executor, *args, **kwargs):
    """GridExecutor.__call__ for the last programs of the grid; tensors are on the CPU already."""
    kwargs = {name: x for name, x in kwargs.items() if name in inspect.getfullargspec(executor.fn).args}
    given = inspect.getcallargs(executor.fn, *args, **kwargs)
    grid, count, others = (*executor.grid, 1, 1)[:3], PROGRAMS, []
    if "n_chunks" in given:  # the embedding's backward: programs for chunks of tokens come before those for the table's rows
        count, others = 1, [(given["n_chunks"] - 1, 0, 0)]
    blocks = given["tokens"] // given["BLOCK"] + given["cells"] if "first_block" in given else 0
    if blocks and given["first_block"] + grid[0] < blocks:
        return  # attention: the blocks of a large batch have several launches, of which the last one is enough
    scope, builder = interpreter._patch_lang(executor.fn), interpreter.interpreter_builder
    try:
        given = {n: x if n in executor.constexprs else interpreter._implicit_cvt(x) for n, x in given.items()}
        builder.set_grid_dim(*grid)
        for place in {*others, *product(*(range(max(0, n - count), n) for n in grid))}:
            builder.set_grid_idx(*place)
            executor.fn(**given)
    finally:
        scope.restore()


@pytest.fixture(autouse=True)
def checked_memory(monkeypatch):
    """As elsewhere in this folder, for the last programs alone."""
    from memory_check import checked

    monkeypatch.setattr(GridExecutor, "__call__", run_last_programs)
    with checked() as launched:
        yield launched


@pytest.fixture(autouse=True)
def poisoned_memory(monkeypatch):
    """Instead of that: what programs that do not run leave unwritten is 0, unless it is large."""

    def zeroed(allocate):
        def allocated(*arguments, **options):
            tensor = allocate(*arguments, **options)
            return tensor.zero_() if tensor.untyped_storage().nbytes() < SMALL else tensor

        return allocated

    for owner, name in ((torch, "empty"), (torch, "empty_like"), (torch.Tensor, "new_empty")):
        monkeypatch.setattr(owner, name, zeroed(getattr(owner, name)))


@triton.jit
def narrow_kernel(x, D: tl.constexpr):
    """A row a program, its offset in 32 bits."""
    tl.store(x + tl.program_id(0) * D + tl.arange(0, D), 1.0)


def test_an_offset_of_32_bits_is_found():
    with pytest.raises(Exception, match=r"narrow_kernel, program .*: a store of x touches place -"):
        narrow_kernel[(ROWS,)](torch.empty(ROWS, WIDTH, dtype=HALF), D=WIDTH)


def draw(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(HALF)


def large(*shape, seed=0, rows=LAST):
    """[…] with numbers in the last rows only."""
    x = torch.empty(shape, dtype=HALF)
    x[-rows:] = draw(rows, *shape[1:], seed=seed)
    return x


def last(x, rows=LAST):
    return x[-rows:].detach().double()


def keys_of(rows=ROWS):
    keys = torch.zeros(rows, dtype=torch.int64)
    keys[-LAST:] = random.bits_torch(7, torch.arange(LAST))
    return keys


def assert_close(ours, exact):
    torch.testing.assert_close(ours.double(), exact, rtol=4e-3, atol=4e-3)


def check(function, oracle, leaves, upstream, rows=LAST):
    """The last rows of the output, and of the large leaves' gradients."""
    leaves = [x.requires_grad_() for x in leaves]
    tokenwise = [x.shape[0] >= ROWS for x in leaves]
    small = [last(x, rows) if huge else x.detach().double() for x, huge in zip(leaves, tokenwise, strict=True)]
    small = [x.requires_grad_() for x in small]
    output, expected = function(*leaves), oracle(*small)
    assert output.numel() > 2**31
    assert_close(last(output, rows), expected.detach())
    grads, exact = torch.autograd.grad(output, leaves, upstream), torch.autograd.grad(expected, small, last(upstream, rows))
    for huge, mine, truth in zip(tokenwise, grads, exact, strict=True):
        if huge:
            assert_close(last(mine, rows), truth)


def test_dropout_and_what_is_fused_with_it():
    keys = keys_of()
    x, residual, upstream = (large(ROWS, WIDTH, seed=n) for n in range(3))
    weight, bias = draw(WIDTH, seed=3), draw(WIDTH, seed=4)

    def norm(x, residual, weight, bias):
        z = residual + dropout_oracle(x, keys[-LAST:], 0.3)
        return torch.nn.functional.layer_norm(z, (WIDTH,), weight, bias)

    check(lambda x: dropout(x, keys, 0.3), lambda x: dropout_oracle(x, keys[-LAST:], 0.3), [x], upstream)
    check(lambda x: relu_dropout(x, keys, 0.3), lambda x: dropout_oracle(x.relu(), keys[-LAST:], 0.3), [x], upstream)
    check(lambda *leaves: add_norm(*leaves, keys, 0.3), norm, [x, residual, weight, bias], upstream)


def genes_of(tokens, rows):
    """Every token has gene 0 but the last ones, which have the last gene; in order."""
    genes = torch.zeros(tokens, dtype=torch.int32)
    genes[-LAST:] = rows - 1
    return genes, torch.arange(tokens, dtype=torch.int32)


@pytest.mark.parametrize(("tokens", "rows"), [(LAST + 1, ROWS), (ROWS, 2 * WIDTH)], ids=["table", "tokens"])
def test_tables(tokens, rows):
    """With W₂ = b₂ = 0 the embedding is the table's row, whatever the pieces are that programs left out have not made."""
    genes, order = genes_of(tokens, rows)
    table = large(rows, WIDTH).requires_grad_()
    mlp = [draw(WIDTH, 1, seed=1), draw(WIDTH, seed=2), torch.zeros(WIDTH, WIDTH, dtype=HALF), torch.zeros(WIDTH, dtype=HALF)]
    values = torch.zeros(tokens)
    values[-LAST:] = torch.arange(-1.0, LAST - 1)
    upstream = large(tokens, WIDTH, seed=4)
    for states in (table_rows(table, genes, order), gene_value_embedding(genes, values, order, table, *mlp)):
        assert torch.equal(last(states), last(table, 1).expand(LAST, WIDTH))
        (grad,) = torch.autograd.grad(states, table, upstream)
        assert_close(last(grad, 1), last(upstream).sum(0, keepdim=True))


def test_masked_regression():
    hidden, weight, bias = large(ROWS, WIDTH).requires_grad_(), draw(1, WIDTH, seed=1), draw(1, seed=2)
    targets = torch.zeros(ROWS)
    loss, predictions = masked_regression(hidden, weight, bias, targets)
    small = last(hidden).requires_grad_()
    exact, expected = masked_regression_oracle(small, weight.double(), bias.double(), targets[-LAST:].double())
    torch.testing.assert_close(last(predictions), expected.detach(), rtol=1e-5, atol=1e-5)
    (grad,) = torch.autograd.grad(loss, hidden)
    assert_close(last(grad), *torch.autograd.grad(exact, small))


def test_mvc():
    queries, cells = large(ROWS, WIDTH).requires_grad_(), draw(2, WIDTH, seed=1).requires_grad_()
    index = torch.tensor([2, 0, 2, 2, 0, 1, 0])  # of the last queries
    query_index, order = (index + ROWS - LAST).int(), torch.argsort(index, stable=True).int()
    cell_index, targets = torch.tensor([0, 0, 0, 1, 1, 1, 1], dtype=torch.int32), draw(7, seed=2).float()
    loss, predictions = mvc(queries, query_index, order, cells, cell_index, targets)
    small = [last(queries).requires_grad_(), cells.detach().double().requires_grad_()]
    exact, expected = mvc_oracle(small[0], index, small[1], cell_index, targets.double())
    torch.testing.assert_close(predictions.double(), expected.detach(), rtol=1e-5, atol=1e-4)
    ours, truth = (torch.autograd.grad(x, leaves) for x, leaves in ((loss, [queries, cells]), (exact, small)))
    for mine, theirs in zip((last(ours[0]), ours[1].double()), truth, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=2e-3, atol=2e-3 * float(theirs.abs().max()))


def offsets_of(tokens, rows=LAST):
    """Most rows, two cells without any, the last rows; and these alone."""
    cells = [0, *[tokens - rows] * PROGRAMS, tokens], [0, rows]
    return [torch.tensor(offsets, dtype=torch.int32) for offsets in cells]


def test_attention():
    tokens = 8 * ROWS  # with 2 heads, so that the last programs are all of them
    query, key, value, upstream = (large(tokens, 2, WIDTH // 16, seed=n) for n in range(4))
    keys, (offsets, short) = keys_of(tokens), offsets_of(tokens)
    check(lambda *leaves: attention(*leaves, offsets, token_keys=keys, probability=0.3),
          lambda *leaves: attention_oracle(*leaves, short, token_keys=keys[-LAST:], probability=0.3),
          [query, key, value], upstream)


def test_causal_conv():
    tokens, channels = 4 * ROWS, WIDTH // 4
    x, upstream = large(tokens, channels), large(tokens, channels, seed=1)
    offsets, short = offsets_of(tokens)
    check(lambda *leaves: causal_conv(*leaves, offsets), lambda *leaves: causal_conv_oracle(*leaves, short),
          [x, draw(channels, 4, seed=2), draw(channels, seed=3)], upstream)


def test_selective_scan():
    """The last cell is longer than a chunk, so that a state is kept for it; two blocks of channels are all there are."""
    tokens, channels, rows = 8 * ROWS, WIDTH // 8, 20
    x, step, upstream = (large(tokens, channels, seed=n, rows=rows) for n in range(3))
    step[-rows:].sigmoid_()
    b, c = (large(tokens, 4, seed=n, rows=rows) for n in (3, 4))
    offsets, short = offsets_of(tokens, rows)
    check(lambda *leaves: selective_scan(*leaves, offsets), lambda *leaves: selective_scan_oracle(*leaves, short),
          [x, step, -draw(channels, 4, seed=5).abs(), b, c, draw(channels, seed=6)], upstream, rows)
