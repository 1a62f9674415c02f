"""Which cells train, validate and test: folds stratified by class, or of whole groups, and the splits that hold them."""

from typing import NamedTuple

import numpy as np

from scbench.errors import UserError
from scbench.evaluation.labelled_cells import LabelledCells, ReadCells
from scbench.evaluation.probes import NEIGHBOURS
from scbench.evaluation.scores import stratified_folds
from scbench.evaluation.split_files import Split, unit_hashes
from scbench.kernels import random
from scbench.kernels.random import Stream

TASK, PROTOCOL = "classification", "default"
FEWEST_FOLDS = 3  # one tests, the next one validates, the others train
DEALS = 20  # ways to deal groups to folds that are tried
_GROUPS = 30  # what a key of Stream.EVALUATION decides


class Parts(NamedTuple):
    """One fold's cells, int64 rows."""

    train: np.ndarray
    validation: np.ndarray
    test: np.ndarray


def draw_split(
    read: ReadCells, cells: LabelledCells, label: str, group: str | None, folds: int, seeds: int, seed: int
) -> Split:
    """Deal the cells, or with a column of groups whole groups, to folds, `seeds` times. There are no more folds than groups.

    Parameters
    ----------
    read, cells
        All that may take part, from `choose_cells`.
    label, group
        Columns of obs.
    """
    if group is None:
        fold = [stratified_folds(cells.classes, cells.keys, folds, seed, repetition) for repetition in range(seeds)]
        return Split.of(TASK, read.source, label, PROTOCOL, folds, "cell", read.ids, np.stack(fold))
    folds = min(folds, len(cells.group_names))
    sizes = np.zeros((len(cells.group_names), len(cells.class_names)))
    np.add.at(sizes, (cells.groups, cells.classes), 1)
    keys = unit_hashes(cells.group_names)
    fold = [group_folds(sizes, keys, folds, seed, repetition) for repetition in range(seeds)]
    return Split.of(TASK, read.source, label, PROTOCOL, folds, "group", cells.group_names, np.stack(fold))


def group_folds(sizes: np.ndarray, keys: np.ndarray, folds: int, seed: int, repetition: int) -> np.ndarray:
    """The fold of each group, int64 [groups]: none is empty, and each class is spread as evenly as a few tries can.

    Groups are dealt in a random order, each to the fold that has least of its classes; of 20 orders the most even deal counts.

    Parameters
    ----------
    sizes
        Cells of each group in each class, [groups, classes].
    keys
        Hashes of the groups' names, uint64 [groups]: their order does not matter.
    """
    key = random.key(seed, Stream.EVALUATION, _GROUPS, repetition)
    shares = sizes / np.maximum(sizes.sum(axis=0), 1)
    best, least = None, np.inf
    for deal in range(DEALS):
        order = np.lexsort((keys, random.bits(random.fold(key, deal), keys)))
        fold, held = np.empty(len(keys), dtype=np.int64), np.zeros((folds, sizes.shape[1]))
        empty = np.ones(folds, dtype=bool)
        for place, number in enumerate(order):
            cost = held @ shares[number]
            if empty.sum() == len(order) - place:  # each of those left has to fill one
                cost[~empty] = np.inf
            chosen = int(np.argmin(cost))
            fold[number] = chosen
            held[chosen] += shares[number]
            empty[chosen] = False
        unevenness = round(float(np.square(held).sum()), 9)  # the order of groups must not decide between equals
        if unevenness < least:
            best, least = fold, unevenness
    return best


def parts_of(split: Split, read: ReadCells, cells: LabelledCells) -> list[list[Parts]]:
    """Each repetition's folds as rows of the cells that take part; UserError if one leaves too little to fit or choose on."""
    if split.unit == "group":
        fold = split.folds_of(cells.group_names, read.source)[:, cells.groups]
    else:
        fold = split.folds_of(read.ids, read.source)
    parts = [[fold_parts(of, number, split.folds) for number in range(split.folds)] for of in fold]
    for one in (one for repetition in parts for one in repetition if len(one.test)):
        check_parts(one, cells, read.source)
    return parts


def fold_parts(fold: np.ndarray, number: int, folds: int) -> Parts:
    """Fold `number` tests, the next one validates, the others train. `fold`: int64 [cells]."""
    test, validation = fold == number, fold == (number + 1) % folds
    return Parts(*(np.flatnonzero(rows) for rows in (~test & ~validation, validation, test)))


def check_parts(parts: Parts, cells: LabelledCells, source: str) -> None:
    """UserError if the training cells are too few for k-NN or of one class, or if no cell validates."""
    n = len(cells.classes)
    if len(parts.train) < NEIGHBOURS:
        raise UserError(f"{source}: {n} cells leave {len(parts.train)} to train on in a fold, fewer than the {NEIGHBOURS} "
                        "that k-NN needs: give more labelled cells or change --folds.")
    classes = np.unique(cells.classes[parts.train])
    if len(classes) < 2:
        raise UserError(f"{source}: all training cells of a fold are {cells.class_names[classes[0]]!r}: split by another "
                        "--group or change --folds.")
    if not len(parts.validation):
        raise UserError(f"{source}: no cell of a fold is left for validation: give more labelled cells or change --folds.")

