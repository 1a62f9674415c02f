"""Linear encoder: a feed-forward network a token, nothing mixes over genes."""

from torch import Tensor, nn

from scbench.config import ModelConfig
from scbench.data.batch import CellBatch
from scbench.kernels.add_norm import norm_gelu_add
from scbench.models.dropout_keys import DropoutKeys
from scbench.models.encoders.encoder import Encoder
from scbench.models.linear_layer import Linear

INNER, OUTPUT = range(2)  # the dropout sites of a layer; the reference, so recipe aaai2025, has none


class LinearLayer(nn.Module):
    """x ← x + GELU(LN(W₂ relu(W₁ x)))."""

    def __init__(self, config: ModelConfig, number: int):
        super().__init__()
        width = config.width
        self.number, self.probability = number, 0.0 if config.recipe == "aaai2025" else config.dropout
        self.linear1 = Linear(width, width)
        self.linear2 = Linear(width, width)
        self.norm = nn.LayerNorm(width)

    def forward(self, states: Tensor, keys: DropoutKeys) -> Tensor:
        """states [T, D] → [T, D]."""
        inner = self.linear1.relu_dropout(states, keys(self.number, INNER), self.probability)
        norm, token_keys = self.norm, keys(self.number, OUTPUT)
        return norm_gelu_add(self.linear2(inner), states, norm.weight, norm.bias, token_keys, self.probability)


class LinearEncoder(Encoder):
    """`config.layers` layers. <cls> sees no gene, so it is the same in every cell: the default pooling is the mean."""

    places = (INNER,), (OUTPUT,)

    def __init__(self, config: ModelConfig):
        super().__init__(config)
        self.layers = nn.ModuleList(LinearLayer(config, number) for number in range(config.layers))

    def forward(self, states: Tensor, batch: CellBatch, keys: DropoutKeys) -> Tensor:
        """states [T, D] → [T, D]."""
        for layer in self.layers:
            states = layer(states, keys)
        return states
