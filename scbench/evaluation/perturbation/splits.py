"""What is held out: cells, perturbations, combinations or contexts; keyed by content and names, not by a file's order."""

import hashlib
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np

from scbench.errors import UserError
from scbench.evaluation.perturbation.cells import PerturbedCells
from scbench.evaluation.scores import stratified_folds
from scbench.kernels import random

CELLS, PERTURBATION, COMBINATION, CONTEXT = SPLITS = (
    "unseen-cells", "unseen-perturbation", "unseen-combination", "unseen-context",
)
ALL = "all"  # the stratum of everything
HALVES, INNER_HALVES = 13, 15  # what a key of Stream.EVALUATION decides, as these:
_TARGET_FOLDS, _COMBINATION_FOLDS, _CONTEXT_FOLDS = 10, 11, 12


class Fold(NamedTuple):
    """One division of a study's perturbed cells; a held-out pair has two halves, one of which is scored."""

    train: np.ndarray  # bool [cells], perturbed cells to fit on
    scored: np.ndarray  # bool [cells], the scored halves: of held-out pairs, and of pairs that a prediction is told from
    other: np.ndarray  # bool [cells], the other halves of held-out pairs
    pairs: np.ndarray  # int64, the held-out pairs
    strata: list[str]  # of each of them


def why_not(cells: PerturbedCells, split: str, folds: int) -> str | None:
    """Why a study cannot be split so; None if it can."""
    if split == PERTURBATION:
        singles = sum(len(targets) == 1 for targets in cells.perturbations)
        return None if singles >= max(folds, 3) else f"{singles} perturbations of one target, {max(folds, 3)} are needed"
    if split == COMBINATION:
        combined = sum(len(targets) > 1 for targets in cells.perturbations)
        return None if combined >= folds else f"{combined} combinations, {folds} are needed"
    if split == CONTEXT:
        shared = [perturbation for perturbation in np.bincount(cells.pair_perturbation) if perturbation > 1]
        return None if shared else "no perturbation in two contexts"
    smallest = np.bincount(cells.pair[cells.pair >= 0]).min()
    return None if smallest >= 4 * folds else f"{smallest} cells in a group, {4 * folds} are needed for {folds} folds"


def make_folds(cells: PerturbedCells, split: str, folds: int, seed: int, repetition: int) -> Iterator[Fold]:
    """The folds of one repetition; every held-out cell, perturbation, combination or context is held out once.

    UserError if nothing would be left to train on.
    """
    pair = cells.pair
    half = halves(pair, cells.hashes, seed, repetition)
    if split == CELLS:
        fold = np.full(len(pair), -1)
        perturbed = np.flatnonzero(pair >= 0)
        fold[perturbed] = stratified_folds(pair[perturbed], cells.hashes[perturbed], folds, seed, repetition)
        for number in range(folds):
            held = fold == number
            half = halves(np.where(held, pair, -1), cells.hashes, seed, repetition)
            pairs = np.arange(len(cells.pair_context))
            yield Fold((fold >= 0) & ~held, half, held & ~half, pairs, [ALL] * len(pairs))
        return
    for train_pairs, pairs, strata in _pair_folds(cells, split, folds, seed, repetition):
        if not len(train_pairs):
            study = f" of {cells.study}" if cells.study else ""
            raise UserError(f"a fold of {split} holds out every perturbation{study}, because all share a target: choose "
                            "another --split or more --folds.")
        other = np.isin(pair, pairs) & ~half
        yield Fold(np.isin(pair, train_pairs), half, other, pairs, strata)


def halves(group: np.ndarray, hashes: np.ndarray, seed: int, repetition: int, purpose: int = HALVES) -> np.ndarray:
    """Every second cell of each group in a random order, bool [cells]; False for cells of none (−1)."""
    key = random.key(seed, random.Stream.EVALUATION, purpose, repetition)
    order = np.lexsort((random.bits(key, hashes), group))
    ranked = group[order]
    first = np.searchsorted(ranked, ranked)
    chosen = np.empty(len(group), dtype=bool)
    chosen[order] = (np.arange(len(group)) - first) % 2 == 1
    return chosen & (group >= 0)


def _pair_folds(
    cells: PerturbedCells, split: str, folds: int, seed: int, repetition: int
) -> Iterator[tuple[np.ndarray, np.ndarray, list[str]]]:
    """Training pairs, held-out pairs and the strata of the latter."""
    targets = [cells.perturbations[number] for number in cells.pair_perturbation]
    if split == CONTEXT:
        fold = _deal(cells.contexts, min(folds, len(cells.contexts)), seed, _CONTEXT_FOLDS, repetition)
        context_fold = np.array([fold[name] for name in cells.contexts])[cells.pair_context]
        for number in range(max(fold.values()) + 1):
            train = np.flatnonzero(context_fold != number)
            known = np.isin(cells.pair_perturbation, cells.pair_perturbation[train])
            held = np.flatnonzero((context_fold == number) & known)
            if len(held):
                yield train, held, [ALL] * len(held)
        return
    names = sorted({target for one in cells.perturbations for target in one})
    if split == PERTURBATION:  # only single targets are held out, so that folds hold as many of them as can be
        names = [target for target in names if (target,) in set(cells.perturbations)]
    fold = _deal(names, folds, seed, _TARGET_FOLDS, repetition)
    combined = ["+".join(one) for one in cells.perturbations if len(one) > 1]
    combination_fold = _deal(combined, folds, seed, _COMBINATION_FOLDS, repetition)
    for number in range(folds):
        free = np.array([all(fold.get(target) != number for target in one) for one in targets])
        if split == PERTURBATION:
            held = np.flatnonzero([len(one) == 1 and fold[one[0]] == number for one in targets])
            yield np.flatnonzero(free), held, [ALL] * len(held)
            continue
        mine = np.array([len(one) > 1 and combination_fold["+".join(one)] == number for one in targets])
        train, held = np.flatnonzero(free & ~mine), np.flatnonzero(mine)
        singles = {targets[pair][0] for pair in train if len(targets[pair]) == 1}
        strata = [f"{sum(t in singles for t in targets[pair])} of {len(targets[pair])} singles seen" for pair in held]
        yield train, held, strata


def _deal(names: Sequence[str], folds: int, seed: int, purpose: int, repetition: int) -> dict[str, int]:
    """The fold of each name: dealt round in a random order of the names' hashes."""
    hashes = [int.from_bytes(hashlib.sha256(name.encode()).digest()[:8], "little") for name in names]
    key = random.key(seed, random.Stream.EVALUATION, purpose, repetition)
    order = np.argsort(random.bits(key, np.array(hashes, dtype=np.uint64)), kind="stable")
    return {names[place]: rank % folds for rank, place in enumerate(order.tolist())}
