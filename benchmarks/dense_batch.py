"""The same cells as a padded rectangle, for the implementations that need one."""

from typing import NamedTuple

import torch
from torch import Tensor

from scbench.data.batch import MASKED_VALUE, CellBatch


class DenseBatch(NamedTuple):
    """B cells of L positions, `<cls>` first, pads last; M masked genes."""

    genes: Tensor  # int64 [B, L]
    values: Tensor  # float32 [B, L], as the model sees them; 0 at pads
    true_values: Tensor  # float32 [B, L], nothing hidden
    padding: Tensor  # bool [B, L], True at pads
    masked: Tensor  # int64 [M], positions in the flattened rectangle
    cells: Tensor  # int64 [M], the cell of each
    targets: Tensor  # float32 [M]


def pad(batch: CellBatch, length: int, pad_token: int) -> DenseBatch:
    """`batch` as a rectangle of `length` positions (at least the longest cell's tokens)."""
    lengths = batch.cell_offsets.diff().long()
    positions = torch.arange(length).expand(len(lengths), length)
    padding = positions >= lengths[:, None]
    genes = torch.full(padding.shape, pad_token)
    values = torch.zeros(padding.shape)
    true_values = torch.zeros(padding.shape)
    genes[~padding] = batch.genes.long()
    values[~padding] = batch.values
    whole = batch.values.clone()
    whole[batch.masked.long()] = batch.targets
    true_values[~padding] = whole
    masked = (values == MASKED_VALUE).flatten().nonzero()[:, 0]
    return DenseBatch(genes, values, true_values, padding, masked, masked // length, batch.targets)
