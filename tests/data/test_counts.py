"""The integer test and the recovery of counts."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from scbench.data.counts import EXACT_COUNT, find_problem, recover, undo_log1p

DTYPES = [np.float16, np.float32, np.float64, np.int8, np.int32, np.int64, np.uint16, np.uint64, bool]


@pytest.mark.parametrize("dtype", DTYPES)
def test_counts_of_any_dtype_pass(dtype):
    assert find_problem(np.array([0, 1, 1, 0], dtype=dtype)) is None
    assert find_problem(np.zeros(0, dtype=dtype)) is None


@pytest.mark.parametrize(
    ("values", "reason", "position"),
    [
        ([1.0, np.nan], "NaN", 1),
        ([1.0, np.inf, 2.0], "infinite values", 1),
        ([-np.inf], "infinite values", 0),
        ([1.0, 2.0, -1.0], "negative values", 2),
        ([0.0, 0.5], "fractional values", 1),
        ([2.0**32], "values over 2³²−1", 0),
    ],
)
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_what_is_no_count(values, reason, position, dtype):
    problem = find_problem(np.array(values, dtype=dtype))
    assert (problem.reason, problem.position) == (reason, position)


def test_integers_that_are_no_counts():
    assert find_problem(np.array([3, -2], dtype=np.int32)).reason == "negative values"
    assert find_problem(np.array([2**32], dtype=np.int64)).reason == "values over 2³²−1"
    assert find_problem(np.array([2**32 - 1], dtype=np.int64)) is None
    assert find_problem(np.array([2**32 - 1], dtype=np.float64)) is None
    assert "complex" in find_problem(np.array([1j])).reason


CELLS = st.lists(st.lists(st.integers(1, 20_000), max_size=20).map(lambda counts: [1, *counts]), min_size=1, max_size=6)


@given(CELLS, st.floats(1e-3, 100), st.sampled_from([np.float32, np.float64]))
def test_log_normalised_counts_come_back(cells, scale, dtype):
    offsets = np.cumsum([0, *map(len, cells)])
    values = np.concatenate([np.log1p(np.array(cell) * scale * (i + 1)) for i, cell in enumerate(cells)]).astype(dtype)
    recovery = recover(values, offsets)
    assert recovery.counts.tolist() == [count for cell in cells for count in cell]
    assert not recovery.inexact.any()
    np.testing.assert_allclose(recovery.units, scale * np.arange(1, len(cells) + 1), rtol=1e-3)


def test_zeros_and_empty_cells_stay():
    recovery = recover(np.array([0.0, np.log1p(2.0), np.log1p(6.0), 0.0]), np.array([0, 0, 3, 4]))
    assert recovery.counts.tolist() == [0, 1, 3, 0]
    np.testing.assert_allclose(recovery.units, [np.nan, 2.0, np.nan])


def test_values_without_a_unit_are_inexact():
    values = np.random.default_rng(0).uniform(0.1, 5, 2000)
    assert recover(values, np.array([0, 1000, 2000])).inexact.mean() > 0.5


@pytest.mark.parametrize("logarithm", [
    lambda counts: np.log1p(counts.astype(np.float32)),
    lambda counts: np.log1p(counts.astype(np.float64)).astype(np.float32),
    lambda counts: np.log1p(counts.astype(np.float64)),
])
def test_every_count_up_to_the_limit_comes_back_from_log1p(logarithm):
    expected = np.arange(EXACT_COUNT + 1)
    counts, problem = undo_log1p(logarithm(expected))
    assert problem is None
    assert np.array_equal(counts, expected)


def test_past_the_limit_log1p_gives_the_count_about():
    expected = np.array([300_001, 5_000_000, 4_000_000_000])
    counts, problem = undo_log1p(np.log1p(expected.astype(np.float64)).astype(np.float32))
    assert problem is None
    assert np.abs(counts / expected - 1).max() < 2e-6


@pytest.mark.parametrize(
    ("values", "reason", "position"),
    [
        ([0.0, np.nan], "NaN", 1),
        ([0.0, np.log(2), -1.0], "negative values", 2),
        ([-np.inf], "negative values", 0),
        ([np.inf], "values over log1p(2³²−1)", 0),
        ([30.0], "values over log1p(2³²−1)", 0),
        ([0.0, 1.0], "values whose expm1 is no whole number", 1),
        ([np.log1p(5.002)], "values whose expm1 is no whole number", 0),
        ([np.log1p(2981.3)], "values whose expm1 is no whole number", 0),
    ],
)
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_values_that_are_no_log1p_of_counts(values, reason, position, dtype):
    problem = undo_log1p(np.array(values, dtype=dtype))[1]
    assert (problem.reason, problem.position) == (reason, position)
    assert problem.value == pytest.approx(values[position], nan_ok=True)


def test_raw_counts_are_no_log1p_of_counts():
    assert undo_log1p(np.array([3, 1, 2], dtype=np.int32))[1].position == 0
