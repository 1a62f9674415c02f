"""CellBatch against a slow per-cell oracle, and its invariants on any cells."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from scbench.data.batch import CLS, MASKED_VALUE, CellBatch

DTYPES = {
    "genes": torch.int32, "values": torch.float32, "masked": torch.int32, "targets": torch.float32,
    "cell_offsets": torch.int32, "samples": torch.int64, "cells": torch.int64, "query_genes": torch.int32,
    "query_index": torch.int32, "query_order": torch.int32, "gene_order": torch.int32, "denominator": torch.float32,
}  # fmt: skip


def cells_of(lengths: list[int], vocabulary: int, seed: int = 0):
    rng = np.random.default_rng(seed)
    genes = [np.sort(rng.choice(vocabulary, n, replace=False)) for n in lengths]
    values = [rng.uniform(0.1, 5, n).astype(np.float32) for n in lengths]
    masked = [rng.random(n) < 0.4 for n in lengths]
    return genes, values, masked


def oracle(genes, values, masked, cls_token):
    """The batch cell by cell in plain Python lists."""
    out = {name: [] for name in ("genes", "values", "masked", "targets")} | {"cell_offsets": [0]}
    for g, v, m in zip(genes, values, masked, strict=True):
        out["genes"].append(cls_token)
        out["values"].append(0.0)
        for gene, value, hidden in zip(g, v, m, strict=True):
            if hidden:
                out["masked"].append(len(out["genes"]))
                out["targets"].append(float(value))
            out["genes"].append(int(gene))
            out["values"].append(-1.0 if hidden else float(value))
        out["cell_offsets"].append(len(out["genes"]))
    out["query_genes"] = sorted({out["genes"][i] for i in out["masked"]})
    out["query_index"] = [out["query_genes"].index(out["genes"][i]) for i in out["masked"]]
    out["query_order"] = sorted(range(len(out["masked"])), key=lambda i: (out["query_index"][i], i))
    out["gene_order"] = sorted(range(len(out["genes"])), key=lambda i: (out["genes"][i], i))
    return out


def check(batch: CellBatch, genes, values, masked, cls_token=CLS):
    for name, expected in oracle(genes, values, masked, cls_token).items():
        assert getattr(batch, name).tolist() == expected, name
    for name, dtype in DTYPES.items():
        assert getattr(batch, name).dtype == dtype, name
        assert getattr(batch, name).is_contiguous(), name
    assert batch.resolved is (cls_token != CLS)
    assert batch.max_tokens == max([len(g) for g in genes], default=0) + 1 and isinstance(batch.max_tokens, int)
    assert batch.n_cells == len(genes)
    assert batch.denominator.shape == () and batch.denominator.item() == sum(int(m.sum()) for m in masked)


@settings(max_examples=60)
@given(
    st.lists(st.integers(0, 12), min_size=1, max_size=6),
    st.sampled_from([15, 60_697, 70_000]),  # ids that fit 16 bits and ids that don't
    st.booleans(),
    st.integers(0, 10**6),
)
def test_equals_the_slow_oracle(lengths, vocabulary, own_cls, seed):
    genes, values, masked = cells_of(lengths, vocabulary, seed)
    options = {"cls_token": vocabulary} if own_cls else {}
    check(CellBatch.from_lists(genes, values, masked, **options), genes, values, masked, options.get("cls_token", CLS))


def test_pack_takes_the_stores_types():
    genes, values, masked = cells_of([3, 0, 5], 65_535)
    batch = CellBatch.pack(
        np.concatenate(genes).astype(np.uint16), np.concatenate(values), np.array([0, 3, 3, 8]), np.concatenate(masked),
        cls_token=65_535, samples=np.array([7, 8, 2**62]), cells=np.array([5, 5, 1]),
    )  # fmt: skip
    check(batch, genes, values, masked, 65_535)
    assert batch.samples.tolist() == [7, 8, 2**62] and batch.cells.tolist() == [5, 5, 1]


def test_content_hashes_as_samples_keep_their_64_bits():
    hashes = np.array([2**63 + 5, 1], dtype=np.uint64)
    batch = CellBatch.from_lists([[1], [2]], [[1.0], [1.0]], samples=hashes)
    assert batch.samples.numpy().view(np.uint64).tolist() == [2**63 + 5, 1]


def test_nothing_is_masked_by_default():
    genes, values, _ = cells_of([4, 2], 20)
    batch = CellBatch.from_lists(genes, values)
    check(batch, genes, values, [np.zeros(4, bool), np.zeros(2, bool)])
    assert batch.masked.shape == batch.query_genes.shape == batch.query_index.shape == batch.targets.shape == (0,)
    assert batch.samples.tolist() == batch.cells.tolist() == [0, 1]


def test_everything_masked():
    genes, values, _ = cells_of([4, 1], 20)
    batch = CellBatch.from_lists(genes, values, [np.ones(4, bool), np.ones(1, bool)])
    check(batch, genes, values, [np.ones(4, bool), np.ones(1, bool)])
    assert (batch.values[batch.masked] == MASKED_VALUE).all()


@pytest.mark.parametrize("lengths", [[0], [0, 0], [1], [0, 1, 0], []])
def test_empty_cells_and_batches(lengths):
    genes, values, masked = cells_of(lengths, 20)
    check(CellBatch.from_lists(genes, values, masked), genes, values, masked)


def test_arguments_are_not_changed():
    genes, values, masked = np.array([3, 4]), np.array([1.0, 2.0], dtype=np.float32), np.array([True, True])
    CellBatch.pack(genes, values, np.array([0, 2]), masked)
    assert values.tolist() == [1.0, 2.0] and genes.tolist() == [3, 4]


def test_invariants_on_a_large_batch():
    genes, values, masked = cells_of([512] * 30 + [77], 60_694)
    batch = CellBatch.from_lists(genes, values, masked, cls_token=60_695)
    assert torch.equal(batch.query_genes[batch.query_index.long()], batch.genes[batch.masked.long()])
    assert (batch.query_genes.diff() > 0).all() and (batch.masked.diff() > 0).all()
    assert torch.equal(batch.gene_order.sort().values, torch.arange(len(batch.genes), dtype=torch.int32))
    in_order = batch.genes[batch.gene_order.long()].long() * len(batch.genes) + batch.gene_order
    assert (in_order.diff() > 0).all()  # by gene, then by position: stable
    first = batch.cell_offsets[:-1].long()
    assert (batch.genes[first] == 60_695).all() and (batch.values[first] == 0).all()
    assert not np.isin(batch.masked.numpy(), first.numpy()).any()


def test_moves_as_a_whole():
    genes, values, masked = cells_of([3, 2], 20)
    batch = CellBatch.from_lists(genes, values, masked)
    moved = batch.to("meta")
    assert all(getattr(moved, name).device.type == "meta" for name in DTYPES)
    assert moved.max_tokens == batch.max_tokens
    check(batch.to("cpu"), genes, values, masked)


@pytest.mark.parametrize(
    ("genes", "values", "masked", "message"),
    [
        ([[1]], [], None, "one array a cell"),
        ([[1]], [[1.0]], [], "one array a cell"),
        ([[1], [2, 3]], [[1.0], [1.0]], None, "cell 1"),
        ([[1], [2]], [[1.0], [1.0]], [[True], [True, False]], "cell 1"),
    ],
)
def test_lists_that_do_not_match(genes, values, masked, message):
    with pytest.raises(ValueError, match=message):
        CellBatch.from_lists(genes, values, masked)


@pytest.mark.parametrize(("genes", "offsets", "message"), [
    ([3, -1, 4], [0, 3], "genes holds -1"),
    ([3, 1, 4], [0, 2], "offsets must ascend from 0 to the 3 genes, not from 0 to 2"),
    ([3, 1, 4], [1, 3], "not from 1 to 3"),
    ([3, 1, 4], [0, 3, 2, 3], "offsets must ascend"),
])
def test_what_the_kernels_rely_on_is_checked_where_the_batch_is_made(genes, offsets, message):
    with pytest.raises(ValueError, match=message):
        CellBatch.pack(np.array(genes), np.ones(len(genes)), np.array(offsets))
