"""The input of every structure: gene table + value MLP."""

import torch
from torch import Tensor, nn

from scbench.data.batch import CellBatch
from scbench.kernels.gene_value_embedding import gene_value_embedding


class GeneValueEmbedding(nn.Module):
    """x = E[gene] + W₂ relu(W₁ value + b₁) + b₂."""

    def __init__(self, vocabulary_size: int, width: int, cls_token: int):
        super().__init__()
        self.cls_token = cls_token
        self.table = nn.Parameter(torch.empty(vocabulary_size, width))
        self.value_weight1 = nn.Parameter(torch.empty(width, 1))
        self.value_bias1 = nn.Parameter(torch.empty(width))
        self.value_weight2 = nn.Parameter(torch.empty(width, width))
        self.value_bias2 = nn.Parameter(torch.empty(width))

    def forward(self, batch: CellBatch) -> tuple[Tensor, Tensor]:
        """(token states [T, D], table rows of the batch's query genes [U, D], detached: MVC must not train the table).

        Both come from one call, so that ZeRO-3 gathers the table once.
        """
        genes = torch.where(batch.genes < 0, self.cls_token, batch.genes)
        states = gene_value_embedding(
            genes, batch.values, batch.gene_order, self.table,
            self.value_weight1, self.value_bias1, self.value_weight2, self.value_bias2,
        )
        return states, self.table.detach().index_select(0, batch.query_genes)
