"""Do the implementations compute the same? Asked before any is timed.

Of the recipe default, plain_padded in fp32 is the measure, and scbench and plain_padded judge each other. The reference's
layers are others (batch norms, pads as data): its measure is scbench's recipe aaai2025 in fp32, on the same cells padded.
"""

import math
from typing import NamedTuple

import machine
import torch
from cells import as_the_reference_pads
from implementations import absence, build, initial_weights, precision_of
from options import Options, Task
from torch import Tensor

from scbench.config import ModelConfig
from scbench.data.batch import CellBatch
from scbench.data.vocabulary import Vocabulary
from scbench.models.model import ExpressionModel

TOLERANCE = {"fp32": 1e-4, "bf16": 2e-2}  # relative, of loss and gradient norm
EMBEDDING_TOLERANCE = {"fp32": 1e-4, "bf16": 5e-2}  # of the difference's length, over the embeddings' own


class Result(NamedTuple):
    """What a batch without dropout gives: loss and gradient norm, or (embedding) the cells' embeddings."""

    loss: float | None = None
    gradient_norm: float | None = None
    embeddings: Tensor | None = None


def evaluate(
    name: str, task: Task, precision: str, weights: dict[str, Tensor], options: Options, vocabulary: Vocabulary,
    batch: CellBatch,
) -> Result:
    """What a fresh implementation without dropout says of `batch`."""
    step = build(name, task, weights, options, vocabulary, precision=precision, dropout=0.0, device=machine.device())
    prepared = step.prepare(batch)
    if task == "embedding":
        return Result(embeddings=step.embed(prepared).float().cpu())
    return Result(float(step.forward_backward(prepared)), step.gradient_norm())


def of_the_model(config: ModelConfig, weights: dict[str, Tensor], task: Task, precision: str, vocabulary: Vocabulary,
                 batch: CellBatch) -> Result:
    """What an ExpressionModel without dropout says by itself, without DeepSpeed."""
    model = ExpressionModel(config, vocabulary)
    model.load_state_dict(weights)
    model.to(machine.device(), torch.bfloat16 if precision == "bf16" else torch.float32)
    batch = batch.to(machine.device())
    if task == "embedding":
        with torch.inference_mode():
            return Result(embeddings=model.eval().encode(batch).float().cpu())
    loss = model(batch).loss
    loss.backward()
    gradients = [p.grad.float() for p in model.parameters() if p.grad is not None]
    return Result(float(loss.detach()), float(torch.nn.utils.get_total_norm(gradients)))


def check_model(task: Task, precision: str, options: Options, vocabulary: Vocabulary, batch: CellBatch) -> str | None:
    """What is wrong with scbench's model, in fp32 or `precision`, or None."""
    weights, config = initial_weights(options, vocabulary), options.model(vocabulary.size)
    expected = evaluate("plain_padded", task, "fp32", weights, options, vocabulary, batch)
    wrong = None
    for tried in dict.fromkeys(("fp32", precision)):
        wrong = wrong or failure(tried, of_the_model(config, weights, task, tried, vocabulary, batch), expected)
    return wrong


def failure(precision: str, result: Result, expected: Result) -> str | None:
    """What is wrong with an implementation's result, or None."""
    if expected.embeddings is not None:
        difference = float((result.embeddings - expected.embeddings).norm() / expected.embeddings.norm())
        if not difference <= EMBEDDING_TOLERANCE[precision]:  # so NaN fails
            return f"failed: embeddings off by {difference:.2g} in {precision}"
        return None
    for quantity in ("loss", "gradient_norm"):
        got, want = getattr(result, quantity), getattr(expected, quantity)
        if not math.isclose(got, want, rel_tol=TOLERANCE[precision]):  # False for NaN
            return f"failed: {quantity.replace('_', ' ')} {got:.6g} in {precision}, expected {want:.6g}"
    return None


def check_all(
    names: list[str], task: Task, options: Options, vocabulary: Vocabulary, batch: CellBatch
) -> dict[str, tuple[Result, str | None]]:
    """For each name: its result in the precision that it is timed in, and its failure there or in fp32, or None."""
    weights = initial_weights(options, vocabulary)
    expected = evaluate("plain_padded", task, "fp32", weights, options, vocabulary, batch)
    verdicts = {}
    for name in names:
        result, wrong = Result(), absence(name, options.structure)
        measure, its_weights = expected, weights
        if name == "reference" and wrong is None:
            its_weights = initial_weights(options, vocabulary, "aaai2025")
            config = options.model(vocabulary.size, recipe="aaai2025")
            padded = as_the_reference_pads(batch, options.genes, vocabulary.pad)
            measure = of_the_model(config, its_weights, task, "fp32", vocabulary, padded)
        for precision in dict.fromkeys(("fp32", precision_of(name))):
            if wrong is None:
                result = evaluate(name, task, precision, its_weights, options, vocabulary, batch)
                wrong = failure(precision, result, measure)
        verdicts[name] = result, wrong
    return verdicts
