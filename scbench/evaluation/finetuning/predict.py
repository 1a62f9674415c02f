"""Labels of new cells by a finetuned model, and the verb `scbench predict`."""

import json
import shutil
import sys
from pathlib import Path
from typing import NamedTuple

import anndata
import h5py
import numpy as np
import pandas as pd

from scbench import __version__
from scbench.config import PredictConfig
from scbench.data.sources.anndata import AnnDataSource
from scbench.errors import UserError
from scbench.evaluation import embed, embedding_files
from scbench.evaluation.finetuning import calibration
from scbench.evaluation.finetuning.finetune import apply
from scbench.files import published_file, refuse_existing
from scbench.models import classifier as classifiers
from scbench.models.classifier import UNASSIGNED, Classifier
from scbench.models.model import ExpressionModel

LABEL, PROBABILITY, ABOUT = "scbench_label", "scbench_probability", "scbench_predict"  # columns of obs; key of uns


class Predictions(NamedTuple):
    """What is said of each cell."""

    labels: pd.Categorical  # the classes, and UNASSIGNED
    probabilities: np.ndarray  # float32 [cells], calibrated, of the most probable class, assigned or not
    about: dict  # JSON-able

    def counts(self) -> dict[str, int]:
        """Cells of each label, the most frequent first."""
        counts = pd.Series(self.labels).value_counts()
        return {str(label): int(cells) for label, cells in counts.items() if cells}


def load_classifier(directory: Path) -> tuple[ExpressionModel, Classifier, dict]:
    """A finetuned model, its classifier and what is known of it; UserError if it has none, or another model's."""
    model = embed.load_model(directory)
    classifier, about = classifiers.load(directory, model.config.width)
    if about["model_fingerprint"] != embed.fingerprint(model):
        raise UserError(f"the classifier in {directory} was trained on another model: copy the whole directory again.")
    return model, classifier.to(embed.device_of(model)), about


def predict_labels(
    model: ExpressionModel,
    classifier: Classifier,
    about: dict,
    source: AnnDataSource | anndata.AnnData | Path | str,
    *,
    layer: str | None = None,
    genes_column: str | None = None,
    batch_cells: int = embed.BATCH_CELLS,
    progress: bool = False,
) -> Predictions:
    """Labels of all cells, in the order of the source.

    Parameters
    ----------
    model, classifier, about
        As `load_classifier` gives them.
    source, layer, genes_column, batch_cells, progress
        As in `scbench.embed`.

    Raises
    ------
    UserError
        As `scbench.embed`.
    """
    with embed.opened(source, layer=layer, genes_column=genes_column) as opened:
        embedding = embed.embed_source(
            model, opened, seed=about["options"]["seed"], batch_cells=batch_cells, progress=progress
        )
        name = opened.name
    logits, distances = apply(classifier, embedding.values)
    shares = calibration.probabilities(logits, about["temperature"])
    codes, best = shares.argmax(axis=1), shares.max(axis=1)
    codes[(best < about["threshold"]) | (distances > about["largest_distance"])] = len(about["classes"])
    labels = pd.Categorical.from_codes(codes, [*about["classes"], UNASSIGNED])
    kept = ("label", "classes", "temperature", "threshold", "largest_distance", "rule", "model_fingerprint")
    facts = {"scbench_version": __version__, "source": name, **{field: about[field] for field in kept},
             "embedding": embedding.provenance}
    return Predictions(labels, best.astype(np.float32), facts)


def write_predictions(original: Path, path: Path, predictions: Predictions) -> None:
    """Copy an h5ad file byte by byte and add obs["scbench_label"], obs["scbench_probability"] and uns["scbench_predict"]
    (JSON); older ones of these names are replaced, nothing else changes."""
    with published_file(path) as partial:
        shutil.copyfile(original, partial)
        with h5py.File(partial, "r+") as file:
            embedding_files.put(file, "obs", LABEL, predictions.labels, original)
            embedding_files.put(file, "obs", PROBABILITY, predictions.probabilities, original)
            embedding_files.put(file, "uns", ABOUT, json.dumps(predictions.about), original)
            columns = [column for column in file["obs"].attrs["column-order"] if column not in (LABEL, PROBABILITY)]
            file["obs"].attrs["column-order"] = np.array([*columns, LABEL, PROBABILITY], dtype=h5py.string_dtype())


def run_predict(config: PredictConfig) -> dict:
    """`scbench predict`: write the labelled copy, and return how many cells have which label."""
    refuse_existing(config.output)
    embedding_files.check_suffix(config.output, only_embedding=False)
    model, classifier, about = load_classifier(config.model)
    with embed.opened(config.input, layer=config.layer, genes_column=config.genes_column) as source:
        if source.kind != "h5ad":
            raise UserError(f"only of an h5ad file a labelled copy is written: save {source.name} as one.")
        predictions = predict_labels(
            model, classifier, about, source, batch_cells=config.batch_cells, progress=not config.json
        )
    write_predictions(config.input, config.output, predictions)
    counts, cells = predictions.counts(), len(predictions.labels)
    if empty := predictions.about["embedding"]["cells_without_known_genes"]:
        print(f"warning: {config.input.name}: {empty} of {cells} cells express no gene that the model knows; all get one "
              "label.", file=sys.stderr)
    if not config.json:
        said = ", ".join(f"{label} {number:,}" for label, number in counts.items())
        print(f"{cells:,} cells labelled in a copy of {config.input.name}: {config.output}\n{said}\n"
              f"A cell is {UNASSIGNED} {about['rule']}.")
    return {"output": str(config.output), "cells": cells, "labels": counts, **predictions.about}
