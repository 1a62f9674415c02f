"""The generator in Triton: bit-identical to NumPy and torch under the interpreter, and it compiles for GPUs."""

import importlib.util

import numpy as np
import pytest
import torch

from scbench.kernels import random
from scbench.kernels.random import Stream

triton = pytest.importorskip("triton")
import triton.language as tl  # noqa: E402

from scbench.kernels import random_triton  # noqa: E402

# `interpret` is read when a kernel is decorated, so the interpreted kernels are those of a second copy of the module.
with triton.knobs.runtime.scope():
    triton.knobs.runtime.interpret = True
    _spec = importlib.util.spec_from_file_location("interpreted_random", random_triton.__file__)
    _interpreted = importlib.util.module_from_spec(_spec)
    _spec.loader.exec_module(_interpreted)
    bits_triton, keep_triton = _interpreted.bits_triton, _interpreted.keep_triton

    @triton.jit
    def bits_kernel(keys, counters, out, n, BLOCK: tl.constexpr):
        i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
        words = bits_triton(tl.load(keys + i, mask=i < n, other=0), tl.load(counters + i, mask=i < n, other=0))
        tl.store(out + i, words.to(tl.int64, bitcast=True), mask=i < n)

    @triton.jit
    def keep_kernel(keys, out, columns, threshold, BLOCK: tl.constexpr):
        row = tl.program_id(0)
        column = tl.arange(0, BLOCK)
        keep = keep_triton(tl.load(keys + row), column, threshold)
        tl.store(out + row * columns + column, keep.to(tl.int8), mask=column < columns)


def words_of(keys: np.ndarray, counters: torch.Tensor) -> np.ndarray:
    out = torch.zeros(len(keys), dtype=torch.int64)
    bits_kernel[(triton.cdiv(len(keys), 256),)](torch.from_numpy(keys.view(np.int64)), counters, out, len(keys), BLOCK=256)
    return out.numpy().view(np.uint64)


def test_words_are_numpys_and_torchs():
    edges = np.array([0, 1, 2**31, 2**32, 2**63 - 1, 2**63, 2**64 - 1], dtype=np.uint64)
    keys = np.concatenate([np.repeat(edges, len(edges)), random.bits(1, np.arange(500))])
    counters = np.concatenate([np.tile(edges, len(edges)), random.bits(2, np.arange(500))]).view(np.int64)
    words = words_of(keys, torch.from_numpy(counters))
    assert np.array_equal(words, random.bits(keys, counters))
    in_torch = random.bits_torch(torch.from_numpy(keys.view(np.int64)), torch.from_numpy(counters))
    assert np.array_equal(words, in_torch.numpy().view(np.uint64))


def test_32_bit_counters_give_the_same_words():
    keys = random.bits(1, np.arange(64))
    counters = np.arange(-32, 32, dtype=np.int32)
    assert np.array_equal(words_of(keys, torch.from_numpy(counters)), random.bits(keys, counters))


@pytest.mark.parametrize("columns", [1, 4, 130])
@pytest.mark.parametrize("probability", [0.0, 0.15, 0.999])
def test_dropout_decisions_are_torchs(columns, probability):
    keys = torch.from_numpy(random.bits(random.key(2, Stream.DROPOUT), np.arange(6)).view(np.int64))
    out = torch.zeros(6, columns, dtype=torch.int8)
    keep_kernel[(6,)](keys, out, columns, random.keep_threshold(probability), BLOCK=256)
    assert torch.equal(out.bool(), random.keep_torch(keys, columns, probability))


@triton.jit
def compiled_kernel(keys, counters, words, keep, threshold, BLOCK: tl.constexpr):
    i = tl.arange(0, BLOCK)
    key, counter = tl.load(keys + i), tl.load(counters + i)
    tl.store(words + i, random_triton.bits_triton(key, counter).to(tl.int64, bitcast=True))
    tl.store(keep + i, random_triton.keep_triton(tl.load(keys), counter, threshold).to(tl.int8))


def test_compiles_for_a_gpu_without_one():
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    signature = {
        "keys": "*i64", "counters": "*i32", "words": "*i64", "keep": "*i8", "threshold": "i32", "BLOCK": "constexpr"
    }  # fmt: skip
    source = ASTSource(fn=compiled_kernel, signature=signature, constexprs={"BLOCK": 256})
    compiled = triton.compile(source, target=GPUTarget("cuda", 90, 32))
    assert "mul.lo.s64" in compiled.asm["ptx"]
