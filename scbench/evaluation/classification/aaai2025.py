"""Classification as the AAAI 2025 reference does it: cell types, or perturbed genes as classes, from a frozen embedding.

    trial       one of 5; 70 % of the cells, drawn anew, are the training part, 30 % the test part
    genes       of a cell with more genes than the model takes at once, one subset a trial, drawn by weight (value − the cell's
                smallest value + 1e-5, without replacement) whatever draw the model was trained with; nothing is masked
    k-NN        k = 10, Euclidean, uniform; not asked about perturbed genes
    linear      one layer on the embedding as it is, cross-entropy, Adam at 5e-3, batches of 64, 50 epochs; the test part is
                scored after every 5th, and the best of the 10 scores is kept: optimistic, for the test cells chose it
    reported    mean and population standard deviation of the accuracy over the trials

What differs from the reference: every choice comes from a seed (its trials cannot be repeated), and the cells are those of the
default protocol (seen in pretraining, exact copies and classes under 10 cells left out), so that the two can be compared.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import anndata
import numpy as np
import torch
from threadpoolctl import threadpool_limits
from torch.nn import functional as F

from scbench.config import Values
from scbench.data.batch import CellBatch
from scbench.data.cells import CellTokens, take
from scbench.data.sampler import CellSampler
from scbench.data.sources.anndata import AnnDataSource
from scbench.data.sources.reference_pt import PERTURBED, ReferencePtSource
from scbench.errors import UserError
from scbench.evaluation import baselines, embed, probes
from scbench.evaluation.classification.benchmark import origin
from scbench.evaluation.classification.label_flags import flags
from scbench.evaluation.classification.probing import (
    DEPTH,
    GENES,
    KNN,
    LINEAR,
    MAJORITY,
    NO_PROBE,
    PCA,
    SMALL,
    Method,
)
from scbench.evaluation.classification.report import BASELINE_KIND, MODEL_KIND, compare
from scbench.evaluation.comparisons import Comparison, sentences_of
from scbench.evaluation.entrants import MODEL, UNTRAINED, untrained_twin
from scbench.evaluation.labelled_cells import ModelCells, read_cells
from scbench.evaluation.progress import progress_bar
from scbench.evaluation.reference_cells import described, labelled_source, values_sentences
from scbench.evaluation.report import Column, Table
from scbench.kernels import random
from scbench.kernels.random import Stream
from scbench.models.model import ExpressionModel

PROTOCOL = "aaai2025"
TRIALS, TRAINING_TENTHS = 5, 7
LEARNING_RATE, BATCH_CELLS, EPOCHS, LOOK_EVERY = 5e-3, 64, 50, 5
REGRESSION = "logistic regression"
_TRIAL = 20  # what a key of Stream.EVALUATION decides, beside those of the other files
SPLIT, DRAW, PROBE = range(3)  # and what a trial's

COLUMNS = [
    Column("model", ("model",)),
    Column("probe", ("probe",)),
    Column("accuracy ± SD", ("accuracy", "accuracy_sd"), "{:.3f} ± {:.3f}"),
    Column("epoch chosen on", ("chosen_on",)),
    Column("at the last epoch", ("accuracy_last",), "{:.3f}"),
    Column("depth R²", ("depth_r2",), "{:.2f}"),
    Column("overlap", ("overlap",)),
]
OPTIMISTIC = "the test part (optimistic)"


class Trials(NamedTuple):
    """What each method scores in each trial, on the test part."""

    accuracy: dict[Method, list[float]]  # of the linear probe, the best of its looks
    last: dict[Method, list[float]]  # of the linear probe at its last epoch
    depth_r2: dict[str, list[float]]  # R² of log total counts read from an embedding


def trial_key(seed: int, trial: int, *path: int) -> int:
    """The key of a trial's choices; `path` begins with SPLIT, DRAW or PROBE."""
    return random.key(seed, Stream.EVALUATION, _TRIAL, trial, *path)


def split_cells(hashes: np.ndarray, key: int) -> tuple[np.ndarray, np.ndarray]:
    """Rows of the training part (70 %, rounded down) and of the test part, int64. The order of the cells does not matter."""
    order = np.argsort(random.bits(key, hashes), kind="stable")
    training = len(order) * TRAINING_TENTHS // 10
    return order[:training], order[training:]


def drawn_batches(
    model: ExpressionModel, cells: CellTokens, hashes: np.ndarray, key: int, batch_cells: int = embed.BATCH_CELLS,
    *, masked: bool = False,
) -> Iterator[tuple[np.ndarray, CellBatch]]:
    """The cells' rows, int64 [B], and batches of one weighted draw of their genes, long cells first; no gene, or all, masked.

    What is drawn of a cell depends on the key and the cell's content (`hashes`, uint64) alone.
    """
    inputs = model.config.inputs
    sampler = CellSampler(model.vocabulary, inputs, seed=key, mask_ratio=float(masked), weighted_share=1.0)
    by_length = np.argsort(-np.minimum(np.diff(cells.offsets), inputs.max_genes), kind="stable")
    for start in range(0, len(by_length), batch_cells):
        rows = by_length[start : start + batch_cells]
        drawn = sampler.draw(take(cells, rows), hashes[rows])
        batch = sampler.pack(drawn, np.arange(len(rows)), hashes[rows].view(np.int64), rows)
        yield rows, batch.to(embed.device_of(model))


def embed_draw(model: ExpressionModel, cells: CellTokens, hashes: np.ndarray, key: int) -> np.ndarray:
    """Embeddings of one weighted draw of each cell, float32 [cells, D]."""
    values = np.empty((len(hashes), model.config.width), dtype=np.float32)
    with embed.evaluating(model):
        for rows, batch in drawn_batches(model, cells, hashes, key):
            values[rows] = model.encode(batch).float().cpu().numpy()
    if not np.isfinite(values).all():
        raise UserError("the model's embeddings are not finite numbers: its weights are damaged, train or copy it again.")
    return values


def probe_looks(
    train: np.ndarray, classes: np.ndarray, test: np.ndarray, truth: np.ndarray, n_classes: int, key: int
) -> list[float]:
    """The linear probe's accuracy on the test part at each look, after 5, 10, … 50 epochs.

    Parameters
    ----------
    train, test
        Features, float [cells, D], used as they are.
    classes, truth
        int64: the classes of both parts.
    key
        Of the start values (uniform within 1/√D, as torch's linear layers) and of each epoch's order.
    """
    features, held_out = (torch.from_numpy(np.ascontiguousarray(x, dtype=np.float32)) for x in (train, test))
    targets, width, generator = torch.from_numpy(classes), train.shape[1], random.generator(key)
    weight, bias = torch.empty(n_classes, width), torch.empty(n_classes)
    for parameter in (weight, bias):
        parameter.uniform_(-(width**-0.5), width**-0.5, generator=generator).requires_grad_()
    optimizer = torch.optim.Adam([weight, bias], lr=LEARNING_RATE)
    looks = []
    for epoch in range(1, EPOCHS + 1):
        order = torch.from_numpy(random.permutation(random.fold(key, epoch), len(targets)))
        for rows in order.split(BATCH_CELLS):
            optimizer.zero_grad()
            F.cross_entropy(F.linear(features[rows], weight, bias), targets[rows]).backward()
            optimizer.step()
        if epoch % LOOK_EVERY == 0:
            with torch.no_grad():
                predicted = F.linear(held_out, weight, bias).argmax(1).numpy()
            looks.append(float(np.mean(predicted == truth)))
    return looks


def run_trials(
    cells: ModelCells, networks: dict[str, ExpressionModel], seed: int, *, nearest: bool = True, progress: bool = False
) -> Trials:
    """All trials of the networks and of the baselines beside them. `nearest`: ask k-NN too."""
    values, depth = baselines.log_normalise(cells.counts), baselines.depth_features(cells.counts)
    n_classes, n = len(cells.class_names), len(cells.classes)
    trials = Trials({}, {}, {})

    def note(scores: dict, key: Method | str, score: float) -> None:
        scores.setdefault(key, []).append(score)

    threads = threadpool_limits(1 if n < SMALL else None)
    with threads, progress_bar("trials", TRIALS * (len(networks) + 2), progress) as advance:
        for trial in range(TRIALS):
            train, test = split_cells(cells.hashes, trial_key(seed, trial, SPLIT))
            classes, truth = cells.classes[train], cells.classes[test]
            parts = {}
            for name, network in networks.items():
                embedding = embed_draw(network, cells.tokens, cells.hashes, trial_key(seed, trial, DRAW))
                parts[name] = embedding[train], embedding[test]
            parts[DEPTH] = baselines.standardised(depth, train, test)
            parts[PCA] = baselines.principal_components(values, train, test)
            for name, (fitted, held_out) in parts.items():
                if nearest:
                    found = probes.nearest_neighbours(fitted, classes, held_out)
                    note(trials.accuracy, (name, KNN), float(np.mean(found == truth)))
                looks = probe_looks(fitted, classes, held_out, truth, n_classes, trial_key(seed, trial, PROBE))
                note(trials.accuracy, (name, LINEAR), max(looks))
                note(trials.last, (name, LINEAR), looks[-1])
                if name != DEPTH:
                    read = probes.read_depth(fitted, depth[train, 0], held_out)
                    note(trials.depth_r2, name, probes.r_squared(depth[test, 0], read[None]))
                advance(1)
            found = baselines.regress_on_genes(values, cells.classes, train, test)
            note(trials.accuracy, (GENES, REGRESSION), float(np.mean(found == truth)))
            found = baselines.majority(classes, len(test))
            note(trials.accuracy, (MAJORITY, NO_PROBE), float(np.mean(found == truth)))
    return trials


def benchmark_aaai2025(
    model: ExpressionModel,
    source: AnnDataSource | anndata.AnnData | Path | str,
    label: str | None = None,
    *,
    values: Values = "counts",
    layer: str | None = None,
    genes_column: str | None = None,
    max_overlap: float = 0.01,
    allow_overlap: bool = False,
    seed: int = 0,
    progress: bool = False,
) -> Table:
    """The table of one model on one labelled set of cells, by the reference's protocol.

    Parameters as in `benchmark_classification`. Of a .pt file with perturbed genes only the linear probe is asked.

    Raises
    ------
    UserError
        If the label can't be used, or too few cells remain.
    """
    options = {"layer": layer, "genes_column": genes_column, "values": values}
    with labelled_source(model, source, label, **options) as (opened, label):
        cells = read_cells(model, opened, label, max_overlap=max_overlap, allow_overlap=allow_overlap, progress=progress)
        if len(cells.classes) * TRAINING_TENTHS // 10 < probes.NEIGHBOURS:
            raise UserError(f"{opened.name}: 70 % of {len(cells.classes)} cells are fewer than the {probes.NEIGHBOURS} "
                            "training cells that k-NN needs: give more labelled cells.")
        nearest = not (isinstance(opened, ReferencePtSource) and label == PERTURBED)
        flagged = flags(opened.obs, label)
        details = {"protocol": _protocol(model), "source": described(opened), **flagged.details()}
        spoken_values = values_sentences(opened)
    networks = {MODEL: model, UNTRAINED: untrained_twin(model, seed)}
    trials = run_trials(cells, networks, seed, nearest=nearest, progress=progress)
    rows = [
        {
            "task": "classification", "dataset": details["source"]["name"], "label": label, "model": name,
            "kind": MODEL_KIND if name == MODEL else BASELINE_KIND, "probe": probe, "protocol": PROTOCOL,
            "overlap": cells.overlap, "values": details["source"]["values"], "accuracy": float(np.mean(scores)),
            "accuracy_sd": float(np.std(scores)), "chosen_on": OPTIMISTIC if probe == LINEAR else None,
            "accuracy_last": float(np.mean(trials.last[name, probe])) if probe == LINEAR else None,
            "depth_r2": float(np.mean(trials.depth_r2[name])) if name in trials.depth_r2 else None,
            "seeds": TRIALS, "cells": len(cells.classes), "classes": len(cells.class_names),
        }
        for (name, probe), scores in trials.accuracy.items()
    ]
    compared = _comparisons(trials)
    details |= {
        **origin(model, cells, seed),
        "comparisons": compared,
        "trials": [
            {"model": name, "probe": probe, "accuracy": scores, "accuracy_last": trials.last.get((name, probe))}
            for (name, probe), scores in trials.accuracy.items()
        ],
    }
    title = f"Classification of {label} in {details['source']['name']}, protocol {PROTOCOL}"
    said = [*_sentences(trials), *sentences_of(compared), *cells.sentences(), *spoken_values, *flagged.sentences]
    return Table(title, rows, COLUMNS, said, details, metric="accuracy")


def _comparisons(trials: Trials) -> list[dict]:
    """The model against the baseline of the highest accuracy. Trials share cells: there is no interval."""
    means = {method: float(np.mean(scores)) for method, scores in trials.accuracy.items()}
    best = max((method for method in means if method[0] != MODEL), key=means.get)
    return [
        compare(Comparison(*method, *best, "accuracy", mean - means[best], None, None))
        for method, mean in means.items() if method[0] == MODEL
    ]


def _sentences(trials: Trials) -> list[str]:
    best, last = (float(np.mean(scores[MODEL, LINEAR])) for scores in (trials.accuracy, trials.last))
    ahead = []
    for (name, probe), scores in trials.accuracy.items():
        if name != MODEL and (MODEL, probe) in trials.accuracy:
            differences = np.subtract(trials.accuracy[MODEL, probe], scores)
            ahead.append(f"{name} with {probe} {differences.mean():+.3f}")
    return [
        f"Optimistic: the linear probe's epoch is chosen by the test cells' own labels, for every row alike. For the trained "
        f"model that is worth {best - last:+.3f} ({best:.3f}; {last:.3f} at the last epoch). Variable genes with "
        f"{REGRESSION} choose nothing.",
        f"Trained model minus {', '.join(ahead)}. The SD is over {TRIALS} random splits by cell, which share cells: it is no "
        "error of the mean, and says nothing of other donors or batches.",
    ]


def _protocol(model: ExpressionModel) -> str:
    return (
        f"{PROTOCOL}: {TRIALS} trials, each with 70 % of the cells to train and 30 % to test, drawn anew by cell; one subset "
        f"of {model.config.max_genes} genes a longer cell and trial, always drawn by weight, nothing masked; "
        f"k-NN: k = {probes.NEIGHBOURS}, Euclidean, uniform; linear: one layer, Adam at {LEARNING_RATE:g}, batches of "
        f"{BATCH_CELLS}, {EPOCHS} epochs, scored on the test part every {LOOK_EVERY}, the best score kept; mean and "
        "population standard deviation over trials; everything else is fitted on training cells"
    )
