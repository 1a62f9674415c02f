"""The implementations that are compared, by name, and the weights that all of them start from."""

from typing import Protocol

import torch
from options import Options
from ours import ScbenchStep
from plain import PlainModel, PlainStep
from reference import ReferenceModel, ReferenceStep
from torch import Tensor

from scbench.data.batch import CellBatch
from scbench.data.vocabulary import Vocabulary
from scbench.kernels import random
from scbench.models.model import ExpressionModel

PRECISION = {"reference": "fp32", "plain_sdpa": "bf16", "plain_compiled": "bf16", "scbench": "bf16"}
DROPOUT = 0.15
DEEPSPEED = "zero1"  # pretrain's default


class TrainingStep(Protocol):
    """One way to train the model."""

    def prepare(self, batch: CellBatch):
        """A batch in its own form: the loader's work, which is not timed."""

    def forward_backward(self, batch) -> float:
        """The loss of a prepared batch; gradients are left behind."""

    def update(self) -> None:
        """The optimizer's step."""

    def gradient_norm(self) -> float:
        """Of all gradients together; ends the step."""


def initial_weights(options: Options, vocabulary: Vocabulary) -> dict[str, Tensor]:
    """An ExpressionModel's first weights, with noise on biases and norms: as zeros and ones any mix-up would go unseen."""
    config = options.training(precision="fp32", deepspeed=DEEPSPEED, dropout=0.0)
    weights = ExpressionModel(config.model(vocabulary.size), vocabulary, options.seed).state_dict()
    generator = random.generator(random.key(options.seed, random.Stream.EVALUATION))
    for tensor in weights.values():
        if tensor.ndim == 1:
            tensor += 0.02 * torch.randn(tensor.shape, generator=generator)
    return weights


def build(
    name: str, weights: dict[str, Tensor], options: Options, vocabulary: Vocabulary, *, precision: str, dropout: float,
    device: torch.device,
) -> TrainingStep:
    """A fresh implementation with `weights`."""
    shape = {"width": options.width, "layers": options.layers, "heads": options.heads, "dropout": dropout}
    if name == "scbench":
        config = options.training(precision=precision, deepspeed=DEEPSPEED, dropout=dropout)
        model = ExpressionModel(config.model(vocabulary.size), vocabulary, options.seed)
        model.load_state_dict(weights)
        return ScbenchStep(model, config)
    if name == "reference":
        model = ReferenceModel(vocabulary.size, vocabulary.pad, **shape)
        model.load_weights(weights)
        return ReferenceStep(model, vocabulary, options.max_genes + 1, device)
    model = PlainModel(vocabulary.size, **shape)
    model.load_weights(weights)
    return PlainStep(model, vocabulary, precision, name == "plain_compiled", device)
