"""Validation batches against a slow oracle, for any ranks and batches."""

from fake_split import CLS_TOKEN, OPTIONS, FakeSplit, cells_of, oracle_cell, validation
from hypothesis import given, settings
from hypothesis import strategies as st

from scbench.kernels import random
from scbench.kernels.random import Stream


def test_validation_equals_the_slow_oracle():
    split = FakeSplit(300, 64)
    seed = random.key(7, Stream.VALIDATION)
    expected = [
        oracle_cell(split, n, n, seed=seed, max_genes=20, mask_ratio=0.4, weighted_share=0.0) for n in range(100)
    ]
    batches = validation(split)
    assert [record for batch in batches for record in cells_of(batch)] == expected
    assert max(batch.n_cells for batch in batches) <= 16
    assert all(batch.denominator.item() == len(batch.masked) for batch in batches)
    assert split.reads == [0, 1]


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 200), st.integers(1, 150), st.integers(1, 50), st.integers(1, 8))
def test_validation_is_the_same_for_any_ranks_and_batches(n_cells, max_cells, batch_cells, world):
    split = FakeSplit(n_cells, 17, (0, 25))
    expected = [record for batch in validation(split, max_cells=max_cells) for record in cells_of(batch)]
    assert [record[1] for record in expected] == list(range(min(n_cells, max_cells)))
    shares = [
        validation(split, max_cells=max_cells, batch_cells=batch_cells, rank=rank, world=world) for rank in range(world)
    ]
    assert len({len(share) for share in shares}) == 1  # ZeRO-3 gathers weights in every forward pass
    records = [record for share in shares for batch in share for record in cells_of(batch)]
    assert [record for record in records if record[1] >= 0] == expected
    placeholders = [batch for share in shares for batch in share if batch.cells.tolist() == [-1]]
    assert len(placeholders) == max(0, world - len(expected))
    assert all(len(batch.masked) == 0 and batch.genes.tolist() == [CLS_TOKEN] for batch in placeholders)
    if batch_cells > 1:
        assert all(batch.n_cells <= batch_cells for share in shares for batch in share)


def test_validation_differs_from_training_and_by_seed():
    split = FakeSplit(64, 64, (40, 40))
    base = validation(split)
    assert [cells_of(batch) for batch in validation(split)] == [cells_of(batch) for batch in base]
    assert cells_of(validation(split, seed=8)[0]) != cells_of(base[0])
    law = {name: OPTIONS[name] for name in ("seed", "mask_ratio")}
    assert cells_of(base[0])[0] != oracle_cell(split, 0, 0, weighted_share=0.0, **law)


def test_an_empty_validation_split_yields_nothing():
    assert validation(FakeSplit(0, 64), world=2) == []
