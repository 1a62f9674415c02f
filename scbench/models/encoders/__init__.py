"""Encoders: packed token states in; token states, or cell embeddings, out."""

from scbench.models.encoders.cnn import CnnEncoder
from scbench.models.encoders.encoder import Encoder
from scbench.models.encoders.gnn import GnnEncoder
from scbench.models.encoders.linear import LinearEncoder
from scbench.models.encoders.linear_mixer import LinearMixerEncoder
from scbench.models.encoders.mamba import MambaEncoder
from scbench.models.encoders.transformer import TransformerEncoder

ENCODERS: dict[str, type[Encoder]] = {
    "transformer": TransformerEncoder,
    "cnn": CnnEncoder,
    "cnn_sorted": CnnEncoder,  # the same over tokens in another order (ModelConfig.inputs)
    "linear": LinearEncoder,
    "linear_mixer": LinearMixerEncoder,
    "mamba": MambaEncoder,
    "gnn": GnnEncoder,
}
