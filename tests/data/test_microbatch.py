"""How a rank's cells are shared among micro-batches."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from scbench.data.microbatch import balance, micro_steps
from scbench.errors import UserError


@given(st.integers(1, 300), st.integers(1, 40), st.one_of(st.none(), st.integers(1, 300)), st.integers(0, 10**6))
def test_every_rank_fits_in_the_same_number_of_micro_batches(batch_cells, world, micro_batch_cells, seed):
    if batch_cells < world:
        with pytest.raises(UserError, match=f"--batch-cells is {batch_cells}, fewer than the {world} ranks"):
            micro_steps(batch_cells, world, micro_batch_cells)
        return
    steps = micro_steps(batch_cells, world, micro_batch_cells)
    rng = np.random.default_rng(seed)
    for rank in range(world):
        n = (rank + 1) * batch_cells // world - rank * batch_cells // world
        tokens = rng.integers(1, 514, n)
        shares = balance(tokens, steps, micro_batch_cells)
        assert len(shares) == steps
        assert np.array_equal(np.sort(np.concatenate(shares)), np.arange(n))
        for share in shares:
            assert len(share) > 0 and (np.diff(share) > 0).all()
            if micro_batch_cells is not None and not (micro_batch_cells == 1 and batch_cells % world):
                assert len(share) <= micro_batch_cells


def test_steps_are_no_more_than_needed():
    expected = {(1, None): 1, (1, 128): 1, (1, 127): 2, (2, 32): 2, (3, 16): 3, (128, 1): 1}
    assert {pair: micro_steps(128, *pair) for pair in expected} == expected
    assert micro_steps(10, 4, 1) == 2  # ranks of 2 and 3 cells: one micro-batch holds two, rather than one none


def test_tokens_come_out_even():
    rng = np.random.default_rng(0)
    tokens = np.where(rng.random(64) < 0.5, 513, rng.integers(20, 100, 64))
    loads = [tokens[share].sum() for share in balance(tokens, 4, 16)]
    assert max(loads) - min(loads) < 0.02 * sum(loads)
    in_order = tokens.reshape(4, 16).sum(1)
    assert max(loads) < in_order.max()


def test_longest_first_by_hand():
    shares = balance(np.array([5, 9, 1, 7, 3, 2]), 2, 3)
    assert [share.tolist() for share in shares] == [[1, 4, 5], [0, 2, 3]]  # 9 | 7 5 | 9 3 | 7 5 1, full | 9 3 2


def test_equal_cells_are_dealt_out():
    assert [share.tolist() for share in balance(np.full(6, 513), 3, 2)] == [[0, 3], [1, 4], [2, 5]]
