"""The first value of every weight: a function of the seed and the weight's name alone."""

import re
import zlib
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from scbench.kernels import random

if TYPE_CHECKING:
    from scbench.models.model import ExpressionModel


@torch.no_grad()
def initialize(model: "ExpressionModel") -> None:
    """Draw every weight anew.

    Norms start at 1 and 0; what a structure has of its own, it fills itself (`Encoder.initialize`). Default recipe: gene
    table rows of length about 1, matrices Xavier-uniform, biases 0. Recipe aaai2025: the table Xavier-uniform (the pad's row
    too), all else as torch's layers do it, and all layers of a transformer alike at first (nn.TransformerEncoder copies one).
    """
    reference = model.config.recipe == "aaai2025"
    shapes = {name: parameter.shape for name, parameter in model.named_parameters()}
    for name, parameter in model.named_parameters():
        drawn_as = name
        if reference and model.config.structure == "transformer":
            drawn_as = re.sub(r"^encoder\.layers\.\d+", "encoder.layers.0", name)
        generator = random.generator(random.key(model.seed, random.Stream.INITIALIZATION, zlib.crc32(drawn_as.encode())))
        if name.startswith("encoder.") and model.encoder.initialize(name.removeprefix("encoder."), parameter, generator):
            continue
        if "norm" in name:
            parameter.fill_(1.0 if name.endswith("weight") else 0.0)
        elif name == "embedding.table":
            if reference:
                nn.init.xavier_uniform_(parameter, generator=generator)
            else:
                parameter.normal_(0, model.config.width**-0.5, generator=generator)
        elif reference:
            _as_torch(name, parameter, shapes, generator)
        elif parameter.ndim >= 2:
            nn.init.xavier_uniform_(parameter, generator=generator)
        else:
            parameter.zero_()


def _as_torch(name: str, parameter: Tensor, shapes: dict[str, torch.Size], generator: torch.Generator) -> None:
    """As nn.Linear, nn.Conv1d and nn.MultiheadAttention: uniform within 1/√(inputs of the layer), biases too; attention's
    input projection Xavier-uniform, its biases 0."""
    if "query_key_value" in name or name.endswith("attention_output.bias"):
        if parameter.ndim == 2:
            nn.init.xavier_uniform_(parameter, generator=generator)
        else:
            parameter.zero_()
        return
    weight = shapes[name if parameter.ndim >= 2 else name.replace("bias", "weight")]
    bound = weight[1:].numel() ** -0.5
    parameter.uniform_(-bound, bound, generator=generator)
