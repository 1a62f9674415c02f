"""Folds of cells and of whole groups: what they must keep, and what must not matter to them."""

import hashlib

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from scbench.data.sources.anndata import AnnDataSource
from scbench.errors import UserError
from scbench.evaluation.folds import check_parts, draw_split, fold_parts, group_folds, parts_of
from scbench.evaluation.labelled_cells import choose_cells, read_labelled


def dealt(cells, group=None, folds=5, seeds=2, seed=0):
    """The file's cells, and the split."""
    read = read_labelled(AnnDataSource(cells), "type", group)
    return draw_split(*choose_cells(read, "type"), "type", group, folds, seeds, seed)


@pytest.fixture
def donors(cells):
    cells.obs["donor"] = [f"d{i % 8}" for i in range(cells.n_obs)]
    return cells


@settings(deadline=None, max_examples=30)
@given(st.integers(3, 30), st.integers(3, 6), st.integers(0, 3))
def test_groups_are_dealt_whole_and_no_fold_is_empty(groups, folds, seed):
    folds = min(folds, groups)
    generator = np.random.default_rng(groups)
    sizes, keys = generator.integers(0, 40, (groups, 3)), generator.integers(0, 2**63, groups, dtype=np.uint64)
    fold = group_folds(sizes, keys, folds, seed, 0)
    assert set(fold) == set(range(folds))
    order = generator.permutation(groups)
    np.testing.assert_array_equal(group_folds(sizes[order], keys[order], folds, seed, 0), fold[order])


def test_groups_of_one_class_are_spread_over_folds():
    """Ten groups of cells of one class, ten of another: each fold needs two of both."""
    sizes = np.repeat([[50, 0], [0, 30]], 10, axis=0)
    keys = np.random.default_rng(0).integers(0, 2**63, 20, dtype=np.uint64)
    found = [group_folds(sizes, keys, 5, 0, repetition) for repetition in range(3)]
    for fold in found:
        for kind in (slice(0, 10), slice(10, 20)):
            assert np.bincount(fold[kind], minlength=5).tolist() == [2] * 5
    assert (found[0] != found[1]).any()


def test_a_split_holds_every_unit_and_no_order(donors):
    by_cell, by_donor = dealt(donors), dealt(donors, "donor")
    assert (by_cell.unit, by_cell.folds, by_cell.repetitions, len(by_cell.fold)) == ("cell", 5, 2, 120)
    assert (by_donor.unit, by_donor.folds, len(by_donor.fold)) == ("group", 5, 8)
    assert set(by_donor.fold) == {hashlib.sha256(f"d{i}".encode()).hexdigest()[:16] for i in range(8)}
    turned = donors[np.random.default_rng(0).permutation(120)].copy()
    assert dealt(turned) == by_cell
    assert dealt(turned, "donor") == by_donor
    assert dealt(donors, seed=1).fold != by_cell.fold
    assert dealt(donors[donors.obs["donor"] < "d4"].copy(), "donor").folds == 4, "no more folds than groups"


def test_folds_of_cells_stay_when_others_are_left_out(donors):
    """A model's training cells go; the folds were dealt before that."""
    read = read_labelled(AnnDataSource(donors), "type")
    everyone, cells = choose_cells(read, "type")
    split = draw_split(everyone, cells, "type", None, 4, 1, 0)
    seen = np.zeros(120, dtype=bool)
    seen[:25] = True
    kept, left = choose_cells(read, "type", seen)
    assert left.counted["overlapping"] == 25
    (parts,) = parts_of(split, kept, left)
    for number, part in enumerate(parts):
        np.testing.assert_array_equal(np.sort(np.concatenate(part)), np.arange(95))
        assert {split.fold[hashlib.sha256(name.encode()).hexdigest()[:16]][0] for name in kept.ids[part.test]} == {number}
        ids = kept.ids[part.validation]
        assert {split.fold[hashlib.sha256(name.encode()).hexdigest()[:16]][0] for name in ids} == {(number + 1) % 4}


def test_whole_groups_are_held_out(donors):
    read = read_labelled(AnnDataSource(donors), "type", "donor")
    kept, cells = choose_cells(read, "type")
    for parts in (one for repetition in parts_of(dealt(donors, "donor"), kept, cells) for one in repetition):
        names = [set(kept.groups[rows]) for rows in parts]
        assert names[0] and names[1] and names[2]
        assert not (names[0] & names[1] or names[0] & names[2] or names[1] & names[2])


def test_folds_that_leave_too_little_are_one_sentence(donors):
    _, cells = choose_cells(read_labelled(AnnDataSource(donors), "type"), "type")
    fold = np.arange(120) % 3
    with pytest.raises(UserError, match=r"f: 120 cells leave 9 to train on in a fold, fewer than the 10"):
        check_parts(fold_parts(np.where(np.arange(120) < 9, 2, np.arange(120) % 2), 0, 3), cells, "f")
    parts = fold_parts(fold, 0, 3)
    with pytest.raises(UserError, match=r"all training cells of a fold are 'gamma'"):  # the planted types take turns
        check_parts(parts, cells, "f")
    with pytest.raises(UserError, match=r"no cell of a fold is left for validation"):
        check_parts(parts._replace(train=np.arange(60), validation=np.arange(0)), cells, "f")
