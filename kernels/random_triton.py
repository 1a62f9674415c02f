"""The generator of random.py in Triton; a file of its own, so that processes that only draw with NumPy import no Triton."""

import triton
import triton.language as tl

from scbench.kernels.random import GOLDEN, MIX1, MIX2

_GOLDEN, _MIX1, _MIX2 = tl.constexpr(GOLDEN), tl.constexpr(MIX1), tl.constexpr(MIX2)


@triton.jit
def bits_triton(key, counter):
    """The same words as uint64 blocks."""
    z = (counter.to(tl.uint64) + 1) * _GOLDEN + key.to(tl.uint64)
    z = (z ^ (z >> 30)) * _MIX1
    z = (z ^ (z >> 27)) * _MIX2
    return z ^ (z >> 31)


@triton.jit
def keep_triton(token_key, column, threshold):
    """Dropout decisions of one token for a block of columns; `threshold` from keep_threshold."""
    word = bits_triton(token_key, column // 4)
    lane = ((word >> ((column % 4) * 16).to(tl.uint64)) & 0xFFFF).to(tl.uint16).to(tl.int16, bitcast=True)
    return lane.to(tl.int32) >= threshold
