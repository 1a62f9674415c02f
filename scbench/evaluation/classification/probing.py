"""Out-of-fold predictions of frozen embeddings and of the baselines beside them, all fitted on the training cells of a fold.

k-NN asks the features as they are. The linear probe is logistic regression on standardised features, its strength chosen on
the fold's validation cells from the grid of selection.py; so is that of the regression on variable genes.
"""

from collections.abc import Iterator, Mapping, Sequence
from typing import NamedTuple

import numpy as np
from threadpoolctl import threadpool_limits

from scbench.evaluation import baselines, probes
from scbench.evaluation.classification import scvi_baseline
from scbench.evaluation.classification.selection import Chosen, choose_regression
from scbench.evaluation.folds import Parts
from scbench.evaluation.labelled_cells import LabelledCells
from scbench.evaluation.progress import progress_bar

KNN, LINEAR, NO_PROBE = "k-NN", "linear", "none"
DEPTH, PCA, GENES, MAJORITY, SCVI = "depth only", "PCA", "variable genes", "majority class", "scVI"
SMALL = 10_000  # cells; below, threads mostly wait for each other

Method = tuple[str, str]  # model and probe of a row
Fitted = tuple[np.ndarray, np.ndarray, np.ndarray]  # features of training, validation and test cells


class Found(NamedTuple):
    """What was found, by method; undefined for cells that no fold of a repetition tests."""

    predictions: dict[Method, np.ndarray]  # classes, int64 [pretraining seeds, repetitions, cells]
    depths: dict[str, np.ndarray]  # log total counts read from an embedding, float64 of the same shape
    strengths: dict[Method, list[list[float]]]  # chosen on validation, [repetitions][folds]; of the first pretraining seed


def pca_name(components: int) -> str:
    """What the baseline of so many components is called."""
    return f"{PCA} {components}"


def predict(
    cells: LabelledCells, embeddings: Mapping[str, Sequence[np.ndarray]], splits: Sequence[Sequence[Parts]], seed: int,
    progress: bool, *, beside: Sequence[str] = (DEPTH, PCA, GENES, MAJORITY),
) -> Found:
    """Predictions of every embedding and of the baselines `beside` it.

    Parameters
    ----------
    cells
        The cells.
    embeddings
        By a model's name one of each of its pretraining seeds, float [cells, D].
    splits
        The folds of each repetition; a fold without test cells is passed over.
    seed
        Of scVI; nothing else is drawn.
    progress
        Show a progress bar if on a terminal.
    beside
        PCA stands for 50 components and for each D of the embeddings.
    """
    values, depth = baselines.log_normalise(cells.counts), baselines.depth_features(cells.counts)
    widths = sorted({baselines.COMPONENTS, *(each.shape[1] for several in embeddings.values() for each in several)})
    shape, found = (len(splits), len(cells.classes)), Found({}, {}, {})

    def features(parts: Parts) -> Iterator[tuple[str, int, Fitted]]:
        """Name, number of the pretraining seed, and features."""
        for name, several in embeddings.items():
            for number, embedding in enumerate(several):
                yield name, number, tuple(embedding[rows] for rows in parts)
        if DEPTH in beside:
            yield DEPTH, 0, baselines.standardised(depth, *parts)
        if PCA in beside:
            fitted = baselines.principal_components(values, *parts, components=widths[-1])
            for width in widths:
                yield pca_name(width), 0, tuple(part[:, :width] for part in fitted)
        if SCVI in beside:
            yield SCVI, 0, scvi_baseline.latents(cells.counts, parts, seed)

    def note(method: Method, number: int, repetition: int, test: np.ndarray, predicted: np.ndarray) -> None:
        several = len(embeddings.get(method[0], (None,)))
        found.predictions.setdefault(method, np.empty((several, *shape), dtype=np.int64))[number, repetition, test] = predicted

    def chose(method: Method, number: int, repetition: int, test: np.ndarray, chosen: Chosen) -> None:
        note(method, number, repetition, test, chosen.predicted)
        if number == 0:
            found.strengths.setdefault(method, [[] for _ in splits])[repetition].append(chosen.strength)

    def fold(repetition: int, parts: Parts) -> None:
        train, validation, test = (cells.classes[rows] for rows in parts)
        for name, number, (fitted, aside, asked) in features(parts):
            note((name, KNN), number, repetition, parts.test, probes.nearest_neighbours(fitted, train, asked))
            fitted, aside, asked = probes.standardised(fitted, aside, asked)
            chosen = choose_regression(fitted, train, aside, validation, asked)
            chose((name, LINEAR), number, repetition, parts.test, chosen)
            if name != DEPTH:
                read = probes.ridge(fitted, depth[parts.train, 0], asked)
                several = len(embeddings.get(name, (None,)))
                found.depths.setdefault(name, np.empty((several, *shape)))[number, repetition, parts.test] = read
        if GENES in beside:
            genes = baselines.variable_genes(values[parts.train])
            fitted, aside, asked = (values[rows][:, genes] for rows in parts)
            chosen = choose_regression(fitted, train, aside, validation, asked)
            chose((GENES, LINEAR), 0, repetition, parts.test, chosen)
        if MAJORITY in beside:
            note((MAJORITY, NO_PROBE), 0, repetition, parts.test, baselines.majority(train, len(test)))

    threads = threadpool_limits(1 if len(cells.classes) < SMALL else None)
    with threads, progress_bar("classification", sum(map(len, splits)), progress) as advance:
        for repetition, folds in enumerate(splits):
            for parts in folds:
                if len(parts.test):
                    fold(repetition, parts)
                advance(1)
    return found


def strengths_of(found: Found) -> list[dict]:
    """The strengths chosen on validation cells, JSON-able: in each repetition one a fold."""
    return [{"model": model, "probe": probe, "chosen": chosen} for (model, probe), chosen in found.strengths.items()]


def depth_r2(cells: LabelledCells, depths: dict[str, np.ndarray], test: np.ndarray | slice = slice(None)) -> dict[str, float]:
    """R² of log total counts read from each embedding, on the rows `test`."""
    log_totals = baselines.depth_features(cells.counts)[test, 0]
    return {
        name: probes.r_squared(log_totals, read[..., test].reshape(-1, len(log_totals))) for name, read in depths.items()
    }
