"""What takes part in a classification benchmark: models by name, cells, folds, embeddings and the predictions of others."""

import re
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np

from scbench.data.sources.anndata import AnnDataSource
from scbench.errors import UserError
from scbench.evaluation import embed
from scbench.evaluation.classification.probing import DEPTH, GENES, MAJORITY, PCA, SCVI
from scbench.evaluation.entrants import MODEL, UNTRAINED, Model, untrained_name, untrained_twin
from scbench.evaluation.external import ExternalEmbedding, ExternalPredictions
from scbench.evaluation.folds import FEWEST_FOLDS, TASK, Parts, draw_split, parts_of
from scbench.evaluation.labelled_cells import (
    NOT_CHECKABLE,
    Guarded,
    LabelledCells,
    ReadCells,
    choose_cells,
    guard,
    match,
    read_labelled,
)
from scbench.evaluation.progress import progress_bar
from scbench.evaluation.split_files import Split
from scbench.models.model import ExpressionModel

_TAKEN_NAME = re.compile(f"({'|'.join((UNTRAINED, DEPTH, GENES, MAJORITY, SCVI))}|{PCA}( [0-9]+)?)")

Models = Mapping[str, Sequence[Model]]  # by name, each with its pretraining seeds


class Taken(NamedTuple):
    """What takes part in a benchmark of several models."""

    read: ReadCells
    cells: LabelledCells
    split: Split
    parts: list[list[Parts]]  # each repetition's folds
    guards: dict[str, list[Guarded]]  # of each model's pretraining seeds
    matchings: dict[str, dict]  # which genes and counts models know, by the fingerprint of their vocabulary
    predictions: dict[str, np.ndarray]  # classes that others predict, int64 [pretraining seeds, repetitions, cells]

    def about(self, model: Model, name: str, number: int) -> dict:
        """What a model is and what it knows of the cells, JSON-able."""
        guarded = self.guards[name][number]
        about = {"provenance": model.provenance, "overlap": guarded.overlap, "seen": guarded.seen}
        if isinstance(model, ExpressionModel):
            about |= {"fingerprint": embed.fingerprint(model), "gene_matching": self.matchings[model.vocabulary.fingerprint]}
        return about


def named(models: Model | Models) -> Models:
    """By name; a single one of ours is the "trained model". UserError if there is none, or one bears that of a baseline."""
    if not isinstance(models, Mapping):
        models = {MODEL if isinstance(models, ExpressionModel) else models.name: [models]}
    if not models:
        raise UserError("no model is given: give at least one.")
    for name in models:
        if _TAKEN_NAME.fullmatch(name):
            raise UserError(f"a model cannot be called {name!r}, as a baseline is: give it another name.")
    return models


def each_of(models: Models) -> list[Model]:
    """All of them."""
    return [model for several in models.values() for model in several]


def take_part(
    models: Models, source: AnnDataSource, label: str, group: str | None, split: Split | None, folds: int, seeds: int,
    seed: int, options: dict,
) -> Taken:
    """The cells that take part and their folds, which no model decides, without those that a model has seen."""
    known = {model.vocabulary.fingerprint: model for model in each_of(models) if isinstance(model, ExpressionModel)}
    matchings = {key: match(model, source, options["progress"]) for key, model in known.items()}  # errors first
    read = read_labelled(source, label, group, progress=options["progress"])
    read = read.take(np.argsort(read.keys))  # the file's order means nothing
    if split is None:
        if folds < FEWEST_FOLDS:
            raise UserError(f"{folds} folds cannot train, validate and test: give at least {FEWEST_FOLDS}.")
        split = draw_split(*choose_cells(read, label), label, group, folds, seeds, seed)
    else:
        split.check(TASK, label, "cell" if group is None else "group")
    unknown = Guarded(np.zeros(source.n_cells, dtype=bool), NOT_CHECKABLE, {})
    guards = {
        name: [guard(model, source, label, **options) if isinstance(model, ExpressionModel) else unknown for model in several]
        for name, several in models.items()
    }
    seen = np.any([guarded.cells for several in guards.values() for guarded in several], axis=0)
    kept, cells = choose_cells(read, label, seen)
    parts = parts_of(split, kept, cells)
    return Taken(kept, cells, split, parts, guards, matchings, _read_predictions(models, split, kept, cells))


def embed_all(
    models: Models, taken: Taken, source: AnnDataSource, seed: int, progress: bool
) -> dict[str, list[np.ndarray]]:
    """Embeddings of the cells by name, one a pretraining seed, float32 [cells, D]; predictions have none. The untrained twins
    of ours stand behind."""
    trained, untrained = {}, {}
    for name, several in models.items():
        for model in several:
            if isinstance(model, ExpressionModel):
                networks = [(name, model)]
                if name not in trained:
                    networks.append((untrained_name(name), untrained_twin(model, seed)))
                tokens, hashes = taken.read.tokens_on(model.vocabulary)
                for called, network in networks:
                    with progress_bar(f"embedding, {called}", len(hashes), progress) as advance:
                        embedding = embed.encode(network, tokens, hashes, seed=seed, advance=advance)
                    (trained if called == name else untrained).setdefault(called, []).append(embedding)
            elif isinstance(model, ExternalEmbedding):
                trained.setdefault(name, []).append(model.values_of(source)[taken.read.rows])
    return {**trained, **untrained}


def _read_predictions(
    models: Models, split: Split, read: ReadCells, cells: LabelledCells
) -> dict[str, np.ndarray]:
    """What external predictions say, classes as int64 [pretraining seeds, repetitions, cells]."""
    code = {name: number for number, name in enumerate(cells.class_names)}
    found = {}
    for name, several in models.items():
        if isinstance(several[0], ExternalPredictions):
            words = [each.read_labels(split, read.ids, cells.class_names) for each in several]
            found[name] = np.vectorize(code.get, otypes=[np.int64])(np.stack(words))
    return found
