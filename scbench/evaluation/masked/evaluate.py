"""Masked-gene errors of a model on held-out cells, and the verb `scbench evaluate`.

One law for every model, whatever its structure, recipe, values and normalisation (see genes.py): the same cells, genes
and masks, errors in log1p counts, beside three baselines fitted on the store's training split. The 95 % intervals come
from a bootstrap over cells that is the same for all methods; they cover the choice of cells, not of training runs.
"""

import dataclasses
import platform
from collections.abc import Callable
from importlib.metadata import version
from typing import NamedTuple

import numpy as np

from scbench import __version__
from scbench.config import EvaluateConfig, InputLaw, ModelConfig
from scbench.data.sampler import CellSampler, Sampled, decode
from scbench.data.store import Split, Store
from scbench.data.values import effective_bins, quantile_bins
from scbench.data.vocabulary import Vocabulary
from scbench.errors import UserError
from scbench.evaluation import embed
from scbench.evaluation.guard import NOT_CHECKABLE, TRANSDUCTIVE, UNSEEN
from scbench.evaluation.masked.baselines import CELL_OFFSET, TrainingGenes
from scbench.evaluation.masked.errors import GENES, Errors, bootstrap, error_sums, metrics
from scbench.evaluation.masked.genes import DRAWS, UNIFORM, EvaluationLaw, genes_of, stored_cells
from scbench.evaluation.progress import progress_bar
from scbench.evaluation.report import Column, IntervalColumn, Table, screen
from scbench.evaluation.scores import RESAMPLES, interval_fields, verdict
from scbench.files import refuse_existing
from scbench.models.model import ExpressionModel

REGRESSION, MVC = "regression", "mvc"  # a model's heads: fields of its output
SPOKEN = {REGRESSION: "regression head", MVC: "MVC head"}
BATCH_CELLS = 64

COLUMNS = [
    Column("predicted by", ("method",)),
    IntervalColumn("MSE", ("mse",), "{:.4f}"),
    Column("count 1", ("mse_count_1",), "{:.3f}"),
    Column("2–10", ("mse_count_2_10",), "{:.3f}"),
    Column("over 10", ("mse_count_over_10",), "{:.3f}"),
    Column("by value", ("value_weighted",), "{:.4f}"),
    Column("relative", ("relative",), "{:.4f}"),
    IntervalColumn("MSE, weighted draw", ("weighted_mse",), "{:.4f}"),
    Column("overlap", ("overlap",)),
]


class Evaluation(NamedTuple):
    """Errors on the masked genes of one law: of the heads of a model, or of the baselines."""

    law: EvaluationLaw
    errors: Errors  # method → draw → sums of each cell
    overlapping: int | None = 0  # evaluated cells that the model was trained or validated on; None if it does not say
    effective_bins: float | None = None  # distinct bins of a cell, mean over cells; None if the model's values are no bins

    @property
    def overlap(self) -> str:
        """Whether the cells are new to the model."""
        return NOT_CHECKABLE if self.overlapping is None else TRANSDUCTIVE if self.overlapping else UNSEEN

    def rows(self) -> list[dict]:
        """One row a method, JSON-able: its errors under the uniform draw, and under the weighted one (`weighted_…`)."""
        samples = bootstrap(self.errors, self.law.seed)
        rows = []
        for method, by_draw in self.errors.items():
            row = {"method": method, "overlap": self.overlap}
            for draw, sums in by_draw.items():
                fields = {**metrics(sums), **interval_fields("mse", samples[method, draw])}
                row |= fields if draw == UNIFORM else {f"{draw}_{name}": value for name, value in fields.items()}
            rows.append(row)
        return rows


def evaluate_model(
    model: ExpressionModel,
    store: Store,
    *,
    split: str = "test",
    cells: int = 4096,
    max_genes: int | None = None,
    mask_ratio: float = 0.4,
    seed: int = 0,
    progress: bool = False,
) -> Evaluation:
    """Errors of a model's heads, "regression" and "mvc": those that it has.

    Parameters
    ----------
    model
        A pretrained model; its device is used, its training mode is left as it is.
    store
        An open store on the model's vocabulary.
    split, cells
        "test" or "validation", and how many of its cells: the first ones.
    max_genes
        Longer cells are sampled; by default what the model was trained with. Part of the law: give one number to compare
        models.
    mask_ratio
        Probability that a gene is masked.
    seed
        Of draws, masks and bootstrap.
    progress
        Show a progress bar if on a terminal.

    Raises
    ------
    UserError
        If the split is empty, the store has another vocabulary, the model can't take so many genes, or its predictions are
        not finite.
    """
    config = model.config
    max_genes = config.max_genes if max_genes is None else max_genes
    if store.vocabulary != model.vocabulary:
        raise UserError(
            f"the store {store.path} has another vocabulary than the model: prepare it with --vocabulary and the model's "
            "vocabulary.json."
        )
    if config.structure == "linear_mixer" and max_genes > config.max_genes:
        raise UserError(f"--max-genes is {max_genes}: this linear_mixer has weights for {config.max_genes} genes only.")
    held_out = _held_out(store, split, cells)
    law = EvaluationLaw(store.fingerprint, split, held_out.n_cells, max_genes, mask_ratio, seed)
    heads = [name for name, there in [(REGRESSION, config.regression), (MVC, config.mvc)] if there]

    def predict(sampler: CellSampler, sampled: Sampled, numbers: np.ndarray) -> dict[str, np.ndarray]:
        batch = sampler.pack(sampled, np.arange(len(numbers)), numbers, numbers)
        output = model(batch.to(embed.device_of(model)))
        predictions = {head: getattr(output, head).float().cpu().numpy() for head in heads}
        if not all(np.isfinite(values).all() for values in predictions.values()):
            raise UserError("the model's predictions are not finite numbers: its weights are damaged, train or copy it again.")
        return {head: decode(values, sampled, sampler.inputs) for head, values in predictions.items()}

    with embed.evaluating(model):
        errors = _errors(law, held_out, store.vocabulary, config.inputs, predict, progress)
    known, overlapping = model.training_cells, None
    if known is not None:
        overlapping = int(np.isin(held_out.cells(["content_hash"])["content_hash"].to_numpy(), known).sum())
    bins = _effective_bins(law, held_out, store.vocabulary, config.inputs) if config.preprocess == "bin" else None
    return Evaluation(law, errors, overlapping, bins)


def evaluate_baselines(
    store: Store,
    *,
    max_genes: int,
    split: str = "test",
    cells: int = 4096,
    mask_ratio: float = 0.4,
    seed: int = 0,
    progress: bool = False,
) -> Evaluation:
    """Errors of the baselines, fitted on the store's training split, under the same law as `evaluate_model`'s.

    UserError if that or the evaluated split is empty.
    """
    train = store.split("train")
    if train.n_cells == 0:
        raise UserError(
            f"the store {store.path} has no training cells to fit the baselines on: prepare it with a larger training share."
        )
    held_out = _held_out(store, split, cells)
    with progress_bar("fitting the baselines", train.n_cells, progress) as advance:
        fitted = TrainingGenes.fit(train, store.vocabulary.size, advance)
    law = EvaluationLaw(store.fingerprint, split, held_out.n_cells, max_genes, mask_ratio, seed)
    inputs = InputLaw(max_genes)  # baselines see counts
    errors = _errors(law, held_out, store.vocabulary, inputs, lambda _, sampled, __: fitted.predict(sampled), progress)
    return Evaluation(law, errors)


def differences(evaluation: Evaluation, other: Evaluation) -> list[dict]:
    """Mean squared error of each method of the one less that of each method of the other (negative: the one is better),
    with intervals, paired over cells. ValueError unless both have the same law."""
    if evaluation.law != other.law:
        raise ValueError(f"evaluations under different laws can't be compared: {evaluation.law}, {other.law}")
    ours, theirs = (bootstrap(e.errors, e.law.seed) for e in (evaluation, other))
    return [
        {"method": method, "baseline": baseline, "draw": draw,
         **interval_fields("mse", ours[method, draw] - theirs[baseline, draw])}
        for method, draw in ours for baseline in other.errors
    ]


def _held_out(store: Store, name: str, cells: int) -> Split:
    """The first cells of a split; UserError if it is empty."""
    split = store.split(name)
    if split.n_cells == 0:
        raise UserError(f"the {name} split of {store.path} is empty: choose another --split, or prepare the store again with "
                        f"a share of cells for {name}.")
    return split.first(cells)


def _errors(
    law: EvaluationLaw, split: Split, vocabulary: Vocabulary, inputs: InputLaw,
    predict: Callable[[CellSampler, Sampled, np.ndarray], dict[str, np.ndarray]], progress: bool,
) -> Errors:
    """Errors of all methods that `predict` gives log1p counts of, under both draws."""
    parts: dict[str, dict[str, list[np.ndarray]]] = {}
    samplers = {draw: law.sampler(draw, vocabulary, inputs) for draw in DRAWS}
    with progress_bar("evaluating", split.n_cells, progress) as advance:
        for numbers, cells in stored_cells(split, BATCH_CELLS):
            for draw, sampler in samplers.items():
                sampled = sampler.draw(cells, numbers)
                hidden = genes_of(sampled, sampled.masked)
                for method, predicted in predict(sampler, sampled, numbers).items():
                    sums = error_sums(predicted, hidden.counts, hidden.cells, len(numbers))
                    parts.setdefault(method, {}).setdefault(draw, []).append(sums)
            advance(len(numbers))
    errors = {method: {draw: np.concatenate(sums) for draw, sums in draws.items()} for method, draws in parts.items()}
    if not next(iter(errors.values()))[UNIFORM][:, GENES].any():
        raise UserError(f"no gene of the {law.cells} evaluated cells was masked: give more --cells or a larger --mask-ratio.")
    return errors


def _effective_bins(law: EvaluationLaw, split: Split, vocabulary: Vocabulary, inputs: InputLaw) -> float:
    """Distinct bins among a cell's expressed genes (the reference's bins: among those drawn), mean over cells."""
    sampler = law.sampler(UNIFORM, vocabulary, inputs)
    distinct = filled = 0.0
    for numbers, cells in stored_cells(split, BATCH_CELLS):
        offsets = cells.offsets
        if inputs.preprocess == "bin":
            bins = quantile_bins(cells.counts, offsets)
        else:
            _, _, bins, _, offsets, _ = sampler.draw(cells, numbers)
        occupied = np.count_nonzero(np.diff(offsets))
        if occupied:
            distinct += effective_bins(bins, offsets) * occupied
            filled += occupied
    return distinct / filled


def run_evaluate(config: EvaluateConfig) -> dict:
    """`scbench evaluate`: show the table, write it to --output if given, return it as JSON-able values."""
    if config.output is not None:
        refuse_existing(config.output)
    model, store = embed.load_model(config.model), Store.open(config.store)
    options = {"split": config.split, "cells": config.cells, "mask_ratio": config.mask_ratio, "seed": config.seed,
               "progress": not config.json}
    evaluation = evaluate_model(model, store, max_genes=config.max_genes, **options)
    table = _table(model, store, evaluation, evaluate_baselines(store, max_genes=evaluation.law.max_genes, **options))
    if config.output is not None:
        table.write(config.output)
    if not config.json:
        console = screen()
        table.show(console)
        if config.output is not None:
            console.print(f"Written to {config.output}: results.json, results.csv, results.md")
    return table.record()


def _table(model: ExpressionModel, store: Store, evaluation: Evaluation, baselines: Evaluation) -> Table:
    law = evaluation.law
    rows = [{"task": "masked genes", "dataset": store.path.name, "split": law.split, "cells": law.cells, **row}
            for row in evaluation.rows() + baselines.rows()]
    compared = differences(evaluation, baselines)
    details = {
        "protocol": _protocol(),
        "law": law._asdict(),
        "model": {"fingerprint": embed.fingerprint(model), "config": dataclasses.asdict(model.config),
                  "provenance": model.provenance},
        "overlapping_cells": evaluation.overlapping,
        "effective_bins": evaluation.effective_bins,
        "differences": compared,
        "versions": {"scbench": __version__, "python": platform.python_version(),
                     **{name: version(name) for name in ("torch", "numpy")}},
    }
    title = f"Masked genes of {law.cells:,} {law.split} cells of {store.path.name}"
    return Table(title, rows, COLUMNS, _sentences(model.config, evaluation, rows, compared), details)


def _sentences(config: ModelConfig, evaluation: Evaluation, rows: list[dict], compared: list[dict]) -> list[str]:
    """What the table says, in plain words."""
    errors = {row["method"]: row["mse"] for row in rows}
    said = []
    for head in evaluation.errors:
        parts = [
            _compare(difference, errors[difference["baseline"]])
            for difference in sorted(compared, key=lambda difference: difference["baseline"] != CELL_OFFSET)
            if difference["method"] == head and difference["draw"] == UNIFORM
        ]
        said.append(f"The {SPOKEN[head]} {'; it '.join(parts)}.")
    law = evaluation.law
    said.append(
        f"{rows[0]['masked_genes']:,} masked genes; cells with more than {law.max_genes:,} genes are sampled. By value: "
        "squared errors weighted by the true value; relative: squared errors over the true value squared. Errors under the "
        "two draws can't be compared with each other: the weighted one asks for larger counts."
    )
    if config.normalize == "total" or config.library_size_offset:
        said.append("This model is told each cell's total count, hidden genes included; the baselines are not.")
    if evaluation.effective_bins is not None:
        said.append(
            f"Values are bins, {evaluation.effective_bins:.1f} distinct ones in a cell on average; a predicted bin means the "
            "mean log1p count of the cell's visible genes in it."
        )
    if evaluation.overlap == TRANSDUCTIVE:
        said.append(
            f"Transductive: {evaluation.overlapping:,} of the {law.cells:,} cells are among those that the model was trained "
            "or validated on."
        )
    elif evaluation.overlap == NOT_CHECKABLE:
        said.append("The model does not say which cells it was trained on: whether these are new to it cannot be checked.")
    return said


def _compare(difference: dict, baseline_error: float) -> str:
    value, low, high = (difference[field] for field in ("mse", "mse_low", "mse_high"))
    share = f"{100 * abs(value) / baseline_error:.1f} % {'less' if value < 0 else 'more'}"
    numbers = f"mean squared error {value:+.4f}, 95 % interval {low:+.4f} to {high:+.4f}: {share}"
    return f"{verdict('mse', low, high)} {difference['baseline']} ({numbers})"


def _protocol() -> str:
    return (
        "first cells of the split; genes of longer cells drawn uniformly (second columns: by weight log1p(count) − smallest); "
        "each masked with one probability; draws and masks depend on the seed, the cell's number and the gene alone; errors "
        "in log1p counts, MSE a masked gene; value-weighted: Σ v e² / Σ v; relative: mean of (e / v)², v the true value, e "
        "the error; baselines fitted on the whole training split; intervals: 2.5 and 97.5 percentiles of "
        f"{RESAMPLES:,} bootstrap resamples of the cells, the same for all methods"
    )
