"""The runs of a comparison. Each leaves a file when it is done, and a file that is there is not made again.

    runs/ROW/plan.json       what the row costs and how many steps its budget buys
    runs/ROW/pilot/          a few steps whose time is measured, if the budget is in seconds
    runs/ROW/rate-R/         a fifth of the budget at learning rate R
    runs/ROW/rates.json      what each rate gave, and which one was chosen
    runs/ROW/seed-K/         the runs of the table (as `scbench pretrain` leaves them, without checkpoints)
    runs/ROW/seed-K/result.json
"""

import gc
import json
import math
import shutil
import statistics
from collections.abc import Callable
from pathlib import Path

import numpy as np

from scbench.config import CompareConfig
from scbench.data.store import Store
from scbench.errors import DivergedError
from scbench.evaluation import embed
from scbench.evaluation.baselines import COMPONENTS
from scbench.evaluation.classification.probing import DEPTH, KNN, LINEAR, PCA, depth_r2, pca_name, predict
from scbench.evaluation.compare.cost import cost_of, steps_of
from scbench.evaluation.compare.plan import Row, pretrain_options
from scbench.evaluation.folds import check_parts, fold_parts
from scbench.evaluation.labelled_cells import ModelCells
from scbench.evaluation.masked.evaluate import evaluate_baselines, evaluate_model
from scbench.evaluation.scores import stratified_folds
from scbench.files import write_text
from scbench.models.model import ExpressionModel
from scbench.training.pretrain import pretrain

PILOT_STEPS = 20
SEARCH_SHARE = 5  # a rate is tried on one part in so many of the budget
FOLDS = 5
HEADS = ("mvc", "regression")
ERRORS = {"loss": "mse", "value_weighted": "value_weighted", "relative": "relative", "weighted_draw": "weighted_mse"}
PROBES = {"knn_accuracy": KNN, "linear_accuracy": LINEAR}


def run_row(
    config: CompareConfig, store: Store, row: Row, cells: ModelCells | None, say: Callable[[str], None]
) -> dict:
    """Train and evaluate all runs of a row, as far as that is not done.

    Returns {"plan": …, "rates": …, "runs": [the result of each seed that did not diverge], "diverged": [the other seeds]}.
    """
    directory = config.output / "runs" / row.name
    planned = _once(directory / "plan.json", lambda: _plan(config, store, row, directory))
    rates = _once(directory / "rates.json", lambda: _search(config, store, row, directory, planned["steps"], say))
    runs, diverged = [], []
    for number in range(config.seeds if rates["chosen"] is not None else 0):
        run = directory / f"seed-{number}"
        result = _once(run / "result.json", lambda run=run, number=number: _final(
            config, store, row, run, planned["steps"], rates["chosen"], config.seed + number, cells
        ))
        (diverged if result.get("diverged") else runs).append(result)
        loss = result.get("mvc_loss") if result.get("mvc_loss") is not None else result.get("regression_loss")
        say(f"{row.name}, seed {config.seed + number}: {planned['steps']:,} steps at rate {rates['chosen']:g}, "
            + ("diverged" if loss is None else f"test loss {loss:.4f}"))
    return {"plan": planned, "rates": rates, "runs": runs, "diverged": [result["seed"] for result in diverged]}


def baseline_rows(config: CompareConfig, store: Store, cells: ModelCells | None) -> dict:
    """What needs no model: {"errors": rows of `Evaluation.rows`, "probes": {name: fields}}."""
    def measure() -> dict:
        evaluation = evaluate_baselines(
            store, max_genes=config.max_genes, cells=config.evaluation_cells, seed=config.seed
        )
        probed = {}
        if cells is not None:
            fields = _probe(config, cells, {}, (DEPTH, PCA))
            probed = {name: fields[shown] for name, shown in [(DEPTH, DEPTH), (PCA, pca_name(COMPONENTS))]}
        return {"errors": evaluation.rows(), "law": evaluation.law._asdict(), "probes": probed}

    return _once(config.output / "baselines.json", measure)


def _once(path: Path, make: Callable[[], dict]) -> dict:
    """The JSON object in `path`, made first if it is not there."""
    if not path.is_file():
        write_text(path, json.dumps(make(), indent=2) + "\n")
    return json.loads(path.read_text(encoding="utf-8"))


def _plan(config: CompareConfig, store: Store, row: Row, directory: Path) -> dict:
    cost = cost_of(pretrain_options(config, row, seed=config.seed, steps=1), store)
    seconds = None
    if config.budget_seconds is not None:
        pilot = _train(config, store, row, directory / "pilot", steps=PILOT_STEPS, seed=config.seed, lr=config.rates()[0])
        seconds = statistics.median(_step_seconds(pilot, config.batch_cells)[PILOT_STEPS // 4:])
    return {**cost._asdict(), "seconds_per_step": seconds, "steps": steps_of(config, cost, seconds)}


def _search(
    config: CompareConfig, store: Store, row: Row, directory: Path, steps: int, say: Callable[[str], None]
) -> dict:
    """Try each learning rate on a part of the budget; the loss of masked genes of validation cells decides."""
    rates = config.rates()
    if len(rates) == 1:
        return {"tried": [], "chosen": rates[0], "steps": 0, "seconds": 0.0}
    part = max(1, round(steps / SEARCH_SHARE))
    tried = []
    for rate in rates:
        run = directory / f"rate-{rate:g}"
        loss, seconds = None, None
        try:
            _train(config, store, row, run, steps=part, seed=config.seed, lr=rate)
            model = embed.load_model(run / "model")
            losses = _losses(config, model, store, "validation")
            loss = losses["regression_loss"] if losses["mvc_loss"] is None else losses["mvc_loss"]
            seconds = sum(_step_seconds(run, config.batch_cells))
        except DivergedError:
            pass
        tried.append({"lr": rate, "validation_loss": loss, "seconds": seconds})
        say(f"{row.name}, rate {rate:g} on {part:,} steps: " + ("diverged" if loss is None else f"validation loss {loss:.4f}"))
    finite = [trial for trial in tried if trial["validation_loss"] is not None]
    best = min(finite, key=lambda trial: trial["validation_loss"])["lr"] if finite else None
    return {"tried": tried, "chosen": best, "steps": part * len(rates),
            "seconds": sum(trial["seconds"] for trial in finite)}


def _final(
    config: CompareConfig, store: Store, row: Row, run: Path, steps: int, rate: float, seed: int,
    cells: ModelCells | None,
) -> dict:
    """Train one run of the table and measure it on the test split."""
    try:
        _train(config, store, row, run, steps=steps, seed=seed, lr=rate)
    except DivergedError:
        return {"seed": seed, "diverged": True}
    model = embed.load_model(run / "model")
    seconds = _step_seconds(run, config.batch_cells)
    result = {
        "seed": seed, "lr": rate, "steps": steps, "seconds": sum(seconds),
        "cells_per_second": config.batch_cells / statistics.median(seconds), **_losses(config, model, store, "test"),
        **dict.fromkeys((*PROBES, "depth_r2")),
    }
    if cells is not None:
        embedding = embed.encode(model, cells.tokens, cells.hashes, seed=config.seed)
        result |= _probe(config, cells, {row.name: [embedding]}, ())[row.name]
    return result


def _train(config: CompareConfig, store: Store, row: Row, run: Path, **options) -> Path:
    """An ordinary pretraining run in `run`, which goes on if it was stopped and is not repeated if it is done."""
    if not (run / "model").is_dir():
        if run.is_dir() and not (run / "config.json").is_file():
            shutil.rmtree(run)  # stopped before it began
        chosen = pretrain_options(config, row, **options)
        fields = {name: value for name, value in vars(chosen).items() if name not in ("store", "output", "epochs")}
        fields |= {
            "resume": True, "keep_last": 1, "checkpoint_every": max(1, math.ceil(chosen.steps / 4)),
            "validate_every": chosen.steps, "validation_cells": config.evaluation_cells,
        }
        pretrain(store, run, **fields)
        gc.collect()  # an engine holds itself in a circle
    shutil.rmtree(run / "checkpoints", ignore_errors=True)
    return run


def _step_seconds(run: Path, batch_cells: int) -> list[float]:
    """What each step of a run took; validation is not in it."""
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    return [batch_cells / row["cells_per_second"] for row in rows if "cells_per_second" in row]


def _losses(config: CompareConfig, model: ExpressionModel, store: Store, split: str) -> dict[str, float | None]:
    """The errors of both heads on masked genes of a split, in log1p counts; None for a head that the model lacks."""
    evaluation = evaluate_model(
        model, store, split=split, cells=config.evaluation_cells, max_genes=config.max_genes, seed=config.seed
    )
    found = {row["method"]: row for row in evaluation.rows()}
    return {f"{head}_{name}": found[head][field] if head in found else None
            for head in HEADS for name, field in ERRORS.items()}


def _probe(
    config: CompareConfig, cells: ModelCells, embeddings: dict[str, list[np.ndarray]], beside: tuple[str, ...]
) -> dict[str, dict[str, float | None]]:
    """The fields that probes of each embedding and baseline give, by its name; UserError if the cells are too few."""
    fold = stratified_folds(cells.classes, cells.keys, FOLDS, config.seed, 0)
    parts = [fold_parts(fold, number, FOLDS) for number in range(FOLDS)]
    for one in parts:
        check_parts(one, cells, f"the test split of {config.store}")
    found = predict(cells, embeddings, [parts], config.seed, False, beside=beside)
    r2 = depth_r2(cells, found.depths)
    return {
        name: {
            **{field: float((found.predictions[name, probe] == cells.classes).mean()) for field, probe in PROBES.items()},
            "depth_r2": r2.get(name),
        }
        for name, _ in found.predictions
    }
