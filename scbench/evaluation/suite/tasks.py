"""How a suite runs a data set: by the function of its task, with the same options as the task's own verb."""

from collections.abc import Callable
from pathlib import Path

from scbench.data.sources.reference_pt import CLASS, PERTURBED, is_reference_pt
from scbench.errors import UserError
from scbench.evaluation.classification.aaai2025 import benchmark_aaai2025
from scbench.evaluation.classification.benchmark import benchmark_classification
from scbench.evaluation.counts.benchmark import benchmark_counts
from scbench.evaluation.entrants import Models
from scbench.evaluation.perturbation.benchmark import benchmark_perturbation
from scbench.evaluation.perturbation.prompts import benchmark_prompts_of
from scbench.evaluation.report import Table
from scbench.evaluation.split_files import Split, read_split
from scbench.evaluation.suite.file import AAAI2025, CLASSIFICATION, COUNTS, UNKNOWN, UNSEEN, DataSet
from scbench.evaluation.suite.merge import merge
from scbench.models.model import ExpressionModel


def unknown_key(dataset: DataSet, file: Path) -> str | None:
    """The key that the file needs and that the suite says is unknown; None if there is none. A .pt file implies all."""
    if is_reference_pt(file):
        return None
    return next((key for key in ("label", "perturbation_column", "control") if getattr(dataset, key) == UNKNOWN), None)


def run(
    dataset: DataSet, file: Path, models: Models, folder: Path, seeds: int, folds: int, scvi: bool, options: dict
) -> Table:
    """The table of a data set; UserError as the task's own function.

    Parameters
    ----------
    dataset, file
        An entry of a suite, and which of its files is there.
    models
        Of the command.
    folder
        Where a relative split_file is.
    seeds, folds, scvi
        Of the default protocols.
    options
        max_overlap, allow_overlap, seed, progress.
    """
    split = None if dataset.split_file is None else read_split(folder / dataset.split_file)
    options = {**options, "layer": dataset.layer, "genes_column": dataset.genes_column, "values": dataset.values}
    options |= {} if dataset.protocol == AAAI2025 else {"seeds": seeds, "folds": folds}
    if dataset.task == COUNTS:
        return benchmark_counts(models, file, group=dataset.group, split=split, **options)
    if dataset.task == CLASSIFICATION:
        return _classification(dataset, file, models, split, scvi, options)
    return _perturbation(dataset, file, models, split, options)


def _classification(
    dataset: DataSet, file: Path, models: Models, split: Split | None, scvi: bool, options: dict
) -> Table:
    in_file = not is_reference_pt(file) or dataset.label in (CLASS, PERTURBED)
    label = dataset.label if in_file else None  # a .pt file's own column has another name
    if dataset.protocol == AAAI2025:
        return _each(models, lambda model: benchmark_aaai2025(model, file, label, **options))
    return benchmark_classification(models, file, label, group=dataset.group, split=split, scvi=scvi, **options)


def _perturbation(dataset: DataSet, file: Path, models: Models, split: Split | None, options: dict) -> Table:
    column, control = (None, None) if is_reference_pt(file) else (dataset.perturbation_column, dataset.control)
    if dataset.protocol == AAAI2025:
        unseen = dataset.split == UNSEEN
        return _each(models, lambda model: benchmark_prompts_of(model, file, column, control, unseen=unseen, **options))
    if column is None:
        raise UserError(f"{file} holds token ids, which of the protocols of perturbations only {AAAI2025} reads: give an h5ad "
                        "file.")
    return benchmark_perturbation(
        models, file, column, control, context=dataset.context, study=dataset.study, split_file=split,
        total_counts_column=dataset.total_counts_column, split=dataset.split, predictor=dataset.predictor, **options,
    )


def _each(models: Models, ask: Callable[[ExpressionModel], Table]) -> Table:
    """One table of a function that takes one model of ours."""
    for name, several in models.items():
        if not all(isinstance(model, ExpressionModel) for model in several):
            raise UserError(f"the protocol {AAAI2025} embeds cells itself, which takes a model directory, and {name} is none: "
                            "leave it out or choose the default protocol.")
    return merge({name: [ask(model) for model in several] for name, several in models.items()})
