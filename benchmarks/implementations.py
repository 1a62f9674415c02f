"""The implementations that are compared, by name, and the weights that all of them start from."""

from typing import Literal, Protocol

import torch
from options import Options, Task
from ours import ScbenchEmbedding, ScbenchStep
from plain import PlainModel, PlainStep
from reference import ReferenceStep, reference_model
from torch import Tensor

from scbench.data.batch import CellBatch
from scbench.data.vocabulary import Vocabulary
from scbench.kernels import random
from scbench.models.model import ExpressionModel

Name = Literal["reference", "plain_padded", "plain_bucketed", "plain_matmul", "plain_compiled", "scbench"]
PLAIN = {  # how the plain ones differ
    "plain_padded": {"attention": "sdpa", "bucketed": False, "compiled": False},
    "plain_bucketed": {"attention": "sdpa", "bucketed": True, "compiled": False},
    "plain_matmul": {"attention": "matmul", "bucketed": True, "compiled": False},
    "plain_compiled": {"attention": "sdpa", "bucketed": False, "compiled": True},
}
DROPOUT = 0.15
DEEPSPEED = "zero1"  # pretrain's default


class Implementation(Protocol):
    """One way to train the model, or to embed cells."""

    def prepare(self, batch: CellBatch):
        """A batch in its own form: the loader's work, which is not timed."""

    def forward_backward(self, batch) -> Tensor:
        """The loss of a prepared batch; gradients are left behind."""

    def update(self) -> None:
        """The optimizer's step."""

    def gradient_norm(self) -> float:
        """Of all gradients together; ends the step."""

    def embed(self, batch) -> Tensor:
        """Cell embeddings, float32 [B, D], of a prepared batch, without gradients and dropout."""


def precision_of(name: str) -> str:
    """What an implementation is timed in."""
    return "fp32" if name == "reference" else "bf16"


def absence(name: str, structure: str) -> str | None:
    """Why there is no such implementation of a structure, or None."""
    if name == "reference" and structure == "mamba":
        return "absent: the reference's Mamba was not published"
    if name == "plain_matmul" and structure not in ("transformer", "gnn"):
        return "absent: the structure has no attention, so this is plain_bucketed"
    return None


def initial_weights(options: Options, vocabulary: Vocabulary, recipe: str = "default") -> dict[str, Tensor]:
    """An ExpressionModel's first weights, with noise on biases and norms: as zeros and ones any mix-up would go unseen."""
    weights = ExpressionModel(options.model(vocabulary.size, recipe=recipe), vocabulary, options.seed).state_dict()
    generator = random.generator(random.key(options.seed, random.Stream.EVALUATION))
    for name, tensor in weights.items():
        if tensor.ndim == 1 and "running" not in name:
            tensor += 0.02 * torch.randn(tensor.shape, generator=generator)
    return weights


def build(
    name: str, task: Task, weights: dict[str, Tensor], options: Options, vocabulary: Vocabulary, *, precision: str,
    dropout: float, device: torch.device,
) -> Implementation:
    """A fresh implementation with `weights`: of the recipe aaai2025 for the reference, else of the default recipe."""
    if name == "reference":
        config = options.model(vocabulary.size, dropout=dropout, recipe="aaai2025")
        return ReferenceStep(reference_model(config, vocabulary, weights), vocabulary, options.genes + 1, device)
    config = options.model(vocabulary.size, dropout=dropout)
    if name == "scbench":
        model = ExpressionModel(config, vocabulary, options.seed)
        model.load_state_dict(weights)
        if task == "embedding":
            return ScbenchEmbedding(model, precision, device)
        return ScbenchStep(model, options.training(precision=precision, deepspeed=DEEPSPEED, dropout=dropout))
    how = PLAIN[name]
    model = PlainModel(config, how["attention"])
    model.load_state_dict(weights)
    if task == "embedding" and precision == "bf16":  # autocast would cast fp32 weights every time
        model.to(torch.bfloat16)
    return PlainStep(model, vocabulary, autocast=task == "training" and precision == "bf16", bucketed=how["bucketed"],
                     compiled=how["compiled"], device=device)
