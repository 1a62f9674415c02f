"""The logarithm against exact arithmetic, and the table of counts."""

from decimal import Decimal, getcontext

import numpy as np
import pytest

from scbench.kernels.logarithm import TABLE, log, log1p


def errors_in_ulp(x: np.ndarray) -> float:
    getcontext().prec = 40
    exact = [Decimal(float(v)).ln() for v in x]
    ulp = [Decimal(float(np.spacing(abs(float(e))))) for e in exact]
    return max(abs(Decimal(float(y)) - e) / u for y, e, u in zip(log(x), exact, ulp, strict=True))


@pytest.mark.parametrize("x", [
    (np.random.default_rng(0).integers(0, 2**52, 3000) + 0.5) * 2.0**-52,  # what a draw takes the logarithm of
    (np.array([0, 1, 2**51 - 1, 2**51, 2**52 - 2, 2**52 - 1]) + 0.5) * 2.0**-52,  # the ends
    np.exp(np.random.default_rng(1).uniform(-40, 25, 3000)),
    np.sqrt(0.5) * (1 + np.arange(-50, 51) * 2.0**-52),  # where the exponent changes
    1 + np.arange(-100, 100) * 2.0**-51,
], ids=["uniform", "ends", "wide", "root", "one"])  # fmt: skip
def test_within_one_ulp(x):
    assert errors_in_ulp(x[x != 1]) < 1


def test_ones_logarithm_is_zero_and_uniforms_are_positive():
    assert log(np.array([1.0]))[0] == 0
    assert (-log((np.array([0, 2**52 - 1]) + 0.5) * 2.0**-52) > 0).all()


def test_counts_of_any_dtype():
    counts = np.array([0, 1, 2, 7, 255, 65_534, 65_535, 65_536, 2**32 - 1])
    assert np.allclose(log1p(counts), np.log1p(counts.astype(float)), rtol=4e-16, atol=0)
    for dtype in (np.uint8, np.uint16, np.uint32, np.int64, np.float32, np.float64):
        some = counts[counts < (256 if dtype is np.uint8 else 65_536)].astype(dtype)
        assert np.array_equal(log1p(some), log(some.astype(np.float64) + 1))
    assert np.array_equal(log1p(np.arange(TABLE)), log(np.arange(TABLE) + 1.0)), "the table holds the function"
    assert (np.diff(log1p(np.arange(TABLE))) > 0).all()
    assert log1p(np.zeros(0, np.uint16)).shape == (0,)
    assert np.allclose(log1p(np.array([0.25, 1e-3])), np.log1p([0.25, 1e-3]), atol=2e-16)
