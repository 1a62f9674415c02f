"""Batch normalisation as the reference uses it (recipe aaai2025)."""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from scbench.errors import UserError

MOMENTUM = 0.1  # torch's default, as in the reference


class BatchNorm(nn.Module):
    """Each channel over all cells and positions of a batch, pads included, in at least fp32 whatever the weights' dtype.

    Its result depends on how a batch is split, and every rank keeps statistics of its own.
    """

    def __init__(self, width: int):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))
        self.bias = nn.Parameter(torch.zeros(width))
        self.register_buffer("running_mean", torch.zeros(width))
        self.register_buffer("running_var", torch.ones(width))

    def _apply(self, function, recurse: bool = True) -> nn.Module:
        """Moves and casts the module, but never the statistics below fp32: DeepSpeed makes a whole model bf16."""
        mean, variance = self.running_mean, self.running_var
        super()._apply(function, recurse)
        new = self.running_mean
        dtype = torch.promote_types(new.dtype, torch.float32)
        self.running_mean, self.running_var = mean.to(new.device, dtype), variance.to(new.device, dtype)
        return self

    def forward(self, states: Tensor) -> Tensor:
        """states [B, S, D] → [B, S, D]; UserError for a single position in training, which has no variance."""
        rows = states.flatten(0, 1)
        if self.training and len(rows) == 1:
            raise UserError("a training batch of one cell leaves batch normalisation one value: use more cells at a time.")
        dtype = self.running_mean.dtype
        rows = F.batch_norm(rows.to(dtype), self.running_mean, self.running_var, self.weight.to(dtype), self.bias.to(dtype),
                            self.training, MOMENTUM)
        return rows.to(states.dtype).view(states.shape)
