"""The table of a classification benchmark: rows, comparisons in words, confusion matrices."""

import csv
import io
from collections.abc import Mapping

import numpy as np

from scbench.evaluation.classification.probing import KNN, LINEAR, Method, pca_name
from scbench.evaluation.comparisons import Comparison, sentences_of
from scbench.evaluation.entrants import MODEL, untrained_name
from scbench.evaluation.report import Column, IntervalColumn
from scbench.evaluation.scores import Scores, confusion, interval, interval_fields

MODEL_KIND, BASELINE_KIND = "model", "baseline"
METRICS = ("accuracy", "balanced_accuracy", "macro_f1")
FEW_GROUPS = 10  # under which intervals over groups are called rough

COLUMNS = [
    Column("model", ("model",)),
    Column("probe", ("probe",)),
    *(IntervalColumn(title, (name,), "{:.3f}")
      for title, name in zip(("accuracy", "balanced accuracy", "macro-F1"), METRICS, strict=True)),
    Column("depth R²", ("depth_r2",), "{:.2f}"),
    Column("overlap", ("overlap",)),
]


def row(method: Method, kind: str, overlap: str, scores: Scores, accuracies: list[float], depth_r2: float | None,
        given: Mapping[str, object], counted: Mapping[str, object]) -> dict:
    """One row of the table.

    Parameters
    ----------
    method, kind, overlap, scores
        Model and probe, what the model is, which cells it has seen, and how it did.
    accuracies
        Of each pretraining seed.
    depth_r2
        R² of log total counts read from the embedding.
    given, counted
        The fields task, dataset, label, protocol and values, and those from `seeds` on: the same in all rows.
    """
    return {
        "task": given["task"], "dataset": given["dataset"], "label": given["label"], "model": method[0], "kind": kind,
        "probe": method[1], "protocol": given["protocol"], "overlap": overlap, "values": given["values"],
        **_metrics(scores),
        "depth_r2": depth_r2, "pretraining_seeds": len(accuracies) if kind == MODEL_KIND else None,
        "accuracy_pretraining_sd": float(np.std(accuracies, ddof=1)) if len(accuracies) > 1 else None, **counted,
    }


def differences_of(scores: Mapping[Method, Scores], models: list[str]) -> list[dict]:
    """How far each row of `models` is ahead (negative: behind) of each baseline, paired over cells or groups."""
    return [
        {
            "model": ours[0], "probe": ours[1], "baseline": other[0], "baseline_probe": other[1],
            **_metrics(Scores(*(mine - theirs for mine, theirs in zip(scores[ours], scores[other], strict=True)))),
        }
        for ours in scores if ours[0] in models for other in scores if other[0] not in models
    ]


def comparisons_of(scores: Mapping[Method, Scores], models: list[str]) -> list[dict]:
    """Each row of `models` against the baseline of the highest accuracy, paired over cells or groups."""
    best = max((method for method in scores if method[0] not in models), key=lambda method: scores[method].accuracy[0])
    return [
        compare(Comparison(*ours, *best, "accuracy", *interval(scores[ours].accuracy - scores[best].accuracy)))
        for ours in scores if ours[0] in models
    ]


def compare(comparison: Comparison) -> dict:
    """The record of a comparison with the best baseline, in words too."""
    def with_probe(probe: str, otherwise: str) -> str:
        return f" with {'k-NN' if probe == KNN else 'a linear probe'}" if probe in (KNN, LINEAR) else otherwise

    model, probe, baseline, baseline_probe = comparison[:4]
    best = f"the best baseline, {baseline}{with_probe(baseline_probe, '')}"
    subject = f"The {MODEL}" if model == MODEL else model
    return comparison.record(
        f"{subject}{with_probe(probe, ' by its own predictions')} {comparison.words(best, '+.3f', ' accuracy')}."
    )


def sentences(comparisons: list[dict], depth_r2: Mapping[str, float], models: list[str]) -> list[str]:
    """What the table says, in plain words."""
    said = sentences_of(comparisons)
    beside = f"PCA {depth_r2[pca_name(50)]:.2f}"
    for model in models:
        if model in depth_r2:
            untrained = untrained_name(model)
            others = f"untrained {depth_r2[untrained]:.2f}, {beside}" if untrained in depth_r2 else beside
            said.append(
                f"Log total counts can be read from the embedding of {_spoken(model)} with R² {depth_r2[model]:.2f} ({others})"
                ": near 1, distances between cells are partly differences in sequencing depth."
            )
    return said


def seeds_sentences(rows: list[dict]) -> list[str]:
    """What is known of pretraining's own variance."""
    several = [each for each in rows if each["accuracy_pretraining_sd"] is not None]
    said = [
        f"Pretrained {each['pretraining_seeds']} times, {_spoken(each['model'])} ({each['probe']}) has accuracies with a "
        f"standard deviation of {each['accuracy_pretraining_sd']:.3f} between seeds." for each in several
    ]
    if any(each["pretraining_seeds"] == 1 for each in rows):
        said.append("Intervals cover the choice of cells or groups; what another pretraining seed would give is not in them.")
    return said


def groups_sentences(group: str | None, groups: int | None) -> list[str]:
    """What the intervals are over."""
    if group is None:
        return []
    rough = f"; with fewer than {FEW_GROUPS} they are rough" if groups < FEW_GROUPS else ""
    return [f"Whole groups are held out, by {group!r}: intervals come from resamples of the {groups:,} groups{rough}."]


def confusions(truth: np.ndarray, predictions: Mapping[Method, np.ndarray], names: list[str]) -> dict:
    """Confusion matrices, JSON-able: for each method cells of a true class (rows) called a class (columns), summed over
    repetitions and pretraining seeds."""
    return {
        "classes": names,
        "matrices": [
            {"model": method[0], "probe": method[1], "repetitions": int(np.prod(predicted.shape[:-1])),
             "cells": confusion(truth, predicted, len(names)).tolist()}
            for method, predicted in predictions.items()
        ],
    }


def confusion_csv(confusion: dict) -> str:
    """The same, a line for each model, probe, true and predicted class."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(["model", "probe", "repetitions", "class", "predicted", "cells"])
    for matrix in confusion["matrices"]:
        head = [matrix[name] for name in ("model", "probe", "repetitions")]
        for name, cells in zip(confusion["classes"], matrix["cells"], strict=True):
            writer.writerows([*head, name, called, each] for called, each in zip(confusion["classes"], cells, strict=True))
    return text.getvalue()


def _metrics(scores: Scores) -> dict[str, float]:
    """Each metric with its interval."""
    return {name: value for metric in METRICS for name, value in interval_fields(metric, getattr(scores, metric)).items()}


def _spoken(model: str) -> str:
    return f"the {MODEL}" if model == MODEL else model
