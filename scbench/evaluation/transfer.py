"""Benchmark by label transfer: labels of one file are learnt, those of another are predicted and scored.

Everything is fitted on all labelled cells of the first file: k-NN and a linear probe on frozen embeddings, and the baselines,
on the genes that both files measured. Intervals come from a bootstrap over the cells of the second file.
"""

from pathlib import Path
from typing import NamedTuple

import anndata
import numpy as np
import scipy.sparse

from scbench.data.cells import take
from scbench.data.gene_identity import gene_keys, map_genes
from scbench.data.sources.anndata import AnnDataSource
from scbench.data.vocabulary import Vocabulary
from scbench.errors import UserError
from scbench.evaluation import baselines, embed, leakage, probes
from scbench.evaluation.classification import (
    COLUMNS,
    MODEL,
    UNTRAINED,
    differences_of,
    embed_cells,
    fields,
    origin,
    predict_splits,
    sentences,
    untrained_twin,
)
from scbench.evaluation.fingerprint_cells import fingerprint_cells
from scbench.evaluation.labelled_cells import LabelledCells, read_cells, read_labelled
from scbench.evaluation.reference_cells import described
from scbench.evaluation.report import Table
from scbench.evaluation.scores import RESAMPLES, score
from scbench.models.model import ExpressionModel

PROTOCOL = "transfer"
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
    options = {"layer": layer, "genes_column": genes_column}
    with embed.opened(train, **options) as first, embed.opened(test, **options) as second:
        learnt = read_cells(model, first, label, max_overlap=1, allow_overlap=True, progress=progress)
        if len(learnt.classes) < probes.NEIGHBOURS:
            raise UserError(f"{first.name}: {len(learnt.classes)} labelled cells are fewer than the {probes.NEIGHBOURS} that "
                            "k-NN needs: give more.")
        genes = share_genes(first, second)
        scored = _read_scored(
            model, learnt, first, second, label, max_overlap=max_overlap, allow_overlap=allow_overlap, progress=progress
        )
        names, sources = (first.name, second.name), {"train": described(first), "test": described(second)}
    both = scored._replace(
        counts=scipy.sparse.vstack([_columns(learnt.counts, genes.train, genes.number),
                                    _columns(scored.counts, genes.test, genes.number)], format="csr"),
        classes=np.concatenate([learnt.classes, scored.classes]),
    )
    embeddings = {
        name: np.concatenate([embed_cells(network, cells, seed, progress and f"embedding, {name}")
                              for cells in (learnt, scored)])
        for name, network in [(MODEL, model), (UNTRAINED, untrained_twin(model, seed))]
    }
    rows = np.arange(len(both.classes))
    fitted, asked = rows[: len(learnt.classes)], rows[len(learnt.classes) :]
    predictions, depths = predict_splits(both, embeddings, [[(fitted, asked)]], progress)
    log_totals = baselines.depth_features(both.counts)[asked, 0]
    depth_r2 = {name: probes.r_squared(log_totals, values[:, asked]) for name, values in depths.items()}
    scores = score(scored.classes, {method: values[:, asked] for method, values in predictions.items()}, seed)
    table = [
        {
            "task": "classification", "dataset": f"{names[0]} → {names[1]}", "label": label, "model": name, "probe": probe,
            "protocol": PROTOCOL, "overlap": scored.overlap,
            **fields("accuracy", scores[name, probe].accuracy), **fields("macro_f1", scores[name, probe].macro_f1),
            "depth_r2": depth_r2.get(name), "seeds": 1, "folds": None, "cells": len(scored.classes),
            "classes": len(np.unique(scored.classes)),
        }
        for name, probe in predictions
    ]
    ahead = differences_of(scores)
    details = {
        "protocol": _protocol(names), "source": sources, "shared_genes": genes.number, **origin(model, scored, seed),
        "train_cells": {**learnt.counted, "classes": learnt.class_sizes(), "dropped_classes": learnt.dropped_classes},
        "differences": ahead,
    }
    said = [*sentences(ahead, depth_r2), *_said(learnt, scored, names, genes)]
    return Table(f"Transfer of {label} from {names[0]} to {names[1]}", table, COLUMNS, said, details)


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
    model: ExpressionModel, learnt: LabelledCells, first: AnnDataSource, second: AnnDataSource, label: str, *,
    max_overlap: float, allow_overlap: bool, progress: bool,
) -> LabelledCells:
    """The cells of the second file that are scored, each once, in the classes of the first one; `dropped_classes` are those
    that this one lacks."""
    read = read_labelled(
        model, second, label, max_overlap=max_overlap, allow_overlap=allow_overlap, progress=progress
    )
    fingerprints = fingerprint_cells(first, model.vocabulary, np.sort(learnt.hashes), progress)
    found = leakage.find_copies(model.vocabulary, np.sort(learnt.hashes), fingerprints, second, progress)
    copies = found.seen[read.rows]
    if not allow_overlap and copies.sum() > max_overlap * len(copies):
        raise UserError(
            f"{copies.sum():,} of the {len(copies):,} labelled cells of {second.name} are in {first.name} too, and "
            f"{max_overlap:.1%} are allowed: give another --test, --max-overlap 1 to leave these out, or --allow-overlap to "
            "keep them."
        )
    once = np.zeros(len(copies), dtype=bool)
    once[np.unique(read.hashes, return_index=True)[1]] = True
    new = once if allow_overlap else once & ~copies
    number = {name: code for code, name in enumerate(learnt.class_names)}
    codes = np.array([number.get(word, -1) for word in read.words], dtype=np.int64)
    rows = np.flatnonzero(new & (codes >= 0))
    lacking, sizes = np.unique(read.words[new & (codes < 0)].astype(str), return_counts=True)
    if len(rows) == 0:
        raise UserError(
            f"no labelled cell of {second.name} that may be scored has a class of {first.name}: there {label!r} is one of "
            f"{', '.join(learnt.class_names)}; here {', '.join(map(str, lacking)) or 'nothing is left'}."
        )
    counted = {
        **read.counted, "used": len(rows), "duplicates": int((~once).sum()),
        "in_training_file": int((once & copies).sum()), "in_lacking_classes": int(sizes.sum()),
    }
    return LabelledCells(
        tokens=take(read.tokens, rows), counts=read.counts[rows], hashes=read.hashes[rows], classes=codes[rows],
        class_names=learnt.class_names, dropped_classes=dict(zip(lacking.tolist(), sizes.tolist(), strict=True)),
        counted=counted, overlap=read.overlap, matching=read.matching, seen=read.seen,
    )


def _said(learnt: LabelledCells, scored: LabelledCells, names: tuple[str, str], genes: SharedGenes) -> list[str]:
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
        f"label transfer: everything is fitted on the labelled cells of {names[0]} and scored on those of {names[1]} whose "
        f"class it has; k-NN: k = {probes.NEIGHBOURS}, Euclidean, unweighted; linear: multinomial logistic regression, L2, "
        "C = 1, on features standardised by the training cells (not standardised for variable genes); baselines on the genes "
        "of both files, totals too; macro-F1 over the classes of the scored cells; intervals: 2.5 and 97.5 percentiles of "
        f"{RESAMPLES:,} bootstrap resamples of the scored cells, the same for all methods"
    )

