"""Convolutional encoder over a cell's tokens in the order of the batch (structures cnn and cnn_sorted)."""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from scbench.config import ModelConfig
from scbench.data.batch import CellBatch
from scbench.kernels import backend
from scbench.kernels.add_norm import dropout, norm_gelu_add
from scbench.kernels.convolution import convolution_pool
from scbench.models.dropout_keys import DropoutKeys
from scbench.models.encoders.batch_norm import BatchNorm
from scbench.models.encoders.dense import absent, to_dense
from scbench.models.encoders.encoder import Encoder

KERNEL = 9


class ConvolutionPool(nn.Conv1d):
    """torch's convolution, parameters and all, along rows, and the pool beside it."""

    def forward(self, states: Tensor, lengths: Tensor | None) -> tuple[Tensor, Tensor]:
        """As kernels.convolution.convolution_pool."""
        return convolution_pool(states, self.weight, self.bias, self.stride[0], lengths)


class CnnLayer(nn.Module):
    """x ← dropout(GELU(norm(conv x))) + maxpool x, at stride 2 except in layers 0, 6, …

    A cell of n tokens leaves ⌈n / 2⌉ at stride 2: the max pool keeps an odd token out, so any length and depth fit (the
    reference fails on odd lengths). Past a cell's end the convolution sees zeros, as it does past the batch's.
    """

    def __init__(self, config: ModelConfig, number: int):
        super().__init__()
        width = config.width
        self.number, self.probability = number, config.dropout
        self.stride = 1 if number % 6 == 0 else 2
        self.convolution = ConvolutionPool(width, width, KERNEL, self.stride)
        self.norm = BatchNorm(width) if config.recipe == "aaai2025" else nn.LayerNorm(width)

    def forward(self, states: Tensor, lengths: Tensor | None, token_keys: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """states [B, S, D], zero past each cell's length; lengths [B], None if all have S; dropout keys [B, ≥ S] → (states,
        lengths)."""
        (mixed, pooled), norm = self.convolution(states, lengths), self.norm
        length = mixed.shape[1]
        token_keys = None if token_keys is None else token_keys[:, :length].flatten()
        if isinstance(norm, BatchNorm):
            output = pooled.flatten(0, 1) + dropout(F.gelu(norm(mixed)).flatten(0, 1), token_keys, self.probability)
        else:
            output = norm_gelu_add(
                mixed.flatten(0, 1), pooled.flatten(0, 1), norm.weight, norm.bias, token_keys, self.probability
            )
        output = output.view(mixed.shape)
        if lengths is None:
            return output, None
        lengths = (lengths + self.stride - 1) // self.stride
        return output.masked_fill(absent(lengths, length), 0), lengths


class CnnEncoder(Encoder):
    """`config.layers` layers, then the mean over positions.

    Recipe aaai2025 takes pads for data in the convolution, the pool, the batch norm and the mean. By default a LayerNorm
    over channels replaces the batch norm and pads take no part: a cell's embedding depends on that cell alone.
    Position p of a shortened cell is dropped by the key of the cell's token p.
    """

    pools = True

    def __init__(self, config: ModelConfig):
        super().__init__(config)
        self.layers = nn.ModuleList(CnnLayer(config, number) for number in range(config.layers))

    def forward(self, states: Tensor, batch: CellBatch, keys: DropoutKeys) -> Tensor:
        """states [T, D] → cell embeddings [B, D], float32."""
        cells, length, lengths = batch.n_cells, batch.max_tokens, batch.lengths
        # On a GPU the host would have to wait to know that no cell is shorter than another.
        if self.config.recipe == "aaai2025" or (backend.use_native(states) and bool((lengths == length).all())):
            dense, lengths = states.view(cells, length, states.shape[1]), None
        else:
            dense = to_dense(states, batch, length).masked_fill(absent(lengths, length), 0)
        for number, layer in enumerate(self.layers):
            token_keys = keys(number)
            if token_keys is not None:
                token_keys = token_keys.view(cells, length) if lengths is None else to_dense(token_keys, batch, length)
            dense, lengths = layer(dense, lengths, token_keys)
        sums = dense.sum(1, dtype=torch.promote_types(dense.dtype, torch.float32))
        return sums / (dense.shape[1] if lengths is None else lengths[:, None])
