"""Mamba encoder over packed cells: a selective state space along each cell's tokens, from first to last."""

import math

import torch
from torch import Tensor, nn

from scbench.config import ModelConfig
from scbench.data.batch import CellBatch
from scbench.kernels.add_norm import dropout, rms_norm
from scbench.kernels.causal_conv import causal_conv_silu
from scbench.kernels.linear import linear
from scbench.kernels.selective_scan import gated_selective_scan
from scbench.models.dropout_keys import DropoutKeys
from scbench.models.encoders.encoder import Encoder
from scbench.models.linear_layer import Linear

EXPANSION, STATES, TAPS = 2, 4, 4  # channels over width, states a channel, taps of the convolution: the reference's
SMALLEST_STEP, LARGEST_STEP = 1e-3, 0.1  # of a new model
EPS = 1e-5


class MambaLayer(nn.Module):
    """x + Mamba(RMSNorm(x)) (Gu and Dao 2023, arXiv 2312.00752, figure 3), dropout at the block's output.

    E = 2 D channels; the step Δ comes from D / 16 numbers a token.
    """

    def __init__(self, config: ModelConfig, number: int):
        super().__init__()
        width, channels, rank = config.width, EXPANSION * config.width, math.ceil(config.width / 16)
        self.number, self.rank = number, rank
        self.probability = config.dropout if config.recipe == "default" else 0.0  # the reference's Mamba has none
        self.norm = nn.RMSNorm(width, eps=EPS)
        self.input_projection = Linear(width, 2 * channels, bias=False)
        self.convolution_weight = nn.Parameter(torch.empty(channels, TAPS))
        self.convolution_bias = nn.Parameter(torch.empty(channels))
        self.selection = Linear(channels, rank + 2 * STATES, bias=False)
        self.step_weight = nn.Parameter(torch.empty(channels, rank))
        self.step_bias = nn.Parameter(torch.empty(channels))
        self.decay_logarithm = nn.Parameter(torch.empty(channels, STATES))
        self.skip = nn.Parameter(torch.empty(channels))
        self.output_projection = Linear(channels, width, bias=False)

    def forward(self, states: Tensor, cell_offsets: Tensor, keys: DropoutKeys) -> Tensor:
        """states [T, D] → [T, D]."""
        x, gate = self.input_projection(rms_norm(states, self.norm.weight, EPS)).chunk(2, 1)
        x = causal_conv_silu(x, self.convolution_weight, self.convolution_bias, cell_offsets)
        low_rank_step, input_matrix, output_matrix = self.selection(x).split([self.rank, STATES, STATES], 1)
        step = linear(low_rank_step, self.step_weight)
        decay = -self.decay_logarithm.to(torch.promote_types(x.dtype, torch.float32)).exp()
        x = gated_selective_scan(x, step, self.step_bias, decay, input_matrix, output_matrix, self.skip, gate, cell_offsets)
        mixed = self.output_projection(x)
        return states + dropout(mixed, keys(self.number, 0), self.probability)


class MambaEncoder(Encoder):
    """`config.layers` layers and an RMSNorm. Causal: a token sees those before it, so pads at a cell's end change nothing."""

    places = ((0,),)

    def __init__(self, config: ModelConfig):
        super().__init__(config)
        self.layers = nn.ModuleList(MambaLayer(config, number) for number in range(config.layers))
        self.final_norm = nn.RMSNorm(config.width, eps=EPS)

    def forward(self, states: Tensor, batch: CellBatch, keys: DropoutKeys) -> Tensor:
        """states [T, D] → [T, D]."""
        for layer in self.layers:
            states = layer(states, batch.cell_offsets, keys)
        return rms_norm(states, self.final_norm.weight, EPS)

    def initialize(self, name: str, parameter: Tensor, generator: torch.Generator) -> bool:
        """As in the paper's code: decays 1 … N, skip 1, steps log-uniform in [0.001, 0.1], Conv1d's own uniform law."""
        match name.split(".")[-1]:
            case "decay_logarithm":
                parameter.copy_(torch.arange(1, STATES + 1).log())
            case "skip":
                parameter.fill_(1)
            case "step_weight":
                bound = parameter.shape[1] ** -0.5
                parameter.uniform_(-bound, bound, generator=generator)
            case "step_bias":
                step = parameter.uniform_(math.log(SMALLEST_STEP), math.log(LARGEST_STEP), generator=generator).exp()
                parameter.copy_(step + torch.log(-torch.expm1(-step)))  # the inverse of softplus
            case "convolution_weight" | "convolution_bias":
                parameter.uniform_(-(TAPS**-0.5), TAPS**-0.5, generator=generator)
            case _:
                return False
        return True
