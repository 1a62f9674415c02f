"""Graph encoder: how much a gene takes from another depends on the two genes alone, not on their values."""

from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from scbench.config import ModelConfig
from scbench.data.batch import CellBatch
from scbench.kernels import backend
from scbench.kernels.add_norm import norm_gelu_add
from scbench.kernels.attention import attention
from scbench.kernels.table_rows import table_rows
from scbench.models.dropout_keys import DropoutKeys
from scbench.models.encoders.encoder import Encoder
from scbench.models.linear_layer import Linear

FACTOR_WIDTH = 64


class Genes(NamedTuple):
    """The genes whose factors are computed."""

    ids: Tensor  # int [U], rows of the tables
    order: Tensor  # int [U], stable sort of them
    of_tokens: Tensor | None  # int [T], which of them a token is; None: they are the tokens' own, one a token

    @classmethod
    def of(cls, batch: CellBatch) -> "Genes":
        """Each gene once, whatever cells it is in; on a GPU, whose host would wait for their number, each token's."""
        if not backend.use_native(batch.genes):
            return cls(batch.genes, batch.gene_order, None)
        order = batch.gene_order.long()
        ids, of_sorted = batch.genes[order].unique_consecutive(return_inverse=True)
        of_tokens = torch.empty_like(of_sorted)
        of_tokens[order] = of_sorted
        return cls(ids, torch.arange(len(ids)), of_tokens)


class GnnLayer(nn.Module):
    """x ← x + GELU(LN(linear(A x))), A = softmax over the cell's real tokens of F Fᵀ + G Gᵀ, without scaling.

    F = MLP(factor_linear_table[gene]) and G = factor_table[gene], tables of this layer.
    """

    def __init__(self, config: ModelConfig, number: int):
        super().__init__()
        # The reference, so recipe aaai2025, drops nothing.
        self.number, self.probability = number, 0.0 if config.recipe == "aaai2025" else config.dropout
        self.factor_linear_table = nn.Parameter(torch.empty(config.vocabulary_size, FACTOR_WIDTH))
        self.factor_table = nn.Parameter(torch.empty(config.vocabulary_size, FACTOR_WIDTH))
        self.factor_mlp1 = Linear(FACTOR_WIDTH, FACTOR_WIDTH)
        self.factor_mlp2 = Linear(FACTOR_WIDTH, FACTOR_WIDTH)
        self.linear = Linear(config.width, config.width)
        self.norm = nn.LayerNorm(config.width)

    def forward(self, states: Tensor, batch: CellBatch, genes: Genes, keys: DropoutKeys) -> Tensor:
        """states [T, D] → [T, D]."""
        rows = table_rows(self.factor_linear_table, genes.ids, genes.order)
        f = self.factor_mlp2(F.gelu(self.factor_mlp1(rows)))
        g = table_rows(self.factor_table, genes.ids, genes.order)
        factors = torch.cat([f, g], 1)
        if genes.of_tokens is not None:
            factors = table_rows(factors, genes.of_tokens, batch.gene_order)
        factors = factors.unsqueeze(1)  # one head
        mixed = attention(factors, factors, states.unsqueeze(1), batch.cell_offsets, scale=1.0, key_lengths=batch.lengths,
                          max_tokens=batch.max_tokens)
        norm, token_keys = self.norm, keys(self.number)
        return norm_gelu_add(self.linear(mixed.flatten(1)), states, norm.weight, norm.bias, token_keys, self.probability)


class GnnEncoder(Encoder):
    """`config.layers` layers."""

    def __init__(self, config: ModelConfig):
        super().__init__(config)
        self.layers = nn.ModuleList(GnnLayer(config, number) for number in range(config.layers))

    def forward(self, states: Tensor, batch: CellBatch, keys: DropoutKeys) -> Tensor:
        """states [T, D] → [T, D]."""
        genes = Genes.of(batch)
        for layer in self.layers:
            states = layer(states, batch, genes, keys)
        return states

    def initialize(self, name: str, parameter: Tensor, generator: torch.Generator) -> bool:
        """The factor tables: rows of length about 1, so that attention starts almost even. The reference (recipe aaai2025)
        draws them from [0, 1): logits of mean 17, and a token of 513 gives itself a weight of 0.2 (measured)."""
        if not name.endswith("table"):
            return False
        if self.config.recipe == "aaai2025":
            parameter.uniform_(generator=generator)
        else:
            parameter.normal_(0, FACTOR_WIDTH**-0.5, generator=generator)
        return True
