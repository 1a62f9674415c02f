"""What is held out: cells, perturbations, combinations or contexts; keyed by names, not by a file's order.

Which fold a unit is in is drawn from the names in obs alone: the same for all models, whichever cells these leave out.
"""

from collections.abc import Iterable, Iterator, Sequence
from typing import NamedTuple

import numpy as np

from scbench.errors import UserError
from scbench.evaluation.perturbation.cells import NamedCells, PerturbedCells, large_pairs
from scbench.evaluation.scores import stratified_folds
from scbench.evaluation.split_files import Split, unit_hash, unit_hashes
from scbench.kernels import random

CELLS, PERTURBATION, COMBINATION, CONTEXT = SPLITS = (
    "unseen-cells", "unseen-perturbation", "unseen-combination", "unseen-context",
)
UNITS = {CELLS: "cell", PERTURBATION: "perturbation", COMBINATION: "combination", CONTEXT: "context"}
SMALLEST_HELD = 4  # cells of a pair in a fold of cells: two in each half
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
    number: int


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
    needed = SMALLEST_HELD * folds
    return None if smallest >= needed else f"{smallest} cells in a group, {needed} are needed for {folds} folds"


def draw_split(
    named: NamedCells, split: str, folds: int, seeds: int, seed: int, *, dataset: str, column: str
) -> Split:
    """Deal the units of every study to folds, `seeds` times: single targets; targets and combinations; contexts; or cells,
    evenly of each pair. Units of groups that are too small in the file have no fold."""
    names, dealt, numbers = [], [], [folds]
    for study in sorted(set(named.studies) - {None}):
        rows = np.array([
            row for row, (targets, context) in enumerate(zip(named.targets, named.contexts, strict=True))
            if named.studies[row] == study and targets is not None and context is not None
        ], dtype=np.int64)
        pairs = large_pairs(named.targets[rows], named.contexts[rows])[0]
        if split == CELLS:
            number = {pair: place for place, pair in enumerate(pairs)}
            codes = np.array([number.get((named.targets[row], named.contexts[row]), -1) for row in rows])
            ids, codes = named.ids[rows[codes >= 0]], codes[codes >= 0]
            names += ids.tolist()
            dealt.append([stratified_folds(codes, unit_hashes(ids), folds, seed, repetition) for repetition in range(seeds)])
            continue
        perturbations = sorted({targets for targets, _ in pairs})
        for units, purpose in {
            PERTURBATION: [([one[0] for one in perturbations if _is_single(one)], _TARGET_FOLDS)],
            COMBINATION: [(sorted({target for one in perturbations for target in one}), _TARGET_FOLDS),
                          (["+".join(one) for one in perturbations if _is_combined(one)], _COMBINATION_FOLDS)],
            CONTEXT: [(sorted({context for _, context in pairs}), _CONTEXT_FOLDS)],
        }[split]:
            most = max(2, min(folds, len(units))) if split == CONTEXT else folds
            numbers.append(most)
            names += [_unit(study, unit) for unit in units]
            dealt.append([_deal(units, most, seed, purpose, repetition) for repetition in range(seeds)])
    number = max(numbers[1:], default=folds)
    return Split.of("perturbation", dataset, column, split, number, UNITS[split], names, np.concatenate(dealt, axis=1))


def make_folds(cells: PerturbedCells, split: Split, seed: int, repetition: int) -> Iterator[Fold]:
    """The folds of one repetition; every held-out cell, perturbation, combination or context is held out once.

    `seed`: of the halves. UserError if a unit has no fold, or if nothing would be left to train on.
    """
    pair = cells.pair
    half = halves(pair, cells.hashes, seed, repetition)
    if split.protocol == CELLS:
        fold = np.full(len(pair), -1)
        perturbed = np.flatnonzero(pair >= 0)
        fold[perturbed] = _folds_of(split, cells, cells.ids[perturbed], repetition)
        for number in range(split.folds):
            held = fold == number
            pairs = np.flatnonzero(np.bincount(pair[held], minlength=len(cells.pair_context)) >= SMALLEST_HELD)
            held &= np.isin(pair, pairs)
            half = halves(np.where(held, pair, -1), cells.hashes, seed, repetition)
            if len(pairs):
                yield Fold((fold >= 0) & (fold != number), half, held & ~half, pairs, [ALL] * len(pairs), number)
        return
    for number, train_pairs, pairs, strata in _pair_folds(cells, split, repetition):
        if not len(train_pairs):
            study = f" of {cells.study}" if cells.study else ""
            raise UserError(f"a fold of {split.protocol} holds out every perturbation{study}, because all share a target: "
                            "choose another --split or more --folds.")
        other = np.isin(pair, pairs) & ~half
        yield Fold(np.isin(pair, train_pairs), half, other, pairs, strata, number)


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
    cells: PerturbedCells, split: Split, repetition: int
) -> Iterator[tuple[int, np.ndarray, np.ndarray, list[str]]]:
    """The number of each fold that holds something out, training pairs, held-out pairs and the strata of the latter."""
    targets = [cells.perturbations[number] for number in cells.pair_perturbation]
    if split.protocol == CONTEXT:
        context_fold = _folds_of(split, cells, cells.contexts, repetition)[cells.pair_context]
        for number in range(split.folds):
            train = np.flatnonzero(context_fold != number)
            known = np.isin(cells.pair_perturbation, cells.pair_perturbation[train])
            held = np.flatnonzero((context_fold == number) & known)
            if len(held):
                yield number, train, held, [ALL] * len(held)
        return
    held_out = list(filter(_is_combined if split.protocol == COMBINATION else _is_single, cells.perturbations))
    fold_of = dict(zip(held_out, _folds_of(split, cells, map("+".join, held_out), repetition), strict=True))
    fold = {target: split.fold.get(unit_hash(_unit(cells.study, target)), {repetition: -1})[repetition]
            for one in cells.perturbations for target in one}  # a target that is never held out has none
    for number in range(split.folds):
        free = np.array([all(fold[target] != number for target in one) for one in targets])
        held = np.array([fold_of.get(one) == number for one in targets])
        train, pairs = np.flatnonzero(free & ~held), np.flatnonzero(held)
        singles = {targets[pair][0] for pair in train if len(targets[pair]) == 1}
        strata = [
            f"{sum(t in singles for t in targets[pair])} of {len(targets[pair])} singles seen"
            if split.protocol == COMBINATION else ALL for pair in pairs
        ]
        if len(pairs):
            yield number, train, pairs, strata


def _is_single(targets: tuple[str, ...]) -> bool:
    return len(targets) == 1


def _is_combined(targets: tuple[str, ...]) -> bool:
    return len(targets) > 1


def _unit(study: str, name: str) -> str:
    """What a unit is called in a split."""
    return f"{study} / {name}" if study else name


def _folds_of(split: Split, cells: PerturbedCells, names: Iterable[str], repetition: int) -> np.ndarray:
    """The folds of units of a study, int64 [units]; UserError if one has none."""
    study = "" if split.protocol == CELLS else cells.study  # ids are distinct in the whole file
    return split.folds_of([_unit(study, name) for name in names], cells.study or "the file")[repetition]


def _deal(names: Sequence[str], folds: int, seed: int, purpose: int, repetition: int) -> np.ndarray:
    """The fold of each name, int64 [names]: dealt round in a random order of the names' hashes."""
    key = random.key(seed, random.Stream.EVALUATION, purpose, repetition)
    fold = np.empty(len(names), dtype=np.int64)
    fold[np.argsort(random.bits(key, unit_hashes(names)), kind="stable")] = np.arange(len(names)) % folds
    return fold
