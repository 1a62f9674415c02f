"""The model directory of a run, from its files alone: what `pretrain` leaves at its end, and `export` at any checkpoint.

Needs neither DeepSpeed nor a launcher. Read from the run directory:

    config.json                  options of the run
    vocabulary.json, data.json   what the model directory says of the data: these outlive the store
    metrics.jsonl                the validation after the checkpoint's step, if there was one
"""

import dataclasses
import json
import math
from pathlib import Path

import numpy as np

from scbench.config import PretrainConfig
from scbench.data.store import Store
from scbench.data.training_fingerprints import TrainingFingerprints
from scbench.data.vocabulary import Vocabulary
from scbench.errors import UserError
from scbench.files import write_text
from scbench.models.model import ExpressionModel
from scbench.training import checkpoint

NOT_OF_THE_MODEL = {"store", "stage_to", "output", "resume", "json", "debug"}  # a published model carries no path of its maker


def record_data(run: Path, store: Store) -> None:
    """Leave in a run directory what its model directories will say of the data, should the store be gone by then."""
    store.vocabulary.save(run / "vocabulary.json")
    facts = {
        "store_fingerprint": store.fingerprint,
        "sources": store.manifest["sources"],
        "splits": {name: store.split(name).n_cells for name in ("train", "validation", "test")},
    }
    write_text(run / "data.json", json.dumps(facts, indent=2) + "\n")


def read_run(run: Path) -> PretrainConfig:
    """The options that a run was started with; UserError if it has none that can be read."""
    try:
        options = json.loads((run / "config.json").read_text(encoding="utf-8"))
        names = {field.name for field in dataclasses.fields(PretrainConfig)}
        return PretrainConfig(**{name: value for name, value in options.items() if name in names})
    except (OSError, ValueError, TypeError, AttributeError) as error:
        raise UserError(f"{run} is not a run directory (its config.json cannot be read: {error}): "
                        "give what `scbench pretrain` made, or a checkpoint in it.") from error


def read_data(run: Path) -> dict:
    """What `record_data` left: the store's fingerprint, sources and splits. UserError if it is not there."""
    try:
        return json.loads((run / "data.json").read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"{run} does not say what it was trained on (its data.json cannot be read: {error}): copy it, and "
                        "vocabulary.json, from the original run.") from error


def write_model_directory(run: Path, path: Path, directory: Path, store: Store | None) -> int:
    """Write the model of a run's checkpoint `path` to `directory`; returns the checkpoint's step.

    Without the store (None) the leakage guard's part is left out: `training_cells.npy` and `fingerprints/`.

    Raises
    ------
    UserError
        If the run's files cannot be read, or the store is not the one that the run was trained on.
    """
    config = read_run(run)
    facts, vocabulary = read_data(run), Vocabulary.load(run / "vocabulary.json")
    if store is not None and store.fingerprint != facts["store_fingerprint"]:
        raise UserError(f"the store {store.path} is not the one that {run} was trained on: give that one.")
    step = checkpoint.read_state(path)["step"]
    model = ExpressionModel(config.model(vocabulary.size), vocabulary, config.seed)
    model.load_state_dict(checkpoint.model_state(checkpoint.read_tensors(path)))
    training = {name: value for name, value in dataclasses.asdict(config).items() if name not in NOT_OF_THE_MODEL}
    provenance = facts | {"training": training, "steps": step, "batch_cells": config.batch_cells,
                          "validation": _validation(run, step)}
    seen, save_fingerprints = None, None
    if store is not None:
        train = store.split("train")
        splits = [train.first(math.ceil(config.data_share * train.n_cells)), store.split("validation")]
        splits = [split for split in splits if split.n_cells]
        seen = np.concatenate([split.cells(["content_hash"])["content_hash"].to_numpy() for split in splits])
        fingerprints = TrainingFingerprints.of_store(store, splits)
        save_fingerprints = fingerprints and fingerprints.save
    model.save_pretrained(directory, provenance, seen, save_fingerprints)
    return step


def _validation(run: Path, step: int) -> dict[str, float]:
    """What metrics.jsonl says of the validation after `step` steps; nothing if there was none."""
    file = run / "metrics.jsonl"
    for line in file.read_text(encoding="utf-8").splitlines() if file.is_file() else []:
        try:
            row = json.loads(line)
        except ValueError:
            continue  # the half-written last row of a killed run
        values = {name.removeprefix("validation_"): value for name, value in row.items() if name.startswith("validation_")}
        if values and row.get("step") == step:
            return values
    return {}
