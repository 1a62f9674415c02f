"""The encoders of the recipe default in good plain PyTorch, over a padded rectangle of cells.

Written apart from scbench's, from what each structure is: dense tensors, torch's own layers, autograd. Modules bear the names
of scbench's, so that both load the same weights. `forward(x [B, L, D], batch, padded)`; `padded`: whether there are
pads at all, known on the host. Token structures return [B, L, D] (pads: anything), the others cells [B, D].
"""

import math

import torch
from dense_batch import DenseBatch
from plain_scan import selective_scan
from torch import Tensor, nn
from torch.nn import functional as F

from scbench.config import ModelConfig

KERNEL = 9  # of the convolutions
FACTOR_WIDTH = 64  # of the graph's tables
EXPANSION, STATES, TAPS = 2, 4, 4  # of Mamba


class Transformer(nn.Module):
    """Post-LN, ReLU, feed-forward width = width; dropout behind attention, inside and behind the feed-forward network."""

    class Layer(nn.Module):
        def __init__(self, config: ModelConfig, attention: str):
            super().__init__()
            width = config.width
            self.heads, self.matmul, self.dropout = config.heads, attention == "matmul", nn.Dropout(config.dropout)
            self.query_key_value = nn.Linear(width, 3 * width)
            self.attention_output = nn.Linear(width, width)
            self.attention_norm = nn.LayerNorm(width)
            self.linear1 = nn.Linear(width, width)
            self.linear2 = nn.Linear(width, width)
            self.feed_forward_norm = nn.LayerNorm(width)

        def forward(self, x: Tensor, attended: Tensor | None) -> Tensor:
            cells, length, width = x.shape
            query, key, value = self.query_key_value(x).view(cells, length, 3, self.heads, -1).permute(2, 0, 3, 1, 4)
            if self.matmul:
                mixed = matmul_attention(query * (width // self.heads) ** -0.5, key, value, attended)
            else:
                mixed = F.scaled_dot_product_attention(query, key, value, attn_mask=attended)
            mixed = self.attention_output(mixed.transpose(1, 2).reshape(cells, length, width))
            x = self.attention_norm(x + self.dropout(mixed))
            inner = self.dropout(torch.relu(self.linear1(x)))
            return self.feed_forward_norm(x + self.dropout(self.linear2(inner)))

    def __init__(self, config: ModelConfig, attention: str):
        super().__init__()
        self.layers = nn.ModuleList(self.Layer(config, attention) for _ in range(config.layers))

    def forward(self, x: Tensor, batch: DenseBatch, padded: bool) -> Tensor:
        attended = ~batch.padding[:, None, None, :] if padded else None  # without a mask SDPA is quicker
        for layer in self.layers:
            x = layer(x, attended)
        return x


def matmul_attention(query: Tensor, key: Tensor, value: Tensor, attended: Tensor | None) -> Tensor:
    """softmax(q kᵀ) v as three operations, [B, H, L, d] each; on a CPU in bf16 now and then faster than SDPA."""
    scores = query @ key.transpose(2, 3)
    if attended is not None:
        scores = scores.masked_fill(~attended, -torch.inf)
    return scores.float().softmax(-1).to(value.dtype) @ value


class Cnn(nn.Module):
    """x ← dropout(GELU(LN(conv x))) + maxpool x, stride 2 except in layers 0, 6, …; then the mean. Zeros past a cell's end."""

    class Layer(nn.Module):
        def __init__(self, config: ModelConfig, number: int):
            super().__init__()
            self.stride, self.dropout = 1 if number % 6 == 0 else 2, nn.Dropout(config.dropout)
            self.convolution = nn.Conv1d(config.width, config.width, KERNEL, self.stride, padding=KERNEL // 2)
            self.norm = nn.LayerNorm(config.width)

        def forward(self, x: Tensor, lengths: Tensor, padded: bool) -> tuple[Tensor, Tensor]:
            rows = x.transpose(1, 2)
            mixed = self.dropout(F.gelu(self.norm(self.convolution(rows).transpose(1, 2))))
            if padded:
                rows = rows.masked_fill(past(lengths, x)[:, None], -torch.inf)
            x = mixed + F.max_pool1d(rows, self.stride, ceil_mode=True).transpose(1, 2)
            lengths = -(-lengths // self.stride)
            return x.masked_fill(past(lengths, x)[..., None], 0) if padded else x, lengths

    def __init__(self, config: ModelConfig, attention: str):
        super().__init__()
        self.layers = nn.ModuleList(self.Layer(config, number) for number in range(config.layers))

    def forward(self, x: Tensor, batch: DenseBatch, padded: bool) -> Tensor:
        lengths = batch.lengths
        if padded:
            x = x.masked_fill(batch.padding[..., None], 0)
        for layer in self.layers:
            x, lengths = layer(x, lengths, padded)
        return x.sum(1, dtype=torch.float32) / lengths[:, None]


def past(lengths: Tensor, x: Tensor) -> Tensor:
    """bool [B, L], the positions of x [B, L, D] past each cell's end."""
    return torch.arange(x.shape[1], device=x.device) >= lengths[:, None]


class Linear(nn.Module):
    """x ← x + dropout(GELU(LN(W₂ dropout(relu(W₁ x)))))."""

    class Layer(nn.Module):
        def __init__(self, config: ModelConfig):
            super().__init__()
            self.linear1, self.linear2 = (nn.Linear(config.width, config.width) for _ in range(2))
            self.norm, self.dropout = nn.LayerNorm(config.width), nn.Dropout(config.dropout)

        def forward(self, x: Tensor) -> Tensor:
            inner = self.dropout(torch.relu(self.linear1(x)))
            return x + self.dropout(F.gelu(self.norm(self.linear2(inner))))

    def __init__(self, config: ModelConfig, attention: str):
        super().__init__()
        self.layers = nn.ModuleList(self.Layer(config) for _ in range(config.layers))

    def forward(self, x: Tensor, batch: DenseBatch, padded: bool) -> Tensor:
        for layer in self.layers:
            x = layer(x)
        return x


class LinearMixer(nn.Module):
    """x ← GELU(LN(mix of positions(mix of channels(x)))) + average pool of x, down to one position. The first layer has the
    model's own number of positions; those that a cell lacks take no part in it."""

    class Layer(nn.Module):
        def __init__(self, width: int, positions: int, shorter: int):
            super().__init__()
            self.window = positions - 2 * (shorter - 1)
            self.channel_mix, self.position_mix = nn.Linear(width, width), nn.Linear(positions, shorter)
            self.norm = nn.LayerNorm(width)

        def pool(self, x: Tensor) -> Tensor:
            return F.avg_pool1d(x.transpose(1, 2), self.window, stride=2).transpose(1, 2)

        def forward(self, x: Tensor, present: Tensor | None) -> Tensor:
            mixed, pooled = self.channel_mix(x), self.pool(x)
            if present is not None:
                mixed = mixed * present
                pooled = pooled / self.pool(present).clamp(min=1 / x.shape[1])
            return F.gelu(self.norm(self.position_mix(mixed.transpose(1, 2)).transpose(1, 2))) + pooled

    def __init__(self, config: ModelConfig, attention: str):
        super().__init__()
        self.positions = config.max_genes + 1
        sizes = [self.positions]
        for number in range(config.layers):
            sizes.append(1 if number == config.layers - 1 else max(1, sizes[-1] // 2))
        self.layers = nn.ModuleList(self.Layer(config.width, *sizes[i : i + 2]) for i in range(config.layers))

    def forward(self, x: Tensor, batch: DenseBatch, padded: bool) -> Tensor:
        present = None
        if padded or x.shape[1] < self.positions:
            present = F.pad(~batch.padding, (0, self.positions - x.shape[1]))[..., None].to(x.dtype)
            x = F.pad(x, (0, 0, 0, self.positions - x.shape[1])) * present
        for layer in self.layers:
            x, present = layer(x, present), None
        return x[:, 0].float()


class Mamba(nn.Module):
    """x + dropout(Mamba(RMSNorm(x))) (Gu and Dao 2023), an RMSNorm at the end. Causal: pads at the end change nothing."""

    class Layer(nn.Module):
        def __init__(self, config: ModelConfig):
            super().__init__()
            width, channels, self.rank = config.width, EXPANSION * config.width, math.ceil(config.width / 16)
            self.norm, self.dropout = nn.RMSNorm(width, eps=1e-5), nn.Dropout(config.dropout)
            self.input_projection = nn.Linear(width, 2 * channels, bias=False)
            self.convolution_weight = nn.Parameter(torch.empty(channels, TAPS))
            self.convolution_bias = nn.Parameter(torch.empty(channels))
            self.selection = nn.Linear(channels, self.rank + 2 * STATES, bias=False)
            self.step_weight = nn.Parameter(torch.empty(channels, self.rank))
            self.step_bias = nn.Parameter(torch.empty(channels))
            self.decay_logarithm = nn.Parameter(torch.empty(channels, STATES))
            self.skip = nn.Parameter(torch.empty(channels))
            self.output_projection = nn.Linear(channels, width, bias=False)

        def forward(self, states: Tensor) -> Tensor:
            x, gate = self.input_projection(self.norm(states)).chunk(2, -1)
            x = F.conv1d(x.transpose(1, 2), self.convolution_weight[:, None], self.convolution_bias, padding=TAPS - 1,
                         groups=x.shape[2])[..., : states.shape[1]].transpose(1, 2)
            x = F.silu(x)
            low_rank_step, b, c = self.selection(x).split([self.rank, STATES, STATES], -1)
            step = F.softplus(F.linear(low_rank_step, self.step_weight).float() + self.step_bias)
            x = selective_scan(x, step, -self.decay_logarithm.float().exp(), b, c, self.skip)
            return states + self.dropout(self.output_projection(x * F.silu(gate)))

    def __init__(self, config: ModelConfig, attention: str):
        super().__init__()
        self.layers = nn.ModuleList(self.Layer(config) for _ in range(config.layers))
        self.final_norm = nn.RMSNorm(config.width, eps=1e-5)

    def forward(self, x: Tensor, batch: DenseBatch, padded: bool) -> Tensor:
        for layer in self.layers:
            x = layer(x)
        return self.final_norm(x)


class Gnn(nn.Module):
    """x ← x + dropout(GELU(LN(W A x))), A = softmax over the cell's tokens of F Fᵀ + G Gᵀ, both from tables of genes."""

    class Layer(nn.Module):
        def __init__(self, config: ModelConfig, attention: str):
            super().__init__()
            self.matmul, self.dropout = attention == "matmul", nn.Dropout(config.dropout)
            self.factor_linear_table = nn.Parameter(torch.empty(config.vocabulary_size, FACTOR_WIDTH))
            self.factor_table = nn.Parameter(torch.empty(config.vocabulary_size, FACTOR_WIDTH))
            self.factor_mlp1, self.factor_mlp2 = (nn.Linear(FACTOR_WIDTH, FACTOR_WIDTH) for _ in range(2))
            self.linear, self.norm = nn.Linear(config.width, config.width), nn.LayerNorm(config.width)

        def forward(self, x: Tensor, genes: Tensor, attended: Tensor | None) -> Tensor:
            f = self.factor_mlp2(F.gelu(self.factor_mlp1(F.embedding(genes, self.factor_linear_table))))
            factors = torch.cat([f, F.embedding(genes, self.factor_table).to(f.dtype)], -1)[:, None]
            value = x[:, None].to(f.dtype)
            if self.matmul:
                mixed = matmul_attention(factors, factors, value, attended)
            else:
                mixed = F.scaled_dot_product_attention(factors, factors, value, attn_mask=attended, scale=1.0)
            return x + self.dropout(F.gelu(self.norm(self.linear(mixed[:, 0]))))

    def __init__(self, config: ModelConfig, attention: str):
        super().__init__()
        self.layers = nn.ModuleList(self.Layer(config, attention) for _ in range(config.layers))

    def forward(self, x: Tensor, batch: DenseBatch, padded: bool) -> Tensor:
        attended = ~batch.padding[:, None, None, :] if padded else None
        for layer in self.layers:
            x = layer(x, batch.genes, attended)
        return x


ENCODERS = {"transformer": Transformer, "cnn": Cnn, "cnn_sorted": Cnn, "linear": Linear, "linear_mixer": LinearMixer,
            "mamba": Mamba, "gnn": Gnn}
