"""Linear mixer: linear maps over channels and over positions, the number of positions halves with each layer."""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from scbench.config import ModelConfig
from scbench.data.batch import CellBatch
from scbench.errors import UserError
from scbench.models.dropout_keys import DropoutKeys
from scbench.models.encoders.batch_norm import BatchNorm
from scbench.models.encoders.dense import absent, to_dense
from scbench.models.encoders.encoder import Encoder
from scbench.models.linear_layer import Linear


def pool_positions(states: Tensor, positions: int) -> Tensor:
    """Adaptive average pool of [B, S, D] to [B, S // 2 or 1, D]: its windows are 2 (S odd: 3) wide, or everything.

    Not torch's own adaptive pool, whose gradient has no fixed order on a GPU.
    """
    window = states.shape[1] - 2 * (positions - 1)
    return F.avg_pool1d(states.transpose(1, 2), window, stride=2).transpose(1, 2)


class LinearMixerLayer(nn.Module):
    """x ← GELU(norm(mix of positions(mix of channels(x)))) + average pool of x."""

    def __init__(self, config: ModelConfig, positions: int, new_positions: int):
        super().__init__()
        width = config.width
        self.new_positions = new_positions
        self.channel_mix = Linear(width, width)
        self.position_mix = Linear(positions, new_positions)
        self.norm = BatchNorm(width) if config.recipe == "aaai2025" else nn.LayerNorm(width)

    def forward(self, states: Tensor, present: Tensor | None) -> Tensor:
        """states [B, S, D] → [B, S', D]; present, 1 or 0 [B, S, 1]: the positions that take part, None for all; the others'
        states are 0."""
        mixed, pooled = self.channel_mix(states), pool_positions(states, self.new_positions)
        if present is not None:
            mixed = mixed * present  # the bias filled the absent ones
            pooled = pooled / pool_positions(present, self.new_positions).clamp(min=1 / states.shape[1])
        mixed = self.position_mix(mixed.transpose(1, 2)).transpose(1, 2)
        return F.gelu(self.norm(mixed)) + pooled


class LinearMixerEncoder(Encoder):
    """`config.layers` layers, the last to one position: the cell's embedding. The positions of the first layer,
    `config.max_genes` and <cls>, are part of the model.

    Recipe aaai2025 normalises over the batch and takes pads for data. By default a LayerNorm over channels replaces
    the batch norm and the positions that a cell lacks take no part in the first layer; behind it every cell has all.
    Nothing is dropped, as in the reference: behind the first layer a position is no token any more.
    """

    pools = True

    def __init__(self, config: ModelConfig):
        super().__init__(config)
        self.positions = config.max_genes + 1
        self.layers = nn.ModuleList()
        positions = self.positions
        for number in range(config.layers):
            new_positions = 1 if number == config.layers - 1 else max(1, positions // 2)
            self.layers.append(LinearMixerLayer(config, positions, new_positions))
            positions = new_positions

    def forward(self, states: Tensor, batch: CellBatch, keys: DropoutKeys) -> Tensor:
        """states [T, D] → cell embeddings [B, D], float32; UserError for a cell longer than the model."""
        if batch.max_tokens > self.positions:
            raise UserError(f"a cell has {batch.max_tokens - 1} genes, and this linear_mixer model takes at most "
                            f"{self.positions - 1}: sample longer cells, or pretrain with a larger --max-genes.")
        if self.config.recipe == "aaai2025":
            dense, present = states.view(batch.n_cells, self.positions, -1), None
        else:
            present = (~absent(batch.lengths, self.positions)).to(states.dtype)
            dense = to_dense(states, batch, self.positions) * present
        for layer in self.layers:
            dense, present = layer(dense, present), None
        return dense[:, 0].to(torch.promote_types(dense.dtype, torch.float32))
