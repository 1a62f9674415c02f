"""Encoders: packed token states in; token states, or cell embeddings, out."""

from scbench.config import ModelConfig
from scbench.models.encoders.encoder import Encoder
from scbench.models.encoders.transformer import TransformerEncoder


def make_encoder(config: ModelConfig) -> Encoder:
    """The encoder of a structure."""
    return {
        "transformer": TransformerEncoder,
    }[config.structure](config)
