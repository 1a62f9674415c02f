"""The Triton kernels on a GPU: precision, races, the ways of attention; and how long they take, for the record.

Without a GPU the same tests run under the interpreter, small and without bf16, in the process of tests/kernels/test_triton.py:
so that they work when a GPU meets them.
"""

import os
import time

import pytest
import torch
from torch.nn import functional as F

from scbench.kernels import attention as attention_module
from scbench.kernels import backend, random
from scbench.kernels.add_norm import add_norm, dropout, relu_dropout
from scbench.kernels.attention import _CellAttention, attention, attention_oracle
from scbench.kernels.causal_conv import causal_conv, causal_conv_oracle
from scbench.kernels.gene_value_embedding import gene_value_embedding, gene_value_embedding_oracle
from scbench.kernels.masked_regression import masked_regression, masked_regression_oracle
from scbench.kernels.mvc import mvc, mvc_oracle
from scbench.kernels.selective_scan import selective_scan, selective_scan_oracle
from scbench.kernels.table_rows import table_rows

GPU = torch.cuda.is_available()
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1" and backend.HAS_TRITON
DEVICE = torch.device("cuda" if GPU else "cpu")
pytestmark = pytest.mark.skipif(not GPU and not INTERPRETED, reason="no GPU")

FP32, FP16, BF16 = torch.float32, torch.float16, torch.bfloat16
DTYPES = [FP32, FP16, BF16] if GPU else [FP32, FP16]  # the interpreter knows no bf16
LENGTHS, WIDTH, REPEATS = ([513, 1, 300, 700], 256, 20) if GPU else ([33, 1, 6], 24, 1)  # scans cross chunks of 16 tokens
TOKENS, GENES, PROBABILITY = sum(LENGTHS), 50, 0.3
OFFSETS = torch.tensor([0, *torch.tensor(LENGTHS).cumsum(0).tolist()], dtype=torch.int32)
KEYS = random.bits_torch(7, torch.arange(TOKENS))


@pytest.fixture(autouse=True)
def forced(monkeypatch):
    """Our kernels, proven or not."""
    monkeypatch.setattr(backend, "FORCED", "triton")


def draw(*shape, seed=0, scale=1.0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed + sum(shape))) * scale


def dropped(x, keys):
    """By the definition, with the generator's torch form."""
    return x * random.keep_torch(keys, x.shape[1], PROBABILITY) * (65536 / (65536 - round(PROBABILITY * 65536)))


def genes_and_values():
    genes = torch.arange(TOKENS, dtype=torch.int32) ** 2 % GENES
    return genes, torch.log1p(torch.arange(TOKENS) % 17.0).half().float(), torch.argsort(genes, stable=True).int()


def masked_tokens():
    """The queries, their order, the cells and the targets of some tokens, cell by cell."""
    cells = torch.repeat_interleave(torch.arange(len(LENGTHS)), torch.tensor(LENGTHS))
    queries = (torch.arange(TOKENS) ** 2 % GENES).int()
    return queries, torch.argsort(queries, stable=True).int(), cells.int(), draw(TOKENS, seed=5).half().float()


GENE, VALUE, ORDER = genes_and_values()
QUERY, QUERY_ORDER, CELL, TARGET = masked_tokens()
STATES = draw(TOKENS, WIDTH)
HEADS = [draw(TOKENS, 2, WIDTH // 2, seed=n) for n in range(3)]
SCAN = [STATES, draw(TOKENS, WIDTH, seed=1).exp() / 4, -draw(WIDTH, 4, seed=2).exp(), draw(TOKENS, 4, seed=3),
        draw(TOKENS, 4, seed=4), draw(WIDTH, seed=5)]
MLP = [draw(GENES, WIDTH), draw(WIDTH, 1), draw(WIDTH), draw(WIDTH, WIDTH, scale=WIDTH**-0.5), draw(WIDTH, seed=9)]
QUERIES = [draw(GENES, WIDTH, scale=WIDTH**-0.5), draw(len(LENGTHS), WIDTH)]
REGRESSION = [STATES, draw(1, WIDTH, scale=WIDTH**-0.5), draw(1)]
NORM = [STATES, draw(TOKENS, WIDTH, seed=1), draw(WIDTH, seed=2), draw(WIDTH, seed=3)]
ON_DEVICE = {name: globals()[name].to(DEVICE) for name in (
    "OFFSETS", "KEYS", "GENE", "VALUE", "ORDER", "QUERY", "QUERY_ORDER", "CELL", "TARGET",
)} if GPU or INTERPRETED else {}  # fmt: skip


def on(x, name):
    """An index tensor beside x, targets and values in fp64 with it."""
    index = ON_DEVICE[name] if x.device == DEVICE else globals()[name]
    return index.to(x.dtype) if x.dtype == torch.float64 and index.is_floating_point() else index


# Name: the op and its definition, both as functions of the leaves, and the leaves.
OPS = {
    "gene_value_embedding": (
        lambda t, *w: gene_value_embedding(on(t, "GENE"), on(t, "VALUE"), on(t, "ORDER"), t, *w),
        lambda t, *w: gene_value_embedding_oracle(GENE, VALUE.to(t.dtype), t, *w), MLP),
    "table_rows": (lambda t: table_rows(t, on(t, "GENE"), on(t, "ORDER")), lambda t: t[GENE], MLP[:1]),
    "masked_regression": (
        lambda h, *w: masked_regression(h, *w, on(h, "TARGET"))[0],
        lambda h, *w: masked_regression_oracle(h, *w, TARGET.to(h.dtype))[0], REGRESSION),
    "mvc": (
        lambda q, c: mvc(q, on(q, "QUERY"), on(q, "QUERY_ORDER"), c, on(q, "CELL"), on(q, "TARGET"))[0],
        lambda q, c: mvc_oracle(q, QUERY, c, CELL, TARGET.to(q.dtype))[0], QUERIES),
    "dropout": (lambda x: dropout(x, on(x, "KEYS"), PROBABILITY), lambda x: dropped(x, KEYS), [STATES]),
    "relu_dropout": (lambda x: relu_dropout(x, on(x, "KEYS"), PROBABILITY), lambda x: dropped(x.relu(), KEYS), [STATES]),
    "add_norm": (
        lambda *x: add_norm(*x, on(x[0], "KEYS"), PROBABILITY),
        lambda x, y, w, b: F.layer_norm(y + dropped(x, KEYS), (WIDTH,), w, b), NORM),
    "attention": (
        lambda *x: attention(*x, on(x[0], "OFFSETS"), token_keys=on(x[0], "KEYS"), probability=PROBABILITY),
        lambda *x: attention_oracle(*x, OFFSETS, token_keys=KEYS, probability=PROBABILITY), HEADS),
    "gene_graph": (
        lambda *x: attention(*x, on(x[0], "OFFSETS"), scale=1.0), lambda *x: attention_oracle(*x, OFFSETS, scale=1.0),
        [draw(TOKENS, 1, 128, seed=1, scale=128**-0.5), draw(TOKENS, 1, 128, seed=2, scale=128**-0.5), STATES[:, None]]),
    "selective_scan": (
        lambda *x: selective_scan(*x, on(x[0], "OFFSETS")), lambda *x: selective_scan_oracle(*x, OFFSETS), SCAN),
    "causal_conv": (
        lambda *x: causal_conv(*x, on(x[0], "OFFSETS")), lambda *x: causal_conv_oracle(*x, OFFSETS),
        [STATES, draw(WIDTH, 4), draw(WIDTH)]),
}  # fmt: skip


def leaves_of(op, dtype, device=DEVICE):
    return [x.to(dtype).to(device).requires_grad_() for x in OPS[op][2]]


def results(function, leaves):
    """The output and the gradients, for an upstream gradient that every precision holds."""
    output = function(*leaves)
    upstream = (torch.arange(output.numel()) % 7 - 3).view(output.shape).to(output) / 4 if output.ndim else None
    return [output.detach(), *torch.autograd.grad(output, leaves, upstream)]


def references(oracle, leaves, plain=None):
    """(by PyTorch in the leaves' precision, in fp64), both on the CPU."""
    leaves = [x.detach().cpu() for x in leaves]
    pairs = ((plain or oracle, leaves[0].dtype), (oracle, torch.float64))
    return [results(function, [x.to(dtype).requires_grad_() for x in leaves]) for function, dtype in pairs]


def by_cells(*leaves):
    """Attention in matrix products: the definition's dropout overflows fp16."""
    return _CellAttention.apply(*leaves, OFFSETS, None, None, KEYS, PROBABILITY)


def assert_as_good(ours, plain, exact):
    """No error is more than twice PyTorch's in the same precision, give or take a unit in the last place."""
    for number, (mine, theirs, truth) in enumerate(zip(ours, plain, exact, strict=True)):
        error, allowed = ((x.cpu().double() - truth).abs().max() for x in (mine, theirs))
        limit = 2 * allowed + torch.finfo(theirs.dtype).eps * truth.abs().max()
        assert error <= limit, f"output {number}: error {error:.2e}, PyTorch {allowed:.2e}"


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("op", OPS)
def test_precision(op, dtype):
    function, oracle, _ = OPS[op]
    leaves = leaves_of(op, dtype)
    ours = results(function, leaves)
    assert [x.dtype for x in ours[1:]] == [dtype] * len(leaves)
    assert_as_good(ours, *references(oracle, leaves, by_cells if op == "attention" else None))


@pytest.mark.parametrize("op", OPS)
def test_repeats_agree_to_the_bit(op):
    """While the GPU has something else to do, so that programs meet in other orders."""
    leaves = leaves_of(op, FP32)
    expected, other = results(OPS[op][0], leaves), torch.cuda.Stream() if GPU else None
    for _ in range(REPEATS):
        if GPU:
            with torch.cuda.stream(other):
                load = torch.randn(2048, 2048, device=DEVICE)
                load = load @ load @ load
        again = results(OPS[op][0], leaves)
        assert all(torch.equal(a, b) for a, b in zip(expected, again, strict=True))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("path", ["flash_attn", "torch_varlen", "triton"])
def test_the_ways_of_attention(path, dtype, monkeypatch):
    if path != "triton":
        found = GPU and dtype != FP32 and getattr(attention_module, f"_{path}")() is not None
        if not found or torch.cuda.get_device_capability() < (8, 0):
            pytest.skip(f"{path} is not there, or not for {dtype}")
    monkeypatch.setattr(attention_module, "attention_path", lambda query, plain: path)
    leaves = leaves_of("attention", dtype)
    ours = results(lambda *x: attention(*x, on(x[0], "OFFSETS"), max_tokens=max(LENGTHS)), leaves)
    assert_as_good(ours, *references(lambda *x: attention_oracle(*x, OFFSETS), leaves))


@pytest.mark.parametrize("op", OPS)
def test_time(op, record_property):
    """Recorded beside the PyTorch path's, nothing is decided: benchmarks/kernels.py measures."""
    leaves = leaves_of(op, DTYPES[-1])
    for forced in ("triton", "torch"):
        backend.FORCED = forced  # the fixture puts it back
        seconds = []
        for _ in range(REPEATS):
            start = time.perf_counter()
            results(OPS[op][0], leaves)
            if GPU:
                torch.cuda.synchronize()
            seconds.append(time.perf_counter() - start)
        record_property(f"{op} {forced} ms", round(1e3 * sorted(seconds)[len(seconds) // 2], 3))
