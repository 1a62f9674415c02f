"""Mapping counts to tokens and hashing cells, against cell-by-cell Python."""

from collections import Counter
from types import SimpleNamespace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from scbench.data.cells import Counts, content_hash, sum_by_cell, to_tokens
from scbench.errors import UserError
from scbench.kernels import cells as native
from scbench.kernels import random

native.library()  # compiled before a test is timed
ENTRIES = st.lists(st.lists(st.tuples(st.integers(0, 7), st.integers(0, 5)), max_size=12), max_size=8)


def pack(cells):
    """Counts of lists of (column, count)."""
    flat = [entry for cell in cells for entry in cell]
    return Counts(
        np.array([column for column, _ in flat], dtype=np.int64),
        np.array([count for _, count in flat], dtype=np.uint32),
        np.cumsum([0, *map(len, cells)]),
    )


@given(ENTRIES, st.lists(st.integers(-1, 4), min_size=8, max_size=8))
def test_to_tokens_sums_sorts_and_drops(cells, tokens):
    result = to_tokens(pack(cells), SimpleNamespace(tokens=np.array(tokens, dtype=np.int64)))
    assert [array.dtype for array in result] == [np.uint32, np.uint32, np.int64, np.int64]
    assert len(result.offsets) == len(cells) + 1
    for i, cell in enumerate(cells):
        expected = Counter()
        for column, count in cell:
            if tokens[column] >= 0 and count:
                expected[tokens[column]] += count
        part = slice(result.offsets[i], result.offsets[i + 1])
        assert list(zip(result.genes[part], result.counts[part], strict=True)) == sorted(expected.items())
        assert result.totals[i] == sum(count for _, count in cell)


def test_sums_past_uint32_are_refused():
    counts = Counts(np.array([0, 1]), np.array([2**32 - 1, 1], dtype=np.uint32), np.array([0, 2]))
    apart = to_tokens(counts, SimpleNamespace(tokens=np.array([0, 1])))
    assert apart.counts.tolist() == [2**32 - 1, 1]
    assert apart.totals.tolist() == [2**32]
    with pytest.raises(UserError, match="4294967296"):
        to_tokens(counts, SimpleNamespace(tokens=np.array([3, 3])))


@given(st.lists(st.lists(st.integers(0, 100), max_size=4), max_size=8))
def test_sum_by_cell(cells):
    values = np.array([value for cell in cells for value in cell], dtype=np.int64)
    assert sum_by_cell(values, np.cumsum([0, *map(len, cells)])).tolist() == [sum(cell) for cell in cells]


@given(ENTRIES, st.randoms())
def test_hash_is_the_mixed_sum_of_words_whatever_the_order(cells, shuffler):
    cells = [list({column: (column, count + 1) for column, count in cell}.values()) for cell in cells]
    key = random.key(0, random.Stream.CONTENT)
    expected = []
    for cell in cells:
        total = sum(random.fold(key, column, count) for column, count in cell) % 2**64
        expected.append(random.fold(random.key(1, random.Stream.CONTENT), total))
    assert content_hash(*pack(cells)[:3]).tolist() == expected
    for cell in cells:
        shuffler.shuffle(cell)
    assert content_hash(*pack(cells)[:3]).tolist() == expected


def test_hash_depends_on_genes_and_counts_alone():
    cells = [[(1, 2)], [(2, 1)], [(1, 1), (2, 1)], [(1, 1)], [], [(1, 2)], []]
    hashes = content_hash(*pack(cells)[:3])
    assert hashes.dtype == np.uint64
    assert hashes[0] == hashes[5]
    assert hashes[4] == hashes[6]
    assert len(set(hashes.tolist())) == 5
    genes, counts, offsets = pack(cells)[:3]
    assert (content_hash(genes.astype(np.uint16), counts.astype(np.uint8), offsets) == hashes).all()
