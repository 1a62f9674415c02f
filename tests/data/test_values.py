"""Input values: log1p, counts per 10,000, bins; and the way back."""

from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from scbench.data.values import (
    decode_bins,
    decode_normalized,
    effective_bins,
    library_sizes,
    log1p_counts,
    normalized_counts,
    quantile_bins,
    reference_bins,
)


@pytest.mark.parametrize("dtype", [np.uint8, np.uint16, np.uint32, np.int64])
def test_values(dtype):
    counts = np.array([0, 1, 9, 200, np.iinfo(dtype).max], dtype=dtype)
    values = log1p_counts(counts)
    assert values.dtype == np.float32
    assert np.array_equal(values, np.array([np.float32(np.log1p(float(c))) for c in counts]))


def test_library_sizes_do_not_overflow():
    assert library_sizes(np.full(300, 255, np.uint8), np.array([0, 0, 300])).tolist() == [0, 76_500]
    assert library_sizes(np.full(2, 2**32 - 1, np.uint32), np.array([0, 2])).tolist() == [2 * (2**32 - 1)]


def test_normalised_values_go_there_and_back():
    counts, totals = np.array([1, 7, 4000, 1]), np.array([1, 500, 20_000, 3])
    values = normalized_counts(counts, totals)
    assert values == pytest.approx(np.log1p(counts * 1e4 / totals), rel=1e-6)
    assert decode_normalized(values, totals) == pytest.approx(np.log1p(counts), rel=1e-5)
    assert decode_normalized(np.array([-3.0, 1e9]), np.array([10, 10]))[0] == 0  # no negative counts; and nothing overflows
    assert np.isfinite(decode_normalized(np.array([1e9]), np.array([10]))).all()


def slow_bins(counts: list[int]) -> list[int]:
    n = len(counts)
    return [1 + int(50 * Fraction(2 * sum(c < x for c in counts) + counts.count(x), 2 * n)) for x in counts]


@settings(max_examples=60, deadline=None)
@given(st.lists(st.lists(st.one_of(st.integers(1, 4), st.integers(1, 10**6)), max_size=70), min_size=1, max_size=4))
def test_bins_equal_the_definition(cells):
    offsets = np.concatenate([[0], np.cumsum([len(c) for c in cells])])
    found = quantile_bins(np.array([x for c in cells for x in c], dtype=np.uint32), offsets)
    assert found.dtype == np.float32
    assert found.tolist() == [b for c in cells for b in slow_bins(c)]
    assert ((found >= 1) & (found <= 50)).all()


def test_bins_share_ties_keep_order_and_use_all_bins():
    counts = np.array([1] * 57 + [2] * 20 + [3, 9, 9, 40])
    bins = quantile_bins(counts, np.array([0, len(counts)]))
    assert len(set(bins[:57])) == len(set(bins[57:77])) == 1
    assert (np.diff(bins) >= 0).all()
    assert effective_bins(bins, np.array([0, len(counts)])) == 5
    distinct = quantile_bins(np.arange(1, 501), np.array([0, 500]))
    assert np.bincount(distinct.astype(int)).tolist() == [0] + [10] * 50
    assert quantile_bins(np.array([7]), np.array([0, 1])).tolist() == [26]  # one gene: the middle
    assert quantile_bins(np.zeros(0, np.uint8), np.array([0, 0])).shape == (0,)
    assert np.isnan(effective_bins(np.zeros(0), np.array([0, 0])))


def test_the_references_bins_spread_ties_and_let_pads_in():
    values = np.log1p(np.array([1.0] * 40 + [2.0] * 5 + [8.0]))
    words = np.random.default_rng(0).integers(0, 2**64, len(values), dtype=np.uint64)
    short = reference_bins(values, np.array([0, len(values)]), words, pad_to=len(values))
    assert len(set(short[:40])) > 10, "equal counts fall anywhere in their run of edges"
    assert (short >= 0).all()
    assert short[-1] == short.max() == 49
    padded = reference_bins(values, np.array([0, len(values)]), words, pad_to=4 * len(values))
    assert padded[:40].min() > short[:40].max() / 2 > 10, "pads push real values into upper bins"


def test_decoding_means_the_visible_genes_of_the_bin():
    bins = np.array([10, 10, 30, 7.0])
    log_counts = np.array([1.0, 2.0, 4.0, 9.0])
    cells = np.array([0, 0, 0, 1])
    predictions = np.array([10, 30, 20, 0, 99, 7, 20, 12.5])
    of = np.array([0, 0, 0, 0, 0, 1, 2, 0])
    pooled = np.interp(20, [7, 10, 30], [9, 1.5, 4])  # cell 2 shows nothing: all cells' genes stand in
    expected = [1.5, 4, 2.75, 1.5, 4, 9, pooled, np.interp(12.5, [10, 30], [1.5, 4])]
    assert decode_bins(predictions, of, bins, log_counts, cells) == pytest.approx(expected)
    nothing = decode_bins(np.array([3.0]), np.array([0]), *np.zeros((2, 0)), np.zeros(0, int))
    assert nothing == pytest.approx([np.log(2)])


def test_decoding_undoes_binning_where_bins_hold_one_count():
    counts = np.array([1] * 50 + [2] * 30 + [5] * 15 + [60] * 5)
    bins = quantile_bins(counts, np.array([0, 100]))
    hidden = np.arange(100) % 3 == 0
    zeros = np.zeros(100, int)
    decoded = decode_bins(bins[hidden], zeros[hidden], bins[~hidden], np.log1p(counts[~hidden]), zeros[~hidden])
    assert decoded == pytest.approx(np.log1p(counts[hidden]))
