"""Transformer encoder over packed cells: full attention, post-LN, ReLU, feed-forward width = model width, no positions."""

import torch
from torch import Tensor, nn

from scbench.config import ModelConfig
from scbench.data.batch import CellBatch
from scbench.kernels.add_norm import add_norm
from scbench.kernels.attention import self_attention
from scbench.models.dropout_keys import DropoutKeys
from scbench.models.encoders.encoder import Encoder
from scbench.models.linear_layer import Linear

ATTENTION_OUTPUT, FEED_FORWARD_INNER, FEED_FORWARD_OUTPUT, ATTENTION_PROBABILITIES = range(4)  # the dropout sites of a layer


class TransformerLayer(nn.Module):
    """x ← LN(x + attention(x)); x ← LN(x + W₂ relu(W₁ x)) (Vaswani et al. 2017), dropout at three sites.

    Recipe aaai2025: on the attention probabilities too, and pads attend but are not attended to.
    """

    def __init__(self, config: ModelConfig, number: int):
        super().__init__()
        width = config.width
        self.number, self.heads, self.probability = number, config.heads, config.dropout
        self.reference = config.recipe == "aaai2025"
        self.query_key_value = Linear(width, 3 * width)
        self.attention_output = Linear(width, width)
        self.attention_norm = nn.LayerNorm(width)
        self.linear1 = Linear(width, width)
        self.linear2 = Linear(width, width)
        self.feed_forward_norm = nn.LayerNorm(width)

    def forward(self, states: Tensor, batch: CellBatch, keys: DropoutKeys) -> Tensor:
        """states [T, D] → [T, D]."""
        tokens, width = states.shape
        projection = self.query_key_value(states).view(tokens, 3, self.heads, -1)
        options = {"max_tokens": batch.max_tokens}
        if self.reference:
            options |= {"key_lengths": batch.lengths, "token_keys": keys(self.number, ATTENTION_PROBABILITIES),
                        "probability": self.probability}
        mixed = self.attention_output(self_attention(projection, batch.cell_offsets, **options).reshape(tokens, width))
        norm = self.attention_norm
        states = add_norm(mixed, states, norm.weight, norm.bias, keys(self.number, ATTENTION_OUTPUT), self.probability)
        inner = self.linear1.relu_dropout(states, keys(self.number, FEED_FORWARD_INNER), self.probability)
        norm = self.feed_forward_norm
        return add_norm(
            self.linear2(inner), states, norm.weight, norm.bias, keys(self.number, FEED_FORWARD_OUTPUT), self.probability
        )


class TransformerEncoder(Encoder):
    """`config.layers` layers, no final norm (as in the reference)."""

    places = (ATTENTION_OUTPUT,), (FEED_FORWARD_INNER,), (FEED_FORWARD_OUTPUT,)

    def __init__(self, config: ModelConfig):
        super().__init__(config)
        if config.recipe == "aaai2025":
            self.places = (*self.places, (ATTENTION_PROBABILITIES,))
        self.layers = nn.ModuleList(TransformerLayer(config, number) for number in range(config.layers))

    def forward(self, states: Tensor, batch: CellBatch, keys: DropoutKeys) -> Tensor:
        """states [T, D] → [T, D]."""
        for layer in self.layers:
            states = layer(states, batch, keys)
        if self.config.recipe == "aaai2025" and not self.training:
            # torch's fast path of nn.TransformerEncoder leaves zeros at pads; avg pooling, as the reference does it, sees them
            ends = (batch.cell_offsets[:-1] + batch.lengths).repeat_interleave(batch.cell_offsets.diff())
            states = states * (torch.arange(len(states), device=states.device) < ends)[:, None]
        return states
