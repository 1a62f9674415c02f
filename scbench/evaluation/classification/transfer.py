"""Benchmark by label transfer: labels of one file are learnt, those of another are predicted and scored.

Everything is fitted on four fifths of the labelled cells of the first file, strengths are chosen on the fifth part: k-NN and
a linear probe on frozen embeddings, and the baselines, on the genes that both files measured. Intervals come from a bootstrap
over the cells of the second file.
"""

from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import anndata
import numpy as np
import scipy.sparse

from scbench.config import Values
from scbench.data.gene_identity import gene_keys, map_genes
from scbench.data.sources.anndata import AnnDataSource
from scbench.data.vocabulary import Vocabulary
from scbench.errors import UserError
from scbench.evaluation import embed, leakage, probes
from scbench.evaluation.classification import report
from scbench.evaluation.classification.benchmark import embed_cells, origin
from scbench.evaluation.classification.probing import depth_r2, predict, strengths_of
from scbench.evaluation.classification.report import BASELINE_KIND, COLUMNS, MODEL_KIND
from scbench.evaluation.classification.selection import GRID
from scbench.evaluation.entrants import MODEL, UNTRAINED, untrained_twin
from scbench.evaluation.fingerprint_cells import fingerprint_cells
from scbench.evaluation.folds import TASK, Parts, check_parts
from scbench.evaluation.guard import UNSEEN
from scbench.evaluation.labelled_cells import ModelCells, read_cells, read_unseen
from scbench.evaluation.reference_cells import described, values_sentences
from scbench.evaluation.report import Table
from scbench.evaluation.scores import RESAMPLES, score, stratified_folds
from scbench.models.model import ExpressionModel

PROTOCOL = "transfer"
VALIDATION_FOLDS = 5  # of the file that is learnt; one of them is for validation
Cells = AnnDataSource | anndata.AnnData | Path | str


class SharedGenes(NamedTuple):
    """Which gene each column of two files is, among those that both have; −1: another one. int64 [columns]."""

    train: np.ndarray
    test: np.ndarray
    number: int


def benchmark_transfer(
    model: ExpressionModel,
    train: Cells,
    test: Cells,
    label: str,
    *,
    values: Values = "counts",
    layer: str | None = None,
    genes_column: str | None = None,
    max_overlap: float = 0.01,
    allow_overlap: bool = False,
    seed: int = 0,
    progress: bool = False,
) -> Table:
    """The table of one model that learns the labels of `train` and predicts those of `test`.

    Parameters
    ----------
    model
        The pretrained model; it stays frozen.
    train, test
        Raw counts and labels.
    label
        Column of obs of both. Missing labels and exact duplicates are left out; so are classes under 10 cells of `train`, and
        cells of `test` whose class `train` does not have: these are counted.
    layer, genes_column
        As in `scbench.embed`, for both.
    max_overlap
        Refuse if the model was trained or validated on a larger share of the labelled cells of `test`, or if a larger share of
        them is in `train`, exactly or counted again (see `scbench.find_seen_cells`). Up to it, such cells are left out.
    allow_overlap
        Keep them; the rows are then marked "transductive".
    seed
        Of the bootstrap, the gene draws and the untrained model.
    progress
        Show a progress bar if on a terminal.

    Raises
    ------
    UserError
        If the labels can't be used, the files share too few genes, or too few cells remain.
    """
    options = {"layer": layer, "genes_column": genes_column, "values": values}
    with embed.opened(train, **options) as first, embed.opened(test, **options) as second:
        learnt = read_cells(model, first, label, max_overlap=1, allow_overlap=True, progress=progress)
        fold = stratified_folds(learnt.classes, learnt.keys, VALIDATION_FOLDS, seed, 0)
        fitted, aside = np.flatnonzero(fold != 0), np.flatnonzero(fold == 0)
        check_parts(Parts(fitted, aside, aside), learnt, first.name)
        genes = share_genes(first, second)
        scored = _read_scored(
            model, learnt, first, second, label, max_overlap=max_overlap, allow_overlap=allow_overlap, progress=progress
        )
        names, sources = (first.name, second.name), {"train": described(first), "test": described(second)}
        spoken_values = list(dict.fromkeys([*values_sentences(first), *values_sentences(second)]))
    both = replace(
        scored,
        counts=scipy.sparse.vstack([_columns(learnt.counts, genes.train, genes.number),
                                    _columns(scored.counts, genes.test, genes.number)], format="csr"),
        classes=np.concatenate([learnt.classes, scored.classes]),
    )
    embeddings = {
        name: [np.concatenate([embed_cells(network, cells, seed, progress and f"embedding, {name}")
                               for cells in (learnt, scored)])]
        for name, network in [(MODEL, model), (UNTRAINED, untrained_twin(model, seed))]
    }
    asked = np.arange(len(learnt.classes), len(both.classes))
    found = predict(both, embeddings, [[Parts(fitted, aside, asked)]], seed, progress)
    r2 = depth_r2(both, found.depths, asked)
    predictions = {method: each[0][:, asked] for method, each in found.predictions.items()}
    scores = score(scored.classes, predictions, seed)
    given = {"task": TASK, "dataset": f"{names[0]} → {names[1]}", "label": label, "protocol": PROTOCOL,
             "values": sources["test"]["values"]}
    counted = {"seeds": 1, "folds": None, "cells": len(scored.classes), "classes": len(np.unique(scored.classes)),
               "groups": None}
    rows = [
        report.row(
            method, MODEL_KIND if method[0] == MODEL else BASELINE_KIND, scored.overlap if method[0] == MODEL else UNSEEN,
            scores[method], [float(scores[method].accuracy[0])], r2.get(method[0]), given, counted,
        )
        for method in predictions
    ]
    compared = report.comparisons_of(scores, [MODEL])
    details = {
        "protocol": _protocol(names), "source": sources, "shared_genes": genes.number, **origin(model, scored, seed),
        "train_cells": {**learnt.counted, "classes": learnt.class_sizes(), "dropped_classes": learnt.dropped_classes},
        "differences": report.differences_of(scores, [MODEL]),
        "comparisons": compared,
        "strengths": strengths_of(found),
        "confusion": (confusion := report.confusions(scored.classes, predictions, scored.class_names)),
    }
    said = [*report.sentences(compared, r2, [MODEL]), *_said(learnt, scored, names, genes), *spoken_values]
    title = f"Transfer of {label} from {names[0]} to {names[1]}"
    return Table(title, rows, COLUMNS, said, details, {"confusion.csv": report.confusion_csv(confusion)}, "accuracy")


def share_genes(first: AnnDataSource, second: AnnDataSource) -> SharedGenes:
    """The genes that two open files both have, by Ensembl ids and symbols; UserError if it is fewer than two."""
    vocabulary = Vocabulary.build(key for key in gene_keys(first.identity) if key)
    tokens = [map_genes(source.identity, vocabulary, source.name).tokens for source in (first, second)]
    common = np.intersect1d(*tokens)
    common = common[common >= 0]
    if len(common) < 2:
        raise UserError(f"{first.name} and {second.name} share {len(common)} gene: baselines need two; see --genes-column.")
    place = np.full(vocabulary.size + 1, -1)  # the last one is that of −1
    place[common] = np.arange(len(common))
    return SharedGenes(place[tokens[0]], place[tokens[1]], len(common))


def _columns(counts: scipy.sparse.csr_matrix, genes: np.ndarray, number: int) -> scipy.sparse.csr_matrix:
    """Counts [cells, columns of a file] by shared gene, [cells, number]; columns of one gene are summed."""
    kept = np.flatnonzero(genes >= 0)
    onto = scipy.sparse.csr_matrix(
        (np.ones(len(kept), dtype=np.float32), (kept, genes[kept])), shape=(len(genes), number)
    )
    return (counts @ onto).tocsr()


def _read_scored(
    model: ExpressionModel, learnt: ModelCells, first: AnnDataSource, second: AnnDataSource, label: str, *,
    max_overlap: float, allow_overlap: bool, progress: bool,
) -> ModelCells:
    """The cells of the second file that are scored, each once, in the classes of the first one; `dropped_classes` are those
    that this one lacks."""
    read, guarded, matching = read_unseen(
        model, second, label, max_overlap=max_overlap, allow_overlap=allow_overlap, progress=progress
    )
    left = read.take(np.flatnonzero(~guarded.cells[read.rows]))
    fingerprints = fingerprint_cells(first, model.vocabulary, np.sort(learnt.hashes), progress)
    copies = leakage.find_copies(model.vocabulary, np.sort(learnt.hashes), fingerprints, second, progress).seen[left.rows]
    if not allow_overlap and copies.sum() > max_overlap * len(copies):
        raise UserError(
            f"{copies.sum():,} of the {len(copies):,} labelled cells of {second.name} are in {first.name} too, and "
            f"{max_overlap:.1%} are allowed: give another --test, --max-overlap 1 to leave these out, or --allow-overlap to "
            "keep them."
        )
    new = np.ones(len(copies), dtype=bool) if allow_overlap else ~copies
    number = {name: code for code, name in enumerate(learnt.class_names)}
    codes = np.array([number.get(word, -1) for word in left.words], dtype=np.int64)
    rows = np.flatnonzero(new & (codes >= 0))
    lacking, sizes = np.unique(left.words[new & (codes < 0)].astype(str), return_counts=True)
    if len(rows) == 0:
        raise UserError(
            f"no labelled cell of {second.name} that may be scored has a class of {first.name}: there {label!r} is one of "
            f"{', '.join(learnt.class_names)}; here {', '.join(map(str, lacking)) or 'nothing is left'}."
        )
    counted = {
        **read.counted, "overlapping": len(read.rows) - len(left.rows), "used": len(rows),
        "in_training_file": int(copies.sum()), "in_lacking_classes": int(sizes.sum()),
    }
    kept = left.take(rows)
    tokens, hashes = kept.tokens_on(model.vocabulary)
    return ModelCells(
        counts=kept.counts, keys=kept.keys, content=kept.content, classes=codes[rows], class_names=learnt.class_names,
        dropped_classes=dict(zip(lacking.tolist(), sizes.tolist(), strict=True)), counted=counted, tokens=tokens,
        hashes=hashes, overlap=guarded.overlap, seen=guarded.seen, matching=matching,
    )


def _said(learnt: ModelCells, scored: ModelCells, names: tuple[str, str], genes: SharedGenes) -> list[str]:
    """Which cells and genes took part, in plain words."""
    c, given = scored.counted, scored.overlap == "transductive"
    said = [
        f"Learnt: {learnt.counted['used']:,} of {learnt.counted['total']:,} cells of {names[0]} in {len(learnt.class_names)} "
        f"classes. Scored: {c['used']:,} of {c['total']:,} cells of {names[1]}; {'kept' if given else 'left out'}: "
        f"{sum(scored.seen.values()):,} that the model was trained or validated on and {c['in_training_file']:,} that are in "
        f"{names[0]} too; left out: {c['unlabelled']:,} without a label, {c['duplicates']:,} exact duplicates, "
        f"{c['in_lacking_classes']:,} of classes that {names[0]} lacks.",
        f"Baselines see the {genes.number:,} genes that both files have.",
    ]
    for name, dropped in [(names[0], learnt.dropped_classes), (names[1], scored.dropped_classes)]:
        if dropped:
            listed = ", ".join(f"{word} ({size:,})" for word, size in dropped.items())
            why = "under 10 cells" if name == names[0] else f"that {names[0]} lacks, in no accuracy"
            said.append(f"Classes of {name} {why}: {listed}.")
    if scored.overlap == "not checkable":
        said.append("The model does not say which cells it was trained on: whether these are new to it cannot be checked.")
    return said


def _protocol(names: tuple[str, str]) -> str:
    return (
        f"label transfer: everything is fitted on four fifths of the labelled cells of {names[0]}, stratified, and scored on "
        f"those cells of {names[1]} whose class it has; {embed.SUBSETS}; "
        f"k-NN: k = {probes.NEIGHBOURS}, Euclidean, unweighted; linear: multinomial logistic regression, L2, C of "
        f"{', '.join(f'{strength:g}' for strength in GRID)} chosen by balanced accuracy on the fifth part of "
        f"{names[0]}, on features standardised by the training cells (not standardised for variable "
        "genes); baselines on the genes of both files, totals too; macro-F1 over the classes of the scored cells; "
        f"intervals: 2.5 and 97.5 percentiles of {RESAMPLES:,} bootstrap resamples of the scored cells, the same for all "
        "methods"
    )
