"""The two heads: regression at masked tokens, and MVC from the cell embedding; and what tells them a cell's depth."""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from scbench.kernels.masked_regression import masked_regression
from scbench.kernels.mvc import mvc
from scbench.models.linear_layer import Linear

NEGATIVE_SLOPE = 0.01  # LeakyReLU of both heads, as in the reference


class RegressionHead(nn.Module):
    """MLP D → D → D → 1 on masked tokens only."""

    def __init__(self, width: int):
        super().__init__()
        self.linear1 = Linear(width, width)
        self.linear2 = Linear(width, width)
        self.linear3 = nn.Linear(width, 1)

    def forward(self, states: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        """states [M, D], targets [M] → (sum of squared errors, predictions [M])."""
        hidden = F.leaky_relu(self.linear1(states), NEGATIVE_SLOPE)
        hidden = F.leaky_relu(self.linear2(hidden), NEGATIVE_SLOPE)
        return masked_regression(hidden, self.linear3.weight, self.linear3.bias, targets)


class MvcHead(nn.Module):
    """MLP D → D → D from a gene's table row to its query; the prediction is query · cell embedding."""

    def __init__(self, width: int):
        super().__init__()
        self.linear1 = Linear(width, width)
        self.linear2 = Linear(width, width)
        self.linear3 = Linear(width, width)

    def forward(
        self,
        query_embeddings: Tensor,
        query_index: Tensor,
        query_order: Tensor,
        cell_embedding: Tensor,
        cell_index: Tensor,
        targets: Tensor,
    ) -> tuple[Tensor, Tensor]:
        """query_embeddings [U, D], cell_embedding [B, D], the rest [M] as in `mvc` → (sum of squares, predictions [M])."""
        hidden = F.leaky_relu(self.linear1(query_embeddings), NEGATIVE_SLOPE)
        hidden = F.leaky_relu(self.linear2(hidden), NEGATIVE_SLOPE)
        return mvc(self.linear3(hidden), query_index, query_order, cell_embedding, cell_index, targets)


class LibrarySizeOffset(nn.Module):
    """A vector added to what the heads see of a cell: linear in the logarithm of its total count.

    With MVC's dot product every gene gets an intercept and a slope in depth of its own, so the cell embedding need not hold
    depth to predict well.
    """

    def __init__(self, width: int):
        super().__init__()
        self.linear = nn.Linear(1, width)

    def forward(self, library_sizes: Tensor) -> Tensor:
        """float32 [B] → [B, D]."""
        # about −1 … 1 for 10² … 10⁵ counts
        depth = (torch.log1p(library_sizes) - 8) / 4
        return self.linear(depth.to(self.linear.weight.dtype)[:, None])
