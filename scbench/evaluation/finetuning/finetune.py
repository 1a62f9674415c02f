"""A classifier of cells on a pretrained model, and the verb `scbench finetune`.

A fifth of the labelled cells, stratified, is for validation: it decides when training stops, and sets the temperature and the
threshold. So the figures of these cells are a little optimistic; new cells judge (`scbench predict`). One process, fp32.
"""

import copy
import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Literal, NamedTuple

import anndata
import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from scbench import __version__
from scbench.config import FinetuneConfig
from scbench.data.cells import take
from scbench.data.sources.anndata import AnnDataSource
from scbench.data.training_fingerprints import TrainingFingerprints
from scbench.errors import DivergedError, UserError
from scbench.evaluation import baselines, embed
from scbench.evaluation.finetuning import calibration
from scbench.evaluation.fingerprint_cells import fingerprint_cells
from scbench.evaluation.labelled_cells import LabelledCells, ModelCells, read_cells
from scbench.evaluation.progress import progress_bar
from scbench.evaluation.report import Column, IntervalColumn, Table, screen
from scbench.evaluation.scores import interval_fields, score, stratified_folds
from scbench.files import published_directory, refuse_existing
from scbench.kernels import random
from scbench.kernels.random import Stream
from scbench.models import classifier as classifiers
from scbench.models.classifier import UNASSIGNED, Classifier
from scbench.models.model import ExpressionModel
from scbench.training.schedule import learning_rate

VALIDATION_FOLDS = 5  # one of them is for validation
EPOCHS = {"all": 50, "head": 200}
RATES = {"all": 5e-3, "head": 2e-2}  # of the head
PATIENCE = 5  # epochs without a lower validation loss
ENCODER_RATE = 0.1  # of the head's learning rate
WARMUP_SHARE = 0.05  # of all steps
WEIGHT_DECAY, CLIP = 0.01, 1.0
_FINETUNING = 11  # what a key of Stream.EVALUATION decides, beside those of scores.py and entrants.py

COLUMNS = [
    Column("model", ("model",)),
    IntervalColumn("accuracy", ("accuracy",), "{:.3f}"),
    IntervalColumn("macro-F1", ("macro_f1",), "{:.3f}"),
]


class Finetuned(NamedTuple):
    """A model with a classifier."""

    model: ExpressionModel
    classifier: Classifier
    about: dict  # JSON-able, of classifier.json
    fingerprints: TrainingFingerprints  # of the cells that it was trained on

    def save(self, directory: Path) -> None:
        """Write the model directory with its classifier (which must not exist), published by one rename."""
        refuse_existing(directory)
        model = self.model
        # the guard has to know the cells of both trainings; where those of the first are unknown, nothing can be said
        seen = save_fingerprints = None
        if model.training_cells is not None:
            content = np.concatenate([block["content"] for block in self.fingerprints.blocks()])
            seen = np.concatenate([model.training_cells, content])
            if model.training_fingerprints is not None:
                known = TrainingFingerprints.load(model.training_fingerprints, model.training_cells)
                if known.genes == self.fingerprints.genes:
                    save_fingerprints = known.joined(self.fingerprints).save
        with published_directory(directory) as partial:
            model.save_pretrained(partial, model.provenance, seen, save_fingerprints)
            classifiers.save(self.classifier, self.about, partial)

    def table(self) -> Table:
        """How the validation cells were classified, beside two baselines fitted on the same training cells."""
        about = self.about
        chosen, split = about["validation"], about["split"]
        said = [
            f"Trained on {split['train']:,} cells, stopped after {about['epochs']} epochs; epoch {about['best_epoch']} is "
            f"kept, whose loss on the {split['validation']:,} validation cells is lowest. They also set the threshold, so "
            "their figures are a little optimistic.",
            f"A cell is {UNASSIGNED} {about['rule']}. Of the assigned "
            f"validation cells {chosen['assigned_accuracy']:.1%} are right; expected calibration error "
            f"{chosen['calibration_error']:.3f} at temperature {about['temperature']:.2f}.",
            *about["sentences"],
        ]
        return Table(f"Finetuned on {about['label']} of {about['source']['name']}", about["rows"], COLUMNS, said, {})


def finetune(
    model: ExpressionModel,
    source: AnnDataSource | anndata.AnnData | Path | str,
    label: str,
    *,
    train: Literal["all", "head"] = "all",
    layer: str | None = None,
    genes_column: str | None = None,
    epochs: int | None = None,
    batch_cells: int = 64,
    lr: float | None = None,
    coverage: float = 0.95,
    seed: int = 0,
    progress: bool = False,
) -> Finetuned:
    """A model with a classifier of one column of obs. The given model stays as it is.

    Parameters
    ----------
    model
        The pretrained model; its device is used.
    source
        Raw counts and labels.
    label
        Column of obs. Missing labels, exact duplicates and classes under 10 cells are left out.
    train
        "all": the whole model and the head; "head": only the head, on embeddings of the frozen model.
    layer, genes_column
        As in `scbench.embed`.
    epochs, batch_cells, lr
        Most passes over the training cells (by default 50, of the head alone 200), cells of a step, and the head's peak
        learning rate (0.005, alone 0.02; AdamW, warm-up, cosine; the rest of the model learns at a tenth of it).
    coverage
        Share of the validation cells that the threshold leaves assigned.
    seed
        Of the split, the order of cells, the gene draws and dropout: the same seed gives the same bits.
    progress
        Show a progress bar if on a terminal.

    Raises
    ------
    UserError
        If the label can't be used, too few cells remain, or the loss is no number any more.
    """
    with embed.opened(source, layer=layer, genes_column=genes_column) as opened:
        cells = read_cells(model, opened, label, max_overlap=1, allow_overlap=True, progress=progress)
        if UNASSIGNED in cells.class_names:
            raise UserError(f"column {label!r} of {opened.name} has a class {UNASSIGNED!r}, which `scbench predict` calls "
                            "cells that it leaves open: rename it, or leave those cells without a label.")
        fingerprints = fingerprint_cells(opened, model.vocabulary, np.sort(cells.hashes), progress)
        origin = {"name": opened.name, "layer": opened.layer, "recovered_counts": opened.recovered}
    held_out = stratified_folds(cells.classes, cells.keys, VALIDATION_FOLDS, seed, 0) == 0  # as the benchmark's first fold
    network = _copy(model, seed)
    classifier = Classifier(model.config.width, len(cells.class_names)).to(embed.device_of(model))
    rows = np.flatnonzero(~held_out), np.flatnonzero(held_out)
    epochs, lr = EPOCHS[train] if epochs is None else epochs, RATES[train] if lr is None else lr
    options = {"epochs": epochs, "batch_cells": batch_cells, "lr": lr, "seed": seed, "progress": progress}
    ran, best = _train(network, classifier, cells, *rows, whole=train == "all", **options)
    about = {
        "scbench_version": __version__, "label": label, "classes": cells.class_names, "train": train,
        "model_fingerprint": embed.fingerprint(network), "started_from": embed.fingerprint(model),
        "source": origin, "epochs": ran, "best_epoch": best,
        "options": {"epochs": epochs, "batch_cells": batch_cells, "lr": lr, "seed": seed},
        **_judge(network, classifier, cells, *rows, coverage, seed),
        "split": {"train": len(rows[0]), "validation": len(rows[1]), "sha256": _split_digest(cells.keys, held_out)},
        "cells": {**cells.counted, "seen": cells.seen, "classes": cells.class_sizes(),
                  "dropped_classes": cells.dropped_classes},
        "sentences": _sentences(cells),
    }
    network.provenance = model.provenance | {
        "finetuning": {name: about[name] for name in ("label", "train", "started_from", "source", "epochs", "options")}
    }
    return Finetuned(network, classifier, about, fingerprints)


def _copy(model: ExpressionModel, seed: int) -> ExpressionModel:
    """The same model, with another seed of dropout."""
    network = ExpressionModel(model.config, model.vocabulary, random.key(seed, Stream.EVALUATION, _FINETUNING) >> 1)
    network.load_state_dict(model.state_dict())
    network.provenance = model.provenance  # says how genes are drawn
    network.training_cells, network.training_fingerprints = model.training_cells, model.training_fingerprints
    return network.to(embed.device_of(model)).eval()


def _train(
    network: ExpressionModel, classifier: Classifier, cells: ModelCells, train: np.ndarray, held_out: np.ndarray, *,
    whole: bool, epochs: int, batch_cells: int, lr: float, seed: int, progress: bool,
) -> tuple[int, int]:
    """Train both in place and put back the epoch of the lowest validation loss; epochs that ran, and the best one's number."""
    with progress_bar("embedding", len(cells.hashes), progress) as advance:  # to start from, or to learn from
        values = embed.encode(network, cells.tokens, cells.hashes, seed=seed, draws=1 if whole else None, advance=advance)
    frozen = torch.from_numpy(values).to(embed.device_of(network))
    start = frozen[torch.from_numpy(train)]
    classifier.mean.copy_(start.mean(0))
    classifier.scale.copy_(start.std(0).clamp(min=1e-6))
    classes = torch.from_numpy(cells.classes).to(frozen.device)
    trained = nn.ModuleList([network, classifier] if whole else [classifier])
    optimizer = torch.optim.AdamW(_parameter_groups(trained, classifier), weight_decay=0.0)
    steps_an_epoch = -(-len(train) // batch_cells)
    steps, step = epochs * steps_an_epoch, 0
    embeddings = _drawn(network, cells, seed) if whole else lambda rows, _: frozen[torch.from_numpy(rows)]
    lowest, best, kept = float("inf"), 0, None
    with progress_bar("finetuning", steps, progress) as advance:
        for epoch in range(epochs):
            trained.train()
            key = random.key(seed, Stream.EVALUATION, _FINETUNING, epoch)
            order = train[np.argsort(random.bits(key, cells.hashes[train]))]  # by content: the file's order means nothing
            for first in range(0, len(order), batch_cells):
                rows = order[first : first + batch_cells]
                rate = learning_rate(step, steps, lr, round(WARMUP_SHARE * steps))
                for group in optimizer.param_groups:
                    group["lr"] = rate * group["share"]
                loss = F.cross_entropy(classifier(embeddings(rows, epoch)), classes[torch.from_numpy(rows)])
                optimizer.zero_grad()
                loss.backward()
                nn.utils.clip_grad_norm_(trained.parameters(), CLIP)
                optimizer.step()
                step += 1
                advance(1)
            trained.eval()
            loss = _loss(network, classifier, cells, held_out, None if whole else frozen, seed)
            if not np.isfinite(loss):
                raise DivergedError(f"the loss is {loss} after epoch {epoch + 1}: give a lower --lr than {lr}.")
            if loss < lowest:
                lowest, best, kept = loss, epoch + 1, copy.deepcopy(trained.state_dict())
            elif epoch + 1 - best >= PATIENCE:
                break
    trained.load_state_dict(kept)
    return epoch + 1, best


def _parameter_groups(trained: nn.Module, classifier: Classifier) -> list[dict]:
    """Head and encoder with their shares of the learning rate; matrices decay, as in pretraining."""
    head = {id(parameter) for parameter in classifier.parameters()}
    groups: dict[tuple[bool, bool], list[Tensor]] = {}
    for name, parameter in trained.named_parameters():
        matrix = parameter.ndim >= 2 and not name.endswith(("table", "logarithm"))
        groups.setdefault((id(parameter) in head, matrix), []).append(parameter)
    return [
        {"params": parameters, "share": 1.0 if of_head else ENCODER_RATE, "weight_decay": WEIGHT_DECAY if matrix else 0.0}
        for (of_head, matrix), parameters in groups.items()
    ]


def _drawn(network: ExpressionModel, cells: ModelCells, seed: int) -> Callable[[np.ndarray, int], Tensor]:
    """Embeddings, with gradients, of some rows in an epoch: each epoch draws other genes of long cells, and drops others."""
    sampler = embed.sampler_of(network, network.config.inputs, seed)
    device = embed.device_of(network)

    def embeddings(rows: np.ndarray, epoch: int) -> Tensor:
        keys = random.bits(cells.hashes[rows], epoch)
        drawn = sampler.draw(take(cells.tokens, rows), keys)
        batch = sampler.pack(drawn, np.arange(len(rows)), keys.view(np.int64), rows)
        return network.encode(batch.to(device))

    return embeddings


@torch.no_grad()
def _loss(
    network: ExpressionModel, classifier: Classifier, cells: ModelCells, rows: np.ndarray, frozen: Tensor | None, seed: int
) -> float:
    """The mean cross-entropy of some rows; each cell as one fixed draw of its genes shows it, or as its frozen embedding."""
    if frozen is None:
        values = embed.encode(network, take(cells.tokens, rows), cells.hashes[rows], seed=seed, draws=1)
        embeddings = torch.from_numpy(values).to(classifier.mean.device)
    else:
        embeddings = frozen[torch.from_numpy(rows)]
    return calibration.cross_entropy(classifier(embeddings).double().cpu().numpy(), cells.classes[rows])


@torch.no_grad()
def apply(classifier: Classifier, embeddings: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Logits, float32 [cells, classes], and distances from the nearest class, float32 [cells], of embeddings [cells, D]."""
    values = torch.from_numpy(embeddings).to(classifier.mean.device)
    return classifier(values).cpu().numpy(), classifier.distances(values).cpu().numpy()


def _judge(
    network: ExpressionModel, classifier: Classifier, cells: ModelCells, train: np.ndarray, held_out: np.ndarray,
    coverage: float, seed: int,
) -> dict:
    """Place the classes of the training cells; temperature, limits and figures of the validation cells, JSON-able. All are
    embedded as `scbench predict` does it."""
    truth = cells.classes[held_out]
    values = embed.encode(network, cells.tokens, cells.hashes, seed=seed)
    device = classifier.mean.device
    classifier.place(torch.from_numpy(values[train]).to(device), torch.from_numpy(cells.classes[train]).to(device))
    logits, distances = apply(classifier, values[held_out])
    temperature = calibration.fit_temperature(logits, truth)
    shares = calibration.probabilities(logits, temperature)
    best, right = shares.max(axis=1), shares.argmax(axis=1) == truth
    threshold, largest = calibration.limits(best, distances, coverage)
    assigned = (best >= threshold) & (distances <= largest)
    values = baselines.log_normalise(cells.counts)
    predictions = {
        "finetuned model": shares.argmax(axis=1),
        "variable genes": baselines.regress_on_genes(values, cells.classes, train, held_out),
        "majority class": baselines.majority(cells.classes[train], len(held_out)),
    }
    scores = score(truth, {name: predicted[None] for name, predicted in predictions.items()}, seed)
    rows = []
    for name, values in scores.items():
        row = {"model": name, "cells": len(held_out)}
        for field, samples in values._asdict().items():
            row |= interval_fields(field, samples)
        rows.append(row)
    return {
        "temperature": temperature, "threshold": threshold, "largest_distance": largest, "coverage": coverage,
        "rule": f"if its probability is under {threshold:.3f} or it lies more than {largest:.1f} standard deviations from "
                f"every class: the strictest limits, alike for both, that leave {coverage:.0%} of validation cells assigned",
        "validation": {
            "loss": calibration.cross_entropy(logits / temperature, truth),
            "accuracy": float(right.mean()),
            "assigned": float(assigned.mean()), "assigned_accuracy": float(right[assigned].mean()),
            "calibration_error": calibration.calibration_error(best, right),
            "assigned_by_class": {
                name: float(assigned[truth == number].mean()) for number, name in enumerate(cells.class_names)
            },
        },
        "rows": rows,
    }


def _sentences(cells: ModelCells) -> list[str]:
    said = LabelledCells.sentences(cells)  # what a benchmark says of seen cells is not what matters here
    if seen := sum(cells.seen.values()):
        said.append(f"{seen:,} of the labelled cells were in pretraining too: the figures of validation cells may profit.")
    return said


def _split_digest(keys: np.ndarray, held_out: np.ndarray) -> str:
    """SHA-256 of the hash of each cell's id and its split (1: validation), in the order of the hashes."""
    order = np.argsort(keys)
    digest = hashlib.sha256(keys[order].astype("<u8").tobytes())
    digest.update(held_out[order].astype("u1").tobytes())
    return digest.hexdigest()


def run_finetune(config: FinetuneConfig) -> dict:
    """`scbench finetune`: write the model directory to --output, show the figures of the validation cells, return them."""
    refuse_existing(config.output)
    model = embed.load_model(config.model)
    finetuned = finetune(
        model, config.input, config.label, train=config.train, layer=config.layer, genes_column=config.genes_column,
        epochs=config.epochs, batch_cells=config.batch_cells, lr=config.lr, coverage=config.coverage, seed=config.seed,
        progress=not config.json,
    )
    finetuned.save(config.output)
    if not config.json:
        console = screen()
        finetuned.table().show(console)
        console.print(f"Written to {config.output}: use it by `scbench predict {config.output} NEW.h5ad OUT.h5ad`")
    return {"output": str(config.output), **json.loads(json.dumps(finetuned.about))}
