"""Sums by key: the search finds every run, wherever it lies and however long it is."""

import pytest
import torch

from scbench.kernels.segments import SHORT, segment_sums

N_KEYS = 7
LONG = SHORT.value + 1


def check(keys: list[int], width: int):
    """Rows are small whole numbers, so that every order of the sums gives the same."""
    keys = torch.tensor(keys, dtype=torch.int32)
    rows = torch.randint(-9, 9, (len(keys), width), generator=torch.Generator().manual_seed(len(keys))).float()
    sums = segment_sums(rows, keys, torch.argsort(keys, stable=True).int(), N_KEYS, torch.float32)
    assert torch.equal(sums, torch.zeros(N_KEYS, width).index_add(0, keys, rows))


@pytest.mark.parametrize("keys", [
    [], [0], [3], [6], [0, 6], [6, 0] * LONG, [3] * 50, [6] * LONG, [0] * (LONG - 1), [5, 1, 5, 2] * LONG, list(range(7)) * 5,
], ids=lambda keys: f"{len(keys)}: {keys[:4]}")  # fmt: skip
@pytest.mark.parametrize("width", [3, 1000])  # one program, and four of which the last has one key too many
def test_runs_at_both_ends_short_and_long(keys, width):
    check(keys, width)


def test_any_number_of_elements():
    for n in range(35):
        check(torch.randint(N_KEYS, (n,), generator=torch.Generator().manual_seed(n)).tolist(), 2)
