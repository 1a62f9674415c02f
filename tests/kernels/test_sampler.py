"""The sampler in C against the NumPy code, bit for bit; how it is compiled, kept, and refused."""

import os
import subprocess
import sys
import weakref
import zipfile
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from scbench.config import InputLaw
from scbench.data.cells import CellTokens
from scbench.data.sampler import CellSampler
from scbench.errors import UserError
from scbench.kernels import native, sampler
from scbench.kernels.logarithm import log1p_table

ROOT = Path(__file__).parents[2]
VOCABULARY = SimpleNamespace(cls=70_001, pad=70_000)
COUNTS = [(np.uint8, 255), (np.uint16, 9), (np.uint16, 65_535), (np.uint32, 65_536), (np.uint32, 2**32 - 1)]  # and the largest
pytestmark = pytest.mark.skipif(sampler.library() is None, reason="no compiled sampler: no C compiler, or NumPy was asked for")


def cells_of(lengths, genes_dtype, counts_dtype, largest, equal, seed) -> CellTokens:
    rng = np.random.default_rng(seed)
    vocabulary = min(np.iinfo(genes_dtype).max, 70_000)
    genes = [np.sort(rng.choice(vocabulary, n, replace=False)) for n in lengths]
    offsets = np.concatenate([[0], np.cumsum(lengths, dtype=np.int64)])
    top = min(largest, np.iinfo(counts_dtype).max)
    counts = np.exp(rng.uniform(0, np.log(top), offsets[-1])) if not equal else np.full(offsets[-1], top)
    return CellTokens(np.concatenate([np.zeros(0, genes_dtype), *genes]).astype(genes_dtype),
                      np.rint(counts).astype(counts_dtype), offsets, np.zeros(len(lengths)))


def rows_of(cells) -> sampler.CellRows:
    """The same cells in two pieces."""
    middle = len(cells.offsets) // 2
    halves = cells.offsets[: middle + 1], cells.offsets[middle:]
    pieces = [sampler.Piece(cells.genes, cells.counts, offsets) for offsets in halves]
    of_first = np.arange(len(cells.offsets) - 1) < middle
    return sampler.CellRows(pieces, np.where(of_first, 0, 1), np.arange(len(of_first)) - np.where(of_first, 0, middle))


def both(monkeypatch, make):
    """What `make` gives with the compiled sampler and without it."""
    compiled = make()
    with monkeypatch.context() as patch:
        patch.setattr(sampler, "library", lambda: None)
        return compiled, make()


def assert_same(a, b):
    for name in a._fields:
        x, y = (np.asarray(getattr(found, name)) for found in (a, b))
        assert x.shape == y.shape and np.array_equal(x, y), name


@settings(max_examples=120, deadline=None)
@given(
    lengths=st.lists(st.sampled_from([0, 1, 2, 7, 19, 20, 21, 60, 400, 3000]), min_size=1, max_size=6),
    genes_dtype=st.sampled_from([np.uint16, np.uint32]),
    counts=st.sampled_from(COUNTS),
    equal=st.booleans(),
    max_genes=st.sampled_from([1, 20, 512]),
    mask_ratio=st.sampled_from([0.0, 0.4, 1.0]),
    weighted_share=st.sampled_from([0.0, 0.5, 1.0]),
    law=st.sampled_from([{}, {"normalize": "total"}, {"preprocess": "bin"}, {"order": "random"}, {"pad_to": 600}]),
    seed=st.integers(-(2**65), 2**65),
    first=st.one_of(st.integers(0, 2**20), st.integers(2**62, 2**63 - 10)),
)
def test_the_same_bits_as_numpy(
    lengths, genes_dtype, counts, equal, max_genes, mask_ratio, weighted_share, law, seed, first
):
    cells = cells_of(lengths, genes_dtype, *counts, equal, abs(seed) % 1000)
    samples = np.arange(first, first + len(lengths))
    rows = np.arange(len(lengths))[::-1] if seed % 2 else np.arange(len(lengths))

    def make():
        made = CellSampler(VOCABULARY, InputLaw(max_genes, **law), seed=seed, mask_ratio=mask_ratio,
                           weighted_share=weighted_share)
        drawn = made.draw(cells, samples)
        packed = made.pack(drawn, rows, samples[rows], rows)
        return drawn, packed, made.make(rows_of(cells)[rows], samples[rows], rows)

    with pytest.MonkeyPatch.context() as patch:
        compiled, numpy = both(patch, make)
    assert_same(compiled[0], numpy[0])
    assert_same(compiled[1], numpy[1])
    assert_same(compiled[2], numpy[1])
    assert_same(numpy[2], numpy[1])


def test_equal_words_keep_the_first():
    """Distinct genes never have equal words; equal genes force ties at the edge of the selection."""
    for genes, number in [([7] * 5, 2), ([7, 9, 7, 9, 7, 9, 7, 9], 5), ([3] * 2000, 512)]:
        cells = CellTokens(np.array(genes, np.uint16), np.ones(len(genes), np.uint8), np.array([0, len(genes)]), np.zeros(1))
        made = partial(CellSampler, VOCABULARY, InputLaw(number), seed=0)
        for sample in range(4):
            with pytest.MonkeyPatch.context() as patch:
                assert_same(*both(patch, partial(lambda made, *arguments: made().draw(*arguments), made, cells, [sample])))


def test_what_would_read_elsewhere_is_refused():
    genes, counts = np.array([1, 2, 3], np.uint16), np.array([1, 1, 1], np.uint8)
    for offsets in ([0, 4], [-1, 3], [0, 2, 1], []):
        with pytest.raises(ValueError, match="offsets must ascend"):
            sampler.Piece(genes, counts, np.array(offsets, dtype=np.int64))
    piece = sampler.Piece(genes, counts, np.array([0, 2, 3]))
    for piece_of, index in [(0, 2), (0, -1), (1, 0), (-1, 0)]:
        with pytest.raises(ValueError, match="outside"):
            sampler.CellRows([piece], np.array([piece_of]), np.array([index]))
    with pytest.raises(ValueError, match="one element a cell"):
        sampler.CellRows([piece], np.zeros(2), np.zeros(1))
    law = sampler.Law(1, 2, 0.5, 3, 0.5, max_genes=5)
    rows = sampler.CellRows([piece], np.zeros(2), np.arange(2))
    wide = sampler.CellRows([sampler.Piece(genes, counts.astype(np.float32), np.array([0, 3]))], np.zeros(1), np.zeros(1))
    for draw in (sampler.draw, partial(sampler.make, cls_token=5, masked_value=-1.0)):
        for keys in (np.zeros(1, np.int64), np.zeros(2, np.int32)):
            with pytest.raises(ValueError, match="keys must be"):
                draw(rows, keys, law)
        with pytest.raises(ValueError, match="max_genes be at least 1"):
            draw(rows, np.zeros(2, np.int64), law._replace(max_genes=0))
        with pytest.raises(ValueError, match="uint8, uint16 or uint32"):
            draw(wide, np.zeros(1, np.int64), law)
    arrays = genes, np.ones(3, np.float32), counts, np.zeros(3, bool)
    tokens = {"cls_token": 5, "pad_token": 6, "masked_value": -1.0}
    for start, length, end in [(1, 3, 4), (-1, 2, 3), (0, 3, 3), (0, 2, 2**31)]:
        with pytest.raises(ValueError, match=r"outside|must begin"):
            sampler.pack(*arrays, np.array([start]), np.array([length]), np.array([0, end]), **tokens)
    with pytest.raises(ValueError, match="equally long"):
        sampler.pack(genes[:2], *arrays[1:], np.array([0]), np.array([2]), np.array([0, 3]), **tokens)


def test_what_the_c_code_reads_is_held_while_it_reads(monkeypatch):
    """Two threads that ask for the table of logarithms first get one each, and only one of them is kept."""
    class Watched:
        def __getattr__(self, name):
            def called(*arguments):
                assert tables[-1]() is not None, f"{name} reads memory that was given back"
                return getattr(compiled, name)(*arguments)
            return called

    def fresh() -> np.ndarray:
        table = np.array(log1p_table())
        tables.append(weakref.ref(table))
        return table

    compiled, tables = sampler.library(), []
    piece = sampler.Piece(np.array([1, 2, 3], np.uint16), np.array([1, 1, 1], np.uint8), np.array([0, 2, 3]))
    rows, law = sampler.CellRows([piece], np.zeros(2), np.arange(2)), sampler.Law(1, 2, 0.5, 3, 0.5, max_genes=5)
    monkeypatch.setattr(sampler, "library", Watched)
    monkeypatch.setattr(sampler, "log1p_table", fresh)
    sampler.draw(rows, np.arange(2), law)
    sampler.make(rows, np.arange(2), law, cls_token=5, masked_value=-1.0)
    assert len(tables) == 2


# --- how it is made ------------------------------------------------------------------------------------------------


def python(code: str, **environment) -> subprocess.Popen:
    return subprocess.Popen([sys.executable, "-W", "always", "-c", code], env={**os.environ, **environment}, text=True,
                            stdout=subprocess.PIPE, stderr=subprocess.PIPE)


LOAD = "from scbench.kernels import sampler; print(sampler.library() is not None)"


def test_two_processes_may_make_it_at_once(tmp_path):
    for _ in range(2):  # the second time it is there
        running = [python(LOAD, SCBENCH_CACHE=str(tmp_path)) for _ in range(2)]
        assert [process.communicate() for process in running] == [("True\n", "")] * 2
    (library,) = tmp_path.iterdir()
    library.write_bytes(b"")  # what a crash of the machine may leave
    assert python(LOAD, SCBENCH_CACHE=str(tmp_path)).communicate() == ("True\n", ""), "a damaged one is made again"
    assert library.stat().st_size > 0


@pytest.mark.parametrize(("compiler", "message"), [
    ("false", "false cannot compile sampler.c: exit code 1"),
    ("no-such-compiler", "No such file or directory: 'no-such-compiler'"),
    ("sh -c 'echo it broke >&2; exit 3'", "it broke"),
])
def test_a_compiler_that_fails(tmp_path, compiler, message):
    environment = {"SCBENCH_CACHE": str(tmp_path), "CC": compiler}
    out, warning = python(LOAD, **environment).communicate()
    assert out == "False\n" and message in warning and "cells are sampled by NumPy" in warning
    assert python(LOAD, **environment, SCBENCH_SAMPLER="numpy").communicate() == ("False\n", "")
    out, error = python(LOAD, **environment, SCBENCH_SAMPLER="native").communicate()
    assert out == "" and message in error and "SCBENCH_SAMPLER is native" in error.splitlines()[-1]
    assert not list(tmp_path.iterdir()), "nothing is left behind"


def test_a_sampler_that_must_be_native_is_a_users_error(monkeypatch):
    def missing():
        raise native.BuildError("SCBENCH_SAMPLER is native, but there is no C compiler")

    monkeypatch.setattr(sampler, "library", missing)
    with pytest.raises(UserError, match="SCBENCH_SAMPLER is native"):
        CellSampler(VOCABULARY, InputLaw(5), seed=0)


def test_no_compiler_and_an_unknown_choice(monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("CC", raising=False)
    with pytest.raises(native.BuildError, match="there is no C compiler"):
        native.load(sampler.SOURCE)
    monkeypatch.setenv("SCBENCH_SAMPLER", "fast")
    with pytest.raises(native.BuildError, match="must be native or numpy"):
        sampler.library.__wrapped__()


def test_where_libraries_are_kept(monkeypatch):
    monkeypatch.delenv("SCBENCH_CACHE", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", "/somewhere")
    assert native.cache_directory() == Path("/somewhere/scbench")
    monkeypatch.setenv("SCBENCH_CACHE", "/own")
    assert native.cache_directory() == Path("/own")


def test_another_header_makes_another_library(monkeypatch, tmp_path):
    monkeypatch.setenv("SCBENCH_CACHE", str(tmp_path / "cache"))
    source, header = tmp_path / "answer.c", tmp_path / "answer.h"
    source.write_text('#include "answer.h"\nint answer(void) { return ANSWER; }\n')
    for answer in (1, 2, 1):
        header.write_text(f"#define ANSWER {answer}\n")
        assert native.load(source).answer() == answer
    assert len(list((tmp_path / "cache").iterdir())) == 2


@pytest.mark.full
def test_a_wheel_carries_the_source(tmp_path):
    command = [sys.executable, "-m", "pip", "wheel", "--no-deps", "--no-build-isolation", "-q", "-w", str(tmp_path), str(ROOT)]
    subprocess.run(command, check=True, capture_output=True)
    (wheel,) = tmp_path.glob("*.whl")
    sources = {f"scbench/kernels/{file.name}" for end in ("c", "h") for file in (ROOT / "kernels").glob(f"*.{end}")}
    assert "scbench/kernels/rows.h" in sources and sources <= set(zipfile.ZipFile(wheel).namelist())
