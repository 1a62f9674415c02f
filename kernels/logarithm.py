"""The natural logarithm, in operations whose bits are the same everywhere.

NumPy's own takes another way on another processor, and its last bit with it: a gene that is drawn here would not be there.
This one is made of + − × ÷ alone (and has a twin in sampler.c), so what follows from it is the same on every machine.
Source: fdlibm's e_log.c in the form without branches; error below 1 ulp.
"""

from functools import cache

import numpy as np

TABLE = 1 << 16  # counts whose ln(1 + count) is looked up
_HALF_ROOT = np.int64(0x3FE6A09E667F3BCD)  # the bits of √½
_EXPONENT = np.int64(-1 << 52)
_LN2 = 0.6931471803691238, 1.9082149292705877e-10  # its leading bits, and the rest
_ODD = 0.14798198605116586, 0.1818357216161805, 0.2857142874366239, 0.6666666666666735
_EVEN = 0.15313837699209373, 0.22222198432149784, 0.3999999999940942


def log(x: np.ndarray) -> np.ndarray:
    """ln(x), float64, of float64 `x`, each positive, finite and normal."""
    bits = np.asarray(x, dtype=np.float64).view(np.int64)
    shifted = bits - _HALF_ROOT
    f = (bits - (shifted & _EXPONENT)).view(np.float64)  # x = 2^k (1 + f), 1 + f from √½ to √2
    f -= 1.0
    shifted >>= 52
    k = shifted.astype(np.float64)
    s = f / (2.0 + f)
    z = s * s
    w = z * z
    series = _polynomial(_EVEN, w)
    series *= w
    odd = _polynomial(_ODD, w)
    odd *= z
    series += odd
    half = 0.5 * f
    half *= f
    series += half
    series *= s
    series += k * _LN2[1]
    half -= series
    half -= f
    k *= _LN2[0]
    k -= half
    return k


def _polynomial(coefficients: tuple[float, ...], w: np.ndarray) -> np.ndarray:
    value = coefficients[0] * w
    for coefficient in coefficients[1:-1]:
        value += coefficient
        value *= w
    value += coefficients[-1]
    return value


@cache
def log1p_table() -> np.ndarray:
    """ln(1 + count) of the counts under TABLE, float64. Threads that ask first at once get one each, and one of them is kept:
    hold what you got for as long as you use it."""
    return log(np.arange(1.0, TABLE + 1.0))


def log1p(counts: np.ndarray) -> np.ndarray:
    """ln(1 + count), float64, of counts ≥ 0 of any dtype: within 1 ulp for whole ones, and 10⁻¹⁶ for others."""
    counts = np.asarray(counts)
    if counts.dtype.kind in "iu" and counts.max(initial=0) < TABLE:
        return log1p_table().take(counts)
    return log(counts.astype(np.float64) + 1.0)
