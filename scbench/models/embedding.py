"""The input of every structure: gene table + value MLP."""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from scbench.config import ModelConfig
from scbench.data.batch import CellBatch
from scbench.kernels.gene_value_embedding import gene_value_embedding

REFERENCE_TABLE_WIDTH = 256  # the reference's table has it whatever the model's width; a linear layer follows


class _UntrainedRow(torch.autograd.Function):
    """A table, one row of which gets no gradient (nn.Embedding's padding_idx)."""

    @staticmethod
    def forward(ctx, table: Tensor, row: int) -> Tensor:
        ctx.row = row
        return table.view_as(table)

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor, None]:
        grad = grad.clone()
        grad[ctx.row] = 0
        return grad, None


class GeneValueEmbedding(nn.Module):
    """x = E[gene] + W₂ relu(W₁ value + b₁) + b₂; in the recipe aaai2025 E is a 256-wide table times a linear layer if the
    model's width is another, and the row of `<pad>` (id `pad`) stays as it was drawn. The default recipe has no pads."""

    def __init__(self, config: ModelConfig, pad: int):
        super().__init__()
        width = config.width
        self.untrained_row = pad if config.recipe == "aaai2025" else None
        projected = config.recipe == "aaai2025" and width != REFERENCE_TABLE_WIDTH
        self.table = nn.Parameter(torch.empty(config.vocabulary_size, REFERENCE_TABLE_WIDTH if projected else width))
        self.projection = nn.Linear(REFERENCE_TABLE_WIDTH, width) if projected else None
        self.value_weight1 = nn.Parameter(torch.empty(width, 1))
        self.value_bias1 = nn.Parameter(torch.empty(width))
        self.value_weight2 = nn.Parameter(torch.empty(width, width))
        self.value_bias2 = nn.Parameter(torch.empty(width))

    def forward(self, batch: CellBatch) -> tuple[Tensor, Tensor]:
        """(token states [T, D], gene embeddings of the batch's query genes [U, D], detached: MVC must not train the table).

        `batch.genes` holds vocabulary ids. Both come from one call, so that ZeRO-3 gathers the table once.
        """
        table = self.gene_table()
        states = gene_value_embedding(
            batch.genes, batch.values, batch.gene_order, table,
            self.value_weight1, self.value_bias1, self.value_weight2, self.value_bias2,
        )
        return states, table.detach().index_select(0, batch.query_genes)

    def gene_table(self) -> Tensor:
        """[V, D]: what a gene's tokens start from."""
        table = self.table if self.untrained_row is None else _UntrainedRow.apply(self.table, self.untrained_row)
        if self.projection is None:
            return table
        return F.linear(table, self.projection.weight, self.projection.bias)
