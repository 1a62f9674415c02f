"""What the ranks tell each other at the start of a step, in one small reduction that no host waits for.

A float32 vector, summed over the ranks: the masked genes of the window, the wishes to leave, the TFLOPs that the window's
cells need, and the tokens of each rank in a place of its own, which shows how evenly they share the work.
"""

import numpy as np
import torch
from torch import Tensor

from scbench.config import ModelConfig
from scbench.data.batch import CellBatch
from scbench.models.flops import training_flops
from scbench.training.stopping import WISHES

NAMES = ("denominator", *WISHES, "teraflops")


def facts(window: list[CellBatch], wishes: list[float], model: ModelConfig, rank: int, world: int) -> Tensor:
    """This rank's vector, [5 + world]; `window` as the host has it."""
    tokens = [0.0] * world
    tokens[rank] = float(sum(int(batch.lengths.sum()) for batch in window))
    return torch.tensor([float(window[0].denominator), *wishes, _teraflops(window, model), *tokens])


def read(values: list[float]) -> tuple[list[float], dict[str, float]]:
    """All ranks' wishes, and what a summed vector says of the step's work: `tokens` (pads are none), `token_imbalance` (the
    busiest rank's tokens over the mean rank's) and `teraflops`."""
    wishes, tokens = values[1:4], values[len(NAMES):]
    total = sum(tokens)
    return wishes, {"tokens": total, "token_imbalance": max(tokens) * len(tokens) / total if total else 1.0,
                    "teraflops": values[4]}


def _teraflops(window: list[CellBatch], model: ModelConfig) -> float:
    total = 0.0
    for batch in window:
        cells = batch.n_cells
        masked, queries = (np.full(cells, len(x) / cells) for x in (batch.masked, batch.query_genes))
        total += float(training_flops(model, batch.lengths.numpy(), masked, queries).sum())
    return total / 1e12
