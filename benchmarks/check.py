"""Do the implementations compute the same? Asked before any is timed."""

import math
from typing import NamedTuple

import machine
from implementations import PRECISION, build
from options import Options
from torch import Tensor

from scbench.data.batch import CellBatch
from scbench.data.vocabulary import Vocabulary

TOLERANCE = {"fp32": 1e-4, "bf16": 2e-2}  # relative, against the reference's model in fp32


class Result(NamedTuple):
    """What one step without dropout gives."""

    loss: float
    gradient_norm: float


def evaluate(
    name: str, precision: str, weights: dict[str, Tensor], options: Options, vocabulary: Vocabulary, batch: CellBatch
) -> Result:
    """Loss and gradient norm of `batch` in a fresh implementation without dropout."""
    step = build(name, weights, options, vocabulary, precision=precision, dropout=0.0, device=machine.device())
    return Result(step.forward_backward(step.prepare(batch)), step.gradient_norm())


def failure(name: str, precision: str, result: Result, expected: Result) -> str | None:
    """What is wrong with an implementation's result, or None."""
    for quantity, got, want in zip(("loss", "gradient norm"), result, expected, strict=True):
        if not math.isclose(got, want, rel_tol=TOLERANCE[precision]):  # False for NaN
            return f"failed: {quantity} {got:.6g} in {precision}, the reference's {want:.6g}"
    return None


def check_all(
    names: list[str], weights: dict[str, Tensor], options: Options, vocabulary: Vocabulary, batch: CellBatch
) -> dict[str, tuple[Result, str | None]]:
    """For each name: its result in the precision that it is timed in, and its failure there or in fp32, or None."""
    expected = evaluate("reference", "fp32", weights, options, vocabulary, batch)
    verdicts = {}
    for name in names:
        result, wrong = expected, None
        for precision in dict.fromkeys(("fp32", PRECISION[name])):
            if wrong is None and (name, precision) != ("reference", "fp32"):
                result = evaluate(name, precision, weights, options, vocabulary, batch)
                wrong = failure(name, precision, result, expected)
        verdicts[name] = result, wrong
    return verdicts
