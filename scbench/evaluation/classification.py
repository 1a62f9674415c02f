"""Benchmark: predict a label of each cell from frozen embeddings, beside five baselines, on cells the model never saw.

Protocol: cross-validation in stratified folds, repeated with `seeds` different foldings, gives every cell an out-of-fold
prediction in every repetition. Accuracy and macro-F1 are means over repetitions; their 95 % intervals come from a
bootstrap over cells that is the same for all methods, so methods can be compared cell by cell. The intervals cover the
choice of cells, not of training runs or donors.
"""

import hashlib
import platform
from collections.abc import Callable, Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import NamedTuple

import anndata
import numpy as np
from threadpoolctl import threadpool_limits

from scbench import __version__
from scbench.config import ClassificationConfig
from scbench.data.sources.anndata import AnnDataSource
from scbench.errors import UserError
from scbench.evaluation import baselines, embed, probes
from scbench.evaluation.labelled_cells import LabelledCells, read_cells
from scbench.evaluation.progress import progress_bar
from scbench.evaluation.reference_cells import described, labelled_source, values_sentences
from scbench.evaluation.report import Column, Table, screen
from scbench.evaluation.scores import RESAMPLES, Scores, interval, score, stratified_folds
from scbench.evaluation.split_files import Split
from scbench.files import refuse_existing
from scbench.kernels import random
from scbench.models.model import ExpressionModel

KNN, LINEAR, NO_PROBE = "k-NN", "linear", "none"
MODEL, UNTRAINED, DEPTH, PCA, GENES, MAJORITY = (
    "trained model", "untrained model", "depth only", "PCA", "variable genes", "majority class",
)
SPOKEN = {UNTRAINED: "an untrained model", DEPTH: "depth alone", PCA: "PCA", GENES: "logistic regression on genes"}
_UNTRAINED = 2  # what a key of Stream.EVALUATION decides, beside those of scores.py

SMALL = 10_000  # cells; below, threads mostly wait for each other

Model = ExpressionModel  # or an ExternalEmbedding, ExternalPredictions
Method = tuple[str, str]  # model and probe of a row

COLUMNS = [
    Column("model", ("model",)),
    Column("probe", ("probe",)),
    Column("accuracy", ("accuracy", "accuracy_low", "accuracy_high"), "{:.3f} ({:.3f}–{:.3f})"),
    Column("macro-F1", ("macro_f1", "macro_f1_low", "macro_f1_high"), "{:.3f} ({:.3f}–{:.3f})"),
    Column("depth R²", ("depth_r2",), "{:.2f}"),
    Column("overlap", ("overlap",)),
]


class Features(NamedTuple):
    """Something that k-NN and the linear probe are fitted on."""

    split: Callable[[np.ndarray, np.ndarray], tuple[np.ndarray, np.ndarray]]  # training and test rows → their features
    standardised: bool = False  # whether they are already


def benchmark_classification(
    models: Model | Mapping[str, Sequence[Model]],
    source: AnnDataSource | anndata.AnnData | Path | str,
    label: str | None = None,
    *,
    group: str | None = None,
    split: Split | None = None,
    values: str = "counts",
    layer: str | None = None,
    genes_column: str | None = None,
    seeds: int = 3,
    folds: int = 5,
    max_overlap: float = 0.01,
    allow_overlap: bool = False,
    seed: int = 0,
    scvi: bool = False,
    progress: bool = False,
) -> Table:
    """The table of one model on one labelled set of cells.

    Parameters
    ----------
    model
        The pretrained model.
    source
        Raw counts and labels; or the path of the reference's .pt file, for a model on the reference's token ids.
    label
        Column of obs to predict; a .pt file implies it. Missing labels (NaN, '', unknown, na, …) and classes under 10 cells
        are left out.
    layer, genes_column
        As in `scbench.embed`.
    seeds, folds
        Repetitions of the cross-validation, and its folds.
    max_overlap
        Refuse if the model was trained or validated on a larger share of the labelled cells (see `scbench.find_seen_cells`).
        Up to it, such cells are left out.
    allow_overlap
        Keep the cells that the model was trained or validated on; the rows are then marked "transductive".
    seed
        Of the folds, the bootstrap, the gene draws and the untrained model.
    progress
        Show a progress bar if on a terminal.

    Raises
    ------
    UserError
        If the label can't be used, or too few cells remain.
    """
    model = models if isinstance(models, ExpressionModel) else next(iter(models.values()))[0]  # more of them: next commit
    with labelled_source(model, source, label, layer=layer, genes_column=genes_column) as (opened, label):
        cells = read_cells(
            model, opened, label, max_overlap=max_overlap, allow_overlap=allow_overlap, progress=progress
        )
        if len(cells.classes) - -(-len(cells.classes) // folds) < probes.NEIGHBOURS or folds > len(cells.classes):
            raise UserError(
                f"{opened.name}: {len(cells.classes)} cells in {folds} folds leave fewer than {probes.NEIGHBOURS} training "
                "cells for k-NN: give more labelled cells or change --folds."
            )
        details = {
            "protocol": _protocol(seeds, folds),
            "source": described(opened),
        }
        values = values_sentences(opened)
    untrained = untrained_twin(model, seed)
    embeddings = {
        name: embed_cells(network, cells, seed, progress and f"embedding, {name}")
        for name, network in [(MODEL, model), (UNTRAINED, untrained)]
    }
    predictions, depth_r2 = predict(cells, embeddings, seeds, folds, seed, progress)
    scores = score(cells.classes, predictions, seed)
    common = {"seeds": seeds, "folds": folds, "cells": len(cells.classes), "classes": len(cells.class_names)}
    rows = [
        {
            "task": "classification", "dataset": details["source"]["name"], "label": label, "model": name, "probe": probe,
            "protocol": f"{folds}-fold", "overlap": cells.overlap,
            **fields("accuracy", scores[name, probe].accuracy), **fields("macro_f1", scores[name, probe].macro_f1),
            "depth_r2": depth_r2.get(name), **common,
        }
        for name, probe in predictions
    ]
    differences = differences_of(scores)
    details |= {**origin(model, cells, seed), "differences": differences}
    title = f"Classification of {label} in {details['source']['name']}"
    said = [*sentences(differences, depth_r2), *cells.sentences(), *values]
    return Table(title, rows, COLUMNS, said, details)


def origin(model: ExpressionModel, cells: LabelledCells, seed: int) -> dict:
    """What a table is made of, JSON-able: the model, the cells, the seed and the versions of the software."""
    return {
        "model": {"fingerprint": embed.fingerprint(model), "provenance": model.provenance},
        "cells": {
            **cells.counted, "seen": cells.seen, "classes": cells.class_sizes(), "dropped_classes": cells.dropped_classes,
        },
        "cells_sha256": _digest(cells),
        "gene_matching": cells.matching,
        "seed": seed,
        "versions": {
            "scbench": __version__, "python": platform.python_version(),
            **{name: version(name) for name in ("torch", "numpy", "scipy", "scikit-learn", "anndata")},
        },
    }


def untrained_twin(model: ExpressionModel, seed: int) -> ExpressionModel:
    """A model of the same shape with the weights that a training starts from, on the same device."""
    twin = ExpressionModel(model.config, model.vocabulary, random.key(seed, random.Stream.EVALUATION, _UNTRAINED) >> 1)
    return twin.to(embed.device_of(model))


def embed_cells(model: ExpressionModel, cells: LabelledCells, seed: int, progress: str | bool) -> np.ndarray:
    with progress_bar(str(progress), len(cells.hashes), bool(progress)) as advance:
        return embed.encode(model, cells.tokens, cells.hashes, seed=seed, advance=advance)


def predict(
    cells: LabelledCells, embeddings: dict[str, np.ndarray], seeds: int, folds: int, seed: int, progress: bool,
    beside: tuple[str, ...] = (DEPTH, PCA, GENES, MAJORITY),
) -> tuple[dict[Method, np.ndarray], dict[str, float]]:
    """Out-of-fold predictions of every embedding and of the baselines `beside` it, int64 [seeds, cells], and R² of depth
    read from each embedding."""
    foldings = [stratified_folds(cells.classes, cells.hashes, folds, seed, repetition) for repetition in range(seeds)]
    splits = [
        [(np.flatnonzero(fold != number), np.flatnonzero(fold == number)) for number in range(folds)] for fold in foldings
    ]
    predictions, depths = predict_splits(cells, embeddings, splits, progress, beside)
    log_totals = baselines.depth_features(cells.counts)[:, 0]
    return predictions, {name: probes.r_squared(log_totals, predicted) for name, predicted in depths.items()}


def predict_splits(
    cells: LabelledCells, embeddings: dict[str, np.ndarray], splits: list[list[tuple[np.ndarray, np.ndarray]]],
    progress: bool, beside: tuple[str, ...] = (DEPTH, PCA, GENES, MAJORITY),
) -> tuple[dict[Method, np.ndarray], dict[str, np.ndarray]]:
    """Predictions of test rows by what is fitted on training rows, int64 [repetitions, cells], and their log total counts as
    read from each embedding, float64; both undefined for rows that no split of a repetition tests. `splits`: for each
    repetition pairs of training and test rows."""
    values = baselines.log_normalise(cells.counts)
    depth = baselines.depth_features(cells.counts)
    log_totals = depth[:, 0]

    def rows_of(embedding: np.ndarray) -> Features:
        return Features(lambda train, test: (embedding[train], embedding[test]))

    fitted_on = {
        DEPTH: Features(lambda train, test: baselines.standardised(depth, train, test)),
        PCA: Features(lambda train, test: baselines.principal_components(values, train, test)),
    }
    features = {name: rows_of(embedding) for name, embedding in embeddings.items()}
    features |= {name: feature for name, feature in fitted_on.items() if name in beside}
    alone = [method for method in ((GENES, LINEAR), (MAJORITY, NO_PROBE)) if method[0] in beside]
    methods = [*((name, probe) for name in features for probe in (KNN, LINEAR)), *alone]
    n = len(cells.classes)
    predictions = {method: np.empty((len(splits), n), dtype=np.int64) for method in methods}
    depths = {name: np.empty((len(splits), n)) for name in features if name != DEPTH}
    threads = threadpool_limits(1 if n < SMALL else None)
    with threads, progress_bar("classification", sum(map(len, splits)), progress) as advance:
        for repetition, pairs in enumerate(splits):
            for train, test in pairs:
                classes = cells.classes[train]
                for name, feature in features.items():
                    fitted, held_out = feature.split(train, test)
                    predictions[name, KNN][repetition, test] = probes.nearest_neighbours(fitted, classes, held_out)
                    predictions[name, LINEAR][repetition, test] = probes.linear_probe(fitted, classes, held_out)
                    if name in depths:
                        depths[name][repetition, test] = probes.read_depth(fitted, log_totals[train], held_out)
                if GENES in beside:
                    predictions[GENES, LINEAR][repetition, test] = baselines.regress_on_genes(
                        values, cells.classes, train, test
                    )
                if MAJORITY in beside:
                    predictions[MAJORITY, NO_PROBE][repetition, test] = baselines.majority(classes, len(test))
                advance(1)
    return predictions, depths


def fields(name: str, samples: np.ndarray) -> dict[str, float]:
    value, low, high = interval(samples)
    return {name: value, f"{name}_low": low, f"{name}_high": high}


def differences_of(scores: dict[Method, Scores]) -> list[dict]:
    """How far the trained model is ahead (negative: behind) of each other method, paired over cells."""
    pairs = [((MODEL, probe), (other, probe)) for probe in (KNN, LINEAR) for other in (UNTRAINED, DEPTH, PCA)]
    pairs.append(((MODEL, LINEAR), (GENES, LINEAR)))
    return [
        {
            "model": ours[0], "baseline": other[0], "probe": ours[1],
            **fields("accuracy", scores[ours].accuracy - scores[other].accuracy),
            **fields("macro_f1", scores[ours].macro_f1 - scores[other].macro_f1),
        }
        for ours, other in pairs
    ]


def sentences(differences: list[dict], depth_r2: dict[str, float]) -> list[str]:
    """What the table says, in plain words."""
    said = []
    for probe in (KNN, LINEAR):
        parts = [_compare(difference) for difference in differences if difference["probe"] == probe]
        said.append(f"With {'k-NN' if probe == KNN else 'a linear probe'} the trained model {'; '.join(parts)}.")
    said.append(
        f"Log total counts can be read from the trained embedding with R² {depth_r2[MODEL]:.2f} "
        f"(untrained {depth_r2[UNTRAINED]:.2f}, PCA {depth_r2[PCA]:.2f}): near 1, distances between cells are partly "
        "differences in sequencing depth."
    )
    return said


def _compare(difference: dict) -> str:
    value, low, high = (difference[field] for field in ("accuracy", "accuracy_low", "accuracy_high"))
    numbers = f"{value:+.3f} accuracy, 95 % interval {low:+.3f} to {high:+.3f}"
    verdict = "beats" if low > 0 else "loses to" if high < 0 else "is not clearly apart from"
    return f"{verdict} {SPOKEN[difference['baseline']]} ({numbers})"


def _protocol(seeds: int, folds: int) -> str:
    return (
        f"stratified {folds}-fold cross-validation over cells, {seeds} repetitions; k-NN: k = {probes.NEIGHBOURS}, Euclidean, "
        "unweighted; linear: multinomial logistic regression, L2, C = 1, on features standardised by the training cells "
        f"(not standardised for {GENES}: log1p of counts per 10,000 of the {baselines.VARIABLE_GENES:,} genes of largest "
        f"variance); PCA: {baselines.COMPONENTS} components of log1p of counts per 10,000, all genes; everything is fitted on "
        f"training cells; intervals: 2.5 and 97.5 percentiles of {RESAMPLES:,} bootstrap resamples of the cells, the same "
        "for all methods"
    )


def _digest(cells: LabelledCells) -> str:
    """SHA-256 of the cells that took part: their content on the model's vocabulary, and their labels."""
    digest = hashlib.sha256(cells.hashes.astype("<u8").tobytes())
    digest.update(cells.classes.astype("<i8").tobytes())
    digest.update("\0".join(cells.class_names).encode())
    return digest.hexdigest()


def run_classification(config: ClassificationConfig) -> dict:
    """`scbench benchmark classification`: write the table to --output, show it, return it as JSON-able values."""
    refuse_existing(config.output)
    model = embed.load_model(config.model)
    options = {
        "layer": config.layer, "genes_column": config.genes_column, "max_overlap": config.max_overlap,
        "allow_overlap": config.allow_overlap, "seed": config.seed, "progress": not config.json,
    }
    if config.protocol == "aaai2025":
        from scbench.evaluation.aaai2025 import benchmark_aaai2025  # it stands on this file

        table = benchmark_aaai2025(model, config.input, config.label, **options)
    elif config.train is not None:
        from scbench.evaluation.transfer import benchmark_transfer  # it too

        table = benchmark_transfer(model, config.train, config.test, config.label, **options)
    else:
        table = benchmark_classification(
            model, config.input, config.label, seeds=config.seeds, folds=config.folds, **options
        )
    table.write(config.output)
    if not config.json:
        console = screen()
        table.show(console)
        console.print(f"Written to {config.output}: results.json, results.csv, results.md")
    return table.record()
