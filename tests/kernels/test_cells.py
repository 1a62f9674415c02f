"""prepare's C code against the NumPy code that it stands for: the same bits, the same errors."""

from types import SimpleNamespace
from unittest.mock import patch

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from scbench.data import prepare
from scbench.data.cells import MAX_COUNT, Counts, content_hash, take_ranges, to_tokens
from scbench.data.fingerprint_genes import MOST_GENES, GeneList
from scbench.data.fingerprints import records
from scbench.errors import UserError
from scbench.kernels import cells as native

pytestmark = pytest.mark.skipif(native.library() is None, reason="no compiled code: no C compiler, or NumPy was asked for")

COLUMNS = 200
COUNTS = st.one_of(st.integers(0, 3), st.integers(0, MAX_COUNT), st.just(MAX_COUNT // 2))
CELLS = st.lists(st.lists(st.tuples(st.integers(0, COLUMNS - 1), COUNTS), max_size=90), max_size=8)
SEEDS = st.integers(0, 2**32 - 1)


def pack(cells) -> Counts:
    flat = [entry for cell in cells for entry in cell]
    columns, counts = (np.array([entry[i] for entry in flat], dtype=dtype) for i, dtype in ((0, np.int64), (1, np.uint32)))
    return Counts(columns, counts, np.cumsum([0, *map(len, cells)]))


def outcome(function, *arguments):
    """What comes of it, as bytes and dtypes, or the message of the error."""
    try:
        result = function(*arguments)
    except UserError as error:
        return str(error)
    return [(array.tobytes(), array.dtype, array.shape) for array in (result if isinstance(result, tuple) else (result,))]


def same(function, *arguments):
    with patch.object(native, "library", lambda: None):
        expected = outcome(function, *arguments)
    assert outcome(function, *arguments) == expected
    return expected


@given(CELLS, SEEDS, st.sampled_from([1, 3, 60, 70_000]), st.sampled_from([0.0, 0.5, 1.0]), st.booleans())
def test_tokens_are_numpys(cells, seed, vocabulary, unmatched, ascending):
    generator = np.random.default_rng(seed)
    tokens = generator.integers(0, vocabulary, COLUMNS)  # several columns of one token, unless there are many
    if ascending:
        tokens.sort()
        cells = [sorted(cell) for cell in cells]
    tokens[generator.random(COLUMNS) < unmatched] = -1
    result = same(to_tokens, pack(cells), SimpleNamespace(tokens=tokens))
    assert isinstance(result, list) or "in one cell, over" in result


@given(
    st.lists(st.tuples(st.integers(0, 60), st.integers(0, 30)), max_size=20),
    st.sampled_from(["uint8", "uint16", "uint32", "int64", "float32"]),
)
def test_ranges_are_numpys(ranges, dtype):
    """Ranges that overlap, are empty, or pass the end, where a slice is shorter than it was meant to be."""
    values = np.arange(80).astype(dtype)
    starts, lengths = np.array(ranges, dtype=np.int64).reshape(-1, 2).T
    same(take_ranges, values, starts, lengths)
    same(take_ranges, values[::2], starts, lengths)


def test_the_c_code_is_what_is_tested():
    cells = pack([[(5, 1), (2, 7)], [], [(0, 0)]])
    genes, counts, offsets, totals = native.map_cells(*cells[:3], np.arange(9)[::-1])
    assert (genes.tolist(), counts.tolist(), offsets.tolist(), totals.tolist()) == ([3, 6], [1, 7], [0, 2, 2, 2], [8, 0, 0])
    assert native.hash_cells(genes, counts, offsets, 1, 2) is not None
    assert native.map_cells(*cells[:3], np.arange(5)) is None, "a column that is not there"
    assert native.map_cells(cells.columns, cells.counts, np.array([0, 4]), np.arange(9)) is None, "too few counts"
    assert native.map_cells(cells.columns, cells.counts.astype(np.float32), cells.offsets, np.arange(9)) is None
    listed = np.zeros(6, dtype=np.uint32)
    assert native.fingerprint_cells(genes, counts, offsets, listed, least_core=1, keys=(1, 2, 3)) is None, "a token too many"
    assert native.fingerprint_cells(genes - 3, counts, offsets, listed, least_core=1, keys=(1, 2, 3)) is not None


UNSIGNED = st.sampled_from([np.uint8, np.uint16, np.uint32])


@given(st.lists(st.integers(0, 1200), max_size=6), SEEDS, UNSIGNED, UNSIGNED, st.integers(0, 3))
def test_hashes_and_fingerprints_are_numpys(lengths, seed, of_genes, of_counts, first):
    generator = np.random.default_rng(seed)
    vocabulary = min(np.iinfo(of_genes).max, 70_000)
    genes, counts = (generator.integers(0, most, first + sum(lengths)).astype(dtype)
                     for most, dtype in ((vocabulary, of_genes), (np.iinfo(of_counts).max + 1, of_counts)))
    same(content_hash, genes, counts, first + np.cumsum([0, *lengths]))
    numbers = np.where(generator.random(vocabulary) < 0.5, generator.integers(0, MOST_GENES, vocabulary), -1)
    common = GeneList(numbers, (numbers >= 0) & (generator.random(vocabulary) < 0.05), numbers[:0], "")
    same(records, genes[first:], counts[first:], np.array(lengths, dtype=np.int64), common)
    same(content_hash, genes, counts.astype(np.float64), first + np.cumsum([0, *lengths]))  # left to NumPy


def test_c_code_that_must_be_native_is_a_users_error(monkeypatch, tmp_path):
    def missing():
        raise native.native.BuildError("SCBENCH_SAMPLER is native, but there is no C compiler")

    monkeypatch.setattr(native, "library", missing)
    with pytest.raises(UserError, match="SCBENCH_SAMPLER is native"):
        prepare.prepare("a.h5ad", tmp_path / "store", workers=1)
    assert not list(tmp_path.iterdir())
