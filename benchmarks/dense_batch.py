"""The same cells as a padded rectangle, for the implementations that need one."""

from typing import NamedTuple

import torch
from torch import Tensor

from scbench.data.batch import MASKED_VALUE, CellBatch

SHORTEST = 0.75  # a bucket's shortest cell, as a share of its longest


class DenseBatch(NamedTuple):
    """B cells of L positions, `<cls>` first, pads last; M masked genes."""

    genes: Tensor  # int64 [B, L]
    values: Tensor  # float32 [B, L], as the model sees them; 0 at pads
    true_values: Tensor  # float32 [B, L], nothing hidden
    padding: Tensor  # bool [B, L], True at pads
    lengths: Tensor  # int64 [B], tokens without pads
    masked: Tensor  # int64 [M], positions in the flattened rectangle
    cells: Tensor  # int64 [M], the cell of each
    targets: Tensor  # float32 [M]
    denominator: Tensor  # float32 scalar, masked genes of the whole step

    def to(self, device: torch.device) -> "DenseBatch":
        """On another device."""
        return DenseBatch(*(x.to(device) for x in self))


def pad(batch: CellBatch, length: int, pad_token: int) -> DenseBatch:
    """`batch` as a rectangle of `length` positions (at least the longest cell's tokens)."""
    lengths = batch.cell_offsets.diff().long()
    padding = torch.arange(length) >= lengths[:, None]
    genes = torch.full(padding.shape, pad_token)
    values = torch.zeros(padding.shape)
    true_values = torch.zeros(padding.shape)
    genes[~padding] = batch.genes.long()
    values[~padding] = batch.values
    whole = batch.values.clone()
    whole[batch.masked.long()] = batch.targets
    true_values[~padding] = whole
    return _dense(genes, values, true_values, padding, lengths, batch.denominator)


def _dense(genes, values, true_values, padding, lengths, denominator) -> DenseBatch:
    masked = (values == MASKED_VALUE).flatten().nonzero()[:, 0]
    cells = masked // genes.shape[1]
    return DenseBatch(genes, values, true_values, padding, lengths, masked, cells, true_values.flatten()[masked], denominator)


def buckets(batch: CellBatch, pad_token: int) -> list[tuple[Tensor, DenseBatch]]:
    """(which cells, int64; their rectangle, as long as the longest of them) of cells of similar length, the longest first."""
    whole = pad(batch, batch.max_tokens, pad_token)
    lengths = whole.lengths.tolist()
    groups: list[list[int]] = []
    for cell in sorted(range(len(lengths)), key=lambda cell: -lengths[cell]):
        if not groups or lengths[cell] < SHORTEST * lengths[groups[-1][0]]:
            groups.append([])
        groups[-1].append(cell)
    found = []
    for group in groups:
        rows, length = torch.tensor(group), lengths[group[0]]
        found.append((rows, _dense(*(x[rows, :length] for x in whole[:4]), whole.lengths[rows], whole.denominator)))
    return found
