"""Linear mixer: linear maps over channels and over positions, the number of positions halves with each layer."""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from scbench.config import ModelConfig
from scbench.data.batch import CellBatch
from scbench.errors import UserError
from scbench.kernels.add_norm import norm_gelu_add
from scbench.kernels.linear import left_product, linear
from scbench.kernels.pool_positions import pool_positions
from scbench.models.dropout_keys import DropoutKeys
from scbench.models.encoders.batch_norm import BatchNorm
from scbench.models.encoders.encoder import Encoder


class ChannelMix(nn.Linear):
    """The mix of channels behind that of positions."""

    def forward(self, states: Tensor, taken: Tensor, offsets: Tensor) -> Tensor:
        """states [S', B, D], taken [S', B or 1, 1], offsets [S'] → [S', B, D]."""
        return linear(states.flatten(0, 1), self.weight).view(states.shape) + (taken * self.bias + offsets[:, None, None])


class PositionMix(nn.Linear):
    """The mix of positions, then `channel_mix`: within, because ZeRO-3 gathers the weights of modules that run."""

    def forward(self, states: Tensor, present: Tensor | None, channel_mix: ChannelMix) -> Tensor:
        """states [S, B, D], present [S, B] → [S', B, D]."""
        taken = self.weight.sum(1, keepdim=True) if present is None else self.weight @ present
        mixed = left_product(self.weight, states.flatten(1)).view(-1, *states.shape[1:])
        return channel_mix(mixed, taken[..., None], self.bias)


class LinearMixerLayer(nn.Module):
    """x ← GELU(norm(mix of positions(mix of channels(x)))) + average pool of x.

    Computed as mix of channels(mix of positions(x)), the same thing: both are linear, and there are half as many positions
    to mix the channels of. The bias of the channels becomes, at each new position, its multiple by the sum of what that
    position takes from the old ones.
    """

    def __init__(self, config: ModelConfig, positions: int, new_positions: int):
        super().__init__()
        width = config.width
        self.new_positions = new_positions
        self.channel_mix = ChannelMix(width, width)
        self.position_mix = PositionMix(positions, new_positions)
        self.norm = BatchNorm(width) if config.recipe == "aaai2025" else nn.LayerNorm(width)

    def forward(self, states: Tensor, present: Tensor | None) -> Tensor:
        """states [S, B, D] → [S', B, D]; present, 1 or 0 [S, B]: the positions that take part, None for all; the others'
        states are 0."""
        mixed, pooled = self.position_mix(states, present, self.channel_mix), pool_positions(states, self.new_positions)
        if present is not None:
            pooled = pooled / pool_positions(present, self.new_positions).clamp(min=1 / len(states))[..., None]
        norm = self.norm
        if isinstance(norm, BatchNorm):
            return F.gelu(norm(mixed)) + pooled
        rows = norm_gelu_add(mixed.flatten(0, 1), pooled.flatten(0, 1), norm.weight, norm.bias, None, 0.0)
        return rows.view(pooled.shape)


def positions_first(states: Tensor, batch: CellBatch, positions: int) -> Tensor:
    """[T, D] → [positions, B, D], zero past each cell's end: to mix positions is then one product of matrices."""
    cells, n_tokens = batch.n_cells, states.shape[0]
    if n_tokens == cells * positions:
        return states.view(cells, positions, -1).transpose(0, 1).contiguous()
    lengths = batch.cell_offsets.diff()
    numbers = torch.arange(cells, device=states.device)
    numbers = (numbers - batch.cell_offsets[:-1].long() * cells).repeat_interleave(lengths, output_size=n_tokens)
    places = torch.arange(n_tokens, device=states.device) * cells + numbers
    dense = states.new_zeros(positions * cells, states.shape[1]).index_copy(0, places, states)
    return dense.view(positions, cells, -1)


class LinearMixerEncoder(Encoder):
    """`config.layers` layers, the last to one position: the cell's embedding. The positions of the first layer,
    `config.max_genes` and <cls>, are part of the model.

    Recipe aaai2025 normalises over the batch and takes pads for data. By default a LayerNorm over channels replaces
    the batch norm and the positions that a cell lacks take no part in the first layer; behind it every cell has all.
    Nothing is dropped, as in the reference: behind the first layer a position is no token any more.
    """

    pools = True
    places = ()

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
        dense, present = positions_first(states, batch, self.positions), None
        # A GPU would have to be waited for to know that no cell lacks any.
        if self.config.recipe != "aaai2025" and (dense.is_cuda or (batch.lengths < self.positions).any()):
            present = (torch.arange(self.positions, device=dense.device)[:, None] < batch.lengths).to(dense.dtype)
            dense = dense * present[..., None]
        for layer in self.layers:
            dense, present = layer(dense, present), None
        return dense[0].to(torch.promote_types(dense.dtype, torch.float32))
