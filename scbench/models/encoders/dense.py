"""Packed tokens as [B, S, …], for the structures whose layers run along a cell."""

import torch
from torch import Tensor

from scbench.data.batch import CellBatch


def to_dense(tokens: Tensor, batch: CellBatch, length: int) -> Tensor:
    """[T, …] → [B, length, …], zero past each cell's end; `length` is at least `batch.max_tokens`. No synchronisation."""
    cells, n_tokens = batch.n_cells, tokens.shape[0]
    shifts = torch.arange(cells, device=tokens.device) * length - batch.cell_offsets[:-1]
    places = torch.arange(n_tokens, device=tokens.device)
    places = places + shifts.repeat_interleave(batch.cell_offsets.diff(), output_size=n_tokens)
    dense = tokens.new_zeros(cells * length, *tokens.shape[1:]).index_copy(0, places, tokens)
    return dense.view(cells, length, *tokens.shape[1:])


def absent(lengths: Tensor, length: int) -> Tensor:
    """bool [B, length, 1]: the positions past each cell's end."""
    return (torch.arange(length, device=lengths.device) >= lengths[:, None])[..., None]
