"""The table of the AAAI 2025 protocol of perturbation prediction: its rows, and what they say in words.

Trials are splits of the same cells, so that their errors are not independent: intervals take the variance of Nadeau & Bengio,
"Inference for the generalization error" (2003), (1/trials + test/train) times that of the trials, with Student's t.
"""

import numpy as np
from scipy import stats

from scbench.evaluation.classification.aaai2025 import TRAINING_TENTHS
from scbench.evaluation.comparisons import Comparison, sentences_of
from scbench.evaluation.guard import TRANSDUCTIVE, UNSEEN
from scbench.evaluation.report import Column
from scbench.evaluation.scores import Interval

PROMPT, BASE, NOTHING, GENE_MEAN = "prompt", "base prompt only", "no prompt", "gene mean"
TEST_TO_TRAIN = (10 - TRAINING_TENTHS) / TRAINING_TENTHS

COLUMNS = [
    Column("prediction", ("model",)),
    Column("MSE ± SD", ("mse", "mse_sd"), "{:.4f} ± {:.4f}"),
    Column("95 % interval", ("mse_low", "mse_high"), "{:.4f} to {:.4f}"),
    Column("perturbations", ("split",)),
    Column("overlap", ("overlap",)),
]


def corrected(scores: np.ndarray) -> tuple[float, float | None, float | None]:
    """The mean over trials and its 95 % interval; no interval of one trial. `scores`: float64 [trials]."""
    value, n = float(np.mean(scores)), len(scores)
    if n < 2:
        return value, None, None
    half = stats.t.ppf(0.975, n - 1) * np.sqrt((1 / n + TEST_TO_TRAIN) * np.var(scores, ddof=1))
    return Interval(value, value - float(half), value + float(half))


def row(name: str, scores: list[float], overlap: str) -> dict:
    """The fields of a method's row that are its own. `overlap`: of the model."""
    value, low, high = corrected(np.array(scores))
    ours = name != GENE_MEAN
    return {
        "model": name, "kind": "model" if name == PROMPT else "baseline",
        "probe": _probe(name), "mse": value, "mse_low": low, "mse_high": high, "mse_sd": float(np.std(scores)),
        "overlap": overlap if ours or overlap == TRANSDUCTIVE else UNSEEN, "pretraining_seeds": 1 if ours else None,
    }


def _probe(name: str) -> str:
    return "linear prompt" if name == PROMPT else "none"


def _compared(errors: dict[str, list[float]]) -> list[Comparison]:
    """The prompt minus every other method, trial by trial, the best of these first."""
    others = sorted((name for name in errors if name != PROMPT), key=lambda name: float(np.mean(errors[name])))
    return [
        Comparison(PROMPT, _probe(PROMPT), name, _probe(name), "mse", *corrected(np.subtract(errors[PROMPT], errors[name])))
        for name in others
    ]


def differences(errors: dict[str, list[float]]) -> list[dict]:
    """The prompt minus each other method, in the fields of a row."""
    return [
        {"model": one.model, "probe": one.probe, "baseline": one.baseline, "baseline_probe": one.baseline_probe,
         "mse": one.difference, "mse_low": one.low, "mse_high": one.high}
        for one in _compared(errors)
    ]


def comparisons(errors: dict[str, list[float]]) -> list[dict]:
    """The prompt against the best of the others."""
    best, *others = _compared(errors)
    parts = [best.words(f"the best baseline, {best.baseline}", "+.4f"), *(one.words(one.baseline, "+.4f") for one in others)]
    return [best.record(f"In the MSE the prompt {'; '.join(parts)}.")]


def sentences(errors: dict[str, list[float]], left_out: dict[str, int], unseen: bool, bins: bool) -> list[str]:
    """What the table says, in plain words. `bins`: the model's values are bins of a cell, not log1p of counts."""
    names = ", ".join(f"{name} ({size})" for name, size in left_out.items())
    seen = "" if unseen else " Every perturbed gene of the test cells is one of training too."
    return [
        *sentences_of(comparisons(errors)),
        "Optimistic: what is asked about are genes that the held-out cell expresses, drawn by its own values: which genes "
        f"those are is given away, and no zero is ever scored.{seen}",
        "The SD is over trials, which share cells; intervals and comparisons take the variance of Nadeau and Bengio.",
        *(["The prompt changes no prediction: in this structure no gene hears of <cls>."]
          if errors[PROMPT] == errors[NOTHING] else []),
        *(["Errors are of bins, and cannot be set beside those of a model on log1p of counts."] if bins else []),
        *([f"Left out, because they name several genes or one that the model lacks: {names}."] if names else []),
    ]
