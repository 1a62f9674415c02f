"""Nothing that is held out is trained on, and everything is held out once."""

import hashlib

import numpy as np
import pytest

from scbench.errors import UserError
from scbench.evaluation.perturbation.splits import SPLITS, halves, make_folds, why_not
from scbench.evaluation.split_files import read_split

SINGLES = [f"GENE{i}" for i in range(8)]
COMBINED = ["GENE0+GENE1", "GENE2+GENE3", "GENE4+GENE5", "GENE0+GENE6", "GENE1+GENE7", "GENE2+GENE20"]


@pytest.fixture
def file(planted):
    return planted([*SINGLES, *COMBINED], cells=20, contexts=("a", "b", "c"), controls=20)


@pytest.fixture
def cells(file, read):
    return read(file)


@pytest.mark.parametrize("split", SPLITS)
def test_folds(file, cells, divide, split):
    folds = list(make_folds(cells, divide(file, split, 4), seed=3, repetition=0))
    names = [cells.perturbations[number] for number in cells.pair_perturbation]
    held = np.concatenate([fold.pairs for fold in folds])
    for fold in folds:
        assert not (fold.train & cells.controls).any()
        assert not (fold.scored & fold.other).any()
        assert not (fold.train & fold.other).any()
        in_held = np.isin(cells.pair, fold.pairs)
        assert not (fold.train & fold.scored & in_held).any()
        for pair in fold.pairs:
            sizes = [(half & (cells.pair == pair)).sum() for half in (fold.scored, fold.other)]
            assert min(sizes) >= 2
            assert abs(sizes[0] - sizes[1]) <= 1
        trained = [names[pair] for pair in np.unique(cells.pair[fold.train])]
        if split == "unseen-perturbation":
            assert {names[pair][0] for pair in fold.pairs}.isdisjoint({target for name in trained for target in name})
        if split == "unseen-combination":
            assert {names[pair] for pair in fold.pairs}.isdisjoint(trained)
            singles = {name[0] for name in trained if len(name) == 1}
            assert fold.strata == [f"{sum(t in singles for t in names[p])} of 2 singles seen" for p in fold.pairs]
            for pair in fold.pairs:  # a target whose single is not seen is in no training combination either
                unseen = set(names[pair]) - singles - {"GENE20"}  # its single was never made
                assert unseen.isdisjoint({target for name in trained for target in name})
        if split == "unseen-context":
            assert set(cells.pair_context[fold.pairs]).isdisjoint(cells.context[fold.train])
    expected = {
        "unseen-cells": list(range(len(names))) * 4,
        "unseen-perturbation": [pair for pair, name in enumerate(names) if len(name) == 1],
        "unseen-combination": [pair for pair, name in enumerate(names) if len(name) == 2],
        "unseen-context": range(len(names)),
    }[split]
    assert sorted(held) == sorted(expected)


def test_held_out_cells_are_held_out_once(file, cells, divide):
    folds = list(make_folds(cells, divide(file, "unseen-cells", 4), seed=3, repetition=0))
    held = np.sum([fold.scored.astype(int) + fold.other for fold in folds], axis=0)
    assert (held == (cells.pair >= 0)).all()
    for fold in folds:
        assert ((fold.train | fold.scored | fold.other) == (cells.pair >= 0)).all()


def test_strata_come_in_several_kinds(file, cells, divide):
    split = divide(file, "unseen-combination", 3, seeds=4)
    seen = {stratum for repetition in range(4) for fold in make_folds(cells, split, 0, repetition) for stratum in fold.strata}
    assert {"1 of 2 singles seen", "2 of 2 singles seen"} <= seen


def test_the_order_of_a_file_decides_nothing(planted, read, divide):
    file = planted(SINGLES, cells=20, controls=20)
    order = np.random.default_rng(0).permutation(file.n_obs)
    first, second = read(file), read(file[order])
    for protocol in ("unseen-cells", "unseen-perturbation"):
        split = divide(file, protocol, 3)
        assert divide(file[order], protocol, 3).digest == split.digest
        for one, other in zip(make_folds(first, split, 0, 1), make_folds(second, split, 0, 1), strict=True):
            assert (one.pairs == other.pairs).all()
            assert set(first.hashes[one.train]) == set(second.hashes[other.train])
            assert set(first.hashes[one.scored]) == set(second.hashes[other.scored])


def test_halves_are_even_and_change_with_the_repetition():
    group, hashes = np.repeat([0, 1, -1], [10, 21, 5]), np.random.default_rng(0).integers(0, 2**63, 36).astype(np.uint64)
    half = halves(group, hashes, 0, 0)
    assert (half[:10].sum(), half[10:31].sum(), half[31:].sum()) == (5, 10, 0)
    assert (half != halves(group, hashes, 0, 1)).any()


def test_combinations_that_all_share_a_target_leave_nothing_to_train_on(planted, read, divide):
    file = planted(["GENE0+GENE1", "GENE0+GENE2", "GENE0+GENE3"], cells=20, controls=20)
    with pytest.raises(UserError, match="holds out every perturbation, because all share a target"):
        list(make_folds(read(file), divide(file, "unseen-combination", 3), 0, 0))


def test_what_a_model_leaves_out_moves_nothing(planted, read, divide):
    """Perturbations that are refused, or cells that were seen, change no other unit's fold."""
    file = planted([*SINGLES, *COMBINED], cells=30, contexts=("a", "b"), controls=30)
    fewer = read(file[(file.obs["condition"] != "GENE3") & (np.arange(file.n_obs) % 9 != 0)].copy())
    for protocol in SPLITS:
        split = divide(file, protocol, 3)
        held = [
            {(cells.ids[row], fold.number) for fold in make_folds(cells, split, 0, 1)
             for row in np.flatnonzero(np.isin(cells.pair, fold.pairs) & (fold.scored | fold.other))}
            for cells in (read(file), fewer)
        ]
        assert held[1] < held[0]


def test_the_folds_of_a_file_can_be_given_and_must_know_all_units(file, cells, divide, tmp_path):
    split = divide(file, "unseen-cells", 4)
    split.write(tmp_path / "split.json")
    again = read_split(tmp_path / "split.json")
    assert again == split
    assert set(again.fold) == {hashlib.sha256(one.encode()).hexdigest()[:16] for one in cells.ids[cells.pair >= 0]}
    del again.fold[hashlib.sha256(cells.ids[cells.pair >= 0][5].encode()).hexdigest()[:16]]
    with pytest.raises(UserError, match=r"has no fold for 1 of .* cells of the file"):
        list(make_folds(cells, again, 0, 0))


def test_what_cannot_be_split(planted, read):
    few = read(planted(["GENE0", "GENE1"], cells=20, controls=20))
    assert "2 perturbations of one target, 3 are needed" in why_not(few, "unseen-perturbation", 3)
    assert "0 combinations" in why_not(few, "unseen-combination", 2)
    assert "no perturbation in two contexts" in why_not(few, "unseen-context", 2)
    assert "20 cells in a group, 24 are needed" in why_not(few, "unseen-cells", 6)
    assert why_not(few, "unseen-cells", 5) is None
