"""What takes part in a classification benchmark: cells, folds, embeddings and the predictions of others."""

from typing import NamedTuple

import numpy as np

from scbench.data.sources.anndata import AnnDataSource
from scbench.errors import UserError
from scbench.evaluation.entrants import Checked, Entrant, check, embed_all
from scbench.evaluation.external import ExternalEmbedding
from scbench.evaluation.folds import FEWEST_FOLDS, TASK, Parts, draw_split, parts_of
from scbench.evaluation.labelled_cells import LabelledCells, ReadCells, choose_cells, is_labelled, read_labelled
from scbench.evaluation.split_files import Split


class Taken(NamedTuple):
    """What takes part in a benchmark of several models."""

    read: ReadCells
    cells: LabelledCells
    split: Split
    parts: list[list[Parts]]  # each repetition's folds
    checked: Checked
    predictions: dict[str, np.ndarray]  # classes that others predict, int64 [pretraining seeds, repetitions, cells]


def take_part(
    entrants: list[Entrant], source: AnnDataSource, label: str, group: str | None, split: Split | None, folds: int, seeds: int,
    seed: int, options: dict,
) -> Taken:
    """The cells that take part and their folds, which no model decides, without those that a model has seen. `options`: of
    `check`."""
    read = read_labelled(source, label, group, progress=options["progress"])
    read = read.take(np.argsort(read.keys))  # the file's order means nothing
    if split is None:
        if folds < FEWEST_FOLDS:
            raise UserError(f"{folds} folds cannot train, validate and test: give at least {FEWEST_FOLDS}.")
        split = draw_split(*choose_cells(read, label), label, group, folds, seeds, seed)
    else:
        split.check(TASK, label, "cell" if group is None else "group")
    checked = check(entrants, source, is_labelled(source, label), **options)
    kept, cells = choose_cells(read, label, checked.seen)
    parts = parts_of(split, kept, cells)
    return Taken(kept, cells, split, parts, checked, _read_predictions(entrants, split, kept, cells))


def embeddings_of(
    entrants: list[Entrant], taken: Taken, source: AnnDataSource, seed: int, progress: bool
) -> dict[str, list[np.ndarray]]:
    """Embeddings of the cells by name, one a pretraining seed, float32 [cells, D]; predictions have none. The untrained twins
    of ours stand behind."""
    found = embed_all(entrants, taken.read.tokens_on, seed, progress) | {
        name: model.values_of(source)[taken.read.rows] for entrant in entrants for name, model in entrant.members
        if isinstance(model, ExternalEmbedding)
    }
    trained = {
        entrant.name: [found.pop(name) for name, _ in entrant.members] for entrant in entrants if not entrant.predicts
    }
    return trained | {name: [twin] for name, twin in found.items()}


def _read_predictions(
    entrants: list[Entrant], split: Split, read: ReadCells, cells: LabelledCells
) -> dict[str, np.ndarray]:
    """What external predictions say, classes as int64 [pretraining seeds, repetitions, cells]."""
    code = {name: number for number, name in enumerate(cells.class_names)}
    found = {}
    for entrant in entrants:
        if entrant.predicts:
            words = [model.read_labels(split, read.ids, cells.class_names) for _, model in entrant.members]
            found[entrant.name] = np.vectorize(code.get, otypes=[np.int64])(np.stack(words))
    return found
