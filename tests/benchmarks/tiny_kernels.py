"""Kernels whose traffic and needs are known by construction; imported in a process that says whether they are interpreted."""

import triton
import triton.language as tl


@triton.jit
def scale_kernel(x, weight, y, n_rows, D: tl.constexpr, ROWS: tl.constexpr):
    """y = x · weight; every program reads all of weight."""
    row = (tl.program_id(0) * ROWS + tl.arange(0, ROWS)).to(tl.int64)
    column = tl.arange(0, D)
    mask = (row < n_rows)[:, None] & (column >= 0)[None, :]
    at = row[:, None] * D + column[None, :]
    value = tl.load(x + at, mask=mask, other=0).to(tl.float32) * tl.load(weight + column).to(tl.float32)[None, :]
    tl.store(y + at, value, mask=mask)


@triton.jit
def stride_kernel(x, y, STRIDE: tl.constexpr, N: tl.constexpr):
    """Every STRIDE-th element."""
    i = tl.arange(0, N)
    tl.store(y + i, tl.load(x + i * STRIDE))


@triton.jit
def add_kernel(x, counter, N: tl.constexpr):
    """An atomic; it is not deterministic on a GPU."""
    i = tl.arange(0, N)
    tl.atomic_add(counter + i, tl.load(x + i))


@triton.jit
def read_again_kernel(x, y, n_blocks, BLOCK: tl.constexpr, TIMES: tl.constexpr):
    """Reads x TIMES times, from its start to its end."""
    i = tl.arange(0, BLOCK)
    total = tl.zeros((BLOCK,), tl.float32)
    for _ in range(TIMES):
        for block in range(n_blocks):
            total += tl.load(x + block * BLOCK + i)
    tl.store(y + i, total)


@triton.jit
def in_turn_kernel(x, y, BLOCK: tl.constexpr):
    """Each program reads its block of x twice."""
    i = tl.arange(0, BLOCK)
    at = x + tl.program_id(0) * BLOCK + i
    tl.store(y + i, tl.load(at) + tl.load(at))


@triton.jit
def beyond_kernel(x, y, N: tl.constexpr):
    """Reads one element too many, and so past the storage."""
    i = tl.arange(0, N)
    tl.store(y + i, tl.load(x + i + 1))


@triton.jit
def product_kernel(x, y, z, B: tl.constexpr):
    """One tile's matrix product."""
    i = tl.arange(0, B)
    at = i[:, None] * B + i[None, :]
    tl.store(z + at, tl.dot(tl.load(x + at), tl.load(y + at)))


@triton.jit
def spilling_kernel(x, y, N: tl.constexpr):
    """One warp holds N values: N / 32 a thread, N / 64 on AMD, where a thread has 512 registers."""
    i = tl.arange(0, N)
    value = tl.load(x + i)
    tl.store(y + i, value / tl.sum(value))
