"""The table of a classification benchmark: rows, comparisons in words, confusion matrices."""

import csv
import io
from collections.abc import Mapping

import numpy as np

from scbench.evaluation.classification.probing import KNN, LINEAR, Method, pca_name
from scbench.evaluation.entrants import MODEL, untrained_name
from scbench.evaluation.report import Column
from scbench.evaluation.scores import Scores, confusion, interval_fields, verdict

MODEL_KIND, BASELINE_KIND = "model", "baseline"
METRICS = ("accuracy", "balanced_accuracy", "macro_f1")
FEW_GROUPS = 10  # under which intervals over groups are called rough

COLUMNS = [
    Column("model", ("model",)),
    Column("probe", ("probe",)),
    *(Column(title, (name, f"{name}_low", f"{name}_high"), "{:.3f} ({:.3f}–{:.3f})")
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
    """How far each row of `models` is ahead (negative: behind) of each baseline, paired over cells or groups; the baseline of
    the highest accuracy is marked `best`."""
    baselines = [method for method in scores if method[0] not in models]
    best = max(baselines, key=lambda method: scores[method].accuracy[0])
    return [
        {
            "model": ours[0], "probe": ours[1], "baseline": other[0], "baseline_probe": other[1], "best": other == best,
            **_metrics(Scores(*(mine - theirs for mine, theirs in zip(scores[ours], scores[other], strict=True)))),
        }
        for ours in scores if ours[0] in models for other in baselines
    ]


def sentences(differences: list[dict], depth_r2: Mapping[str, float], models: list[str]) -> list[str]:
    """What the table says, in plain words."""
    said = [_compare(difference) for difference in differences if difference["best"]]
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


def _compare(difference: dict) -> str:
    value, low, high = (difference[field] for field in ("accuracy", "accuracy_low", "accuracy_high"))
    other = difference["baseline"]
    if difference["baseline_probe"] in (KNN, LINEAR):
        other += f" with {_probe(difference['baseline_probe'])}"
    means = f"with {_probe(difference['probe'])}" if difference["probe"] in (KNN, LINEAR) else "by its own predictions"
    said = (f"{_spoken(difference['model'])} {means} {verdict(low, high)} the best baseline, {other} "
            f"({value:+.3f} accuracy, 95 % interval {low:+.3f} to {high:+.3f}).")
    return said[0].upper() + said[1:] if difference["model"] == MODEL else said


def _probe(probe: str) -> str:
    return "k-NN" if probe == KNN else "a linear probe"


def _spoken(model: str) -> str:
    return f"the {MODEL}" if model == MODEL else model
