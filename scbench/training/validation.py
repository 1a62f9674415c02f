"""The validation loss: fixed cells, fixed gene subsets and fixed masks, in three bins of the true count."""

import math

import torch

from scbench.config import InputLaw
from scbench.data.loader import validation_batches
from scbench.data.store import Split
from scbench.data.vocabulary import Vocabulary
from scbench.training.engine import dist

BINS = {"1": (0, 1.5), "2-10": (1.5, 10.5), "over 10": (10.5, math.inf)}  # true counts (the reference's bins)


def count_bins(counts: torch.Tensor) -> torch.Tensor:
    """The bin of each raw count, integer [M]."""
    return torch.bucketize(counts, torch.tensor([low for low, _ in list(BINS.values())[1:]], device=counts.device))


@torch.no_grad()
def validate(engine, split: Split, vocabulary: Vocabulary, inputs: InputLaw, *, seed: int, mask_ratio: float, max_cells: int,
             batch_cells: int) -> dict[str, float]:
    """Mean squared errors of both heads on masked genes, in the model's own units, over all ranks, whole and by bin of the
    true count.

    The masks depend on `seed` and the cell alone, so the numbers of two runs on one store can be compared.
    """
    # Every rank has equally many batches: ZeRO-3 gathers parameters in each.
    batches = validation_batches(
        split, vocabulary, inputs, seed=seed, mask_ratio=mask_ratio, max_cells=max_cells, batch_cells=batch_cells,
        rank=dist.get_rank(), world=dist.get_world_size(),
    )
    totals = torch.zeros(3, len(BINS), dtype=torch.float64, device=engine.device)  # tokens, squared errors of both heads
    engine.eval()
    for batch in batches:
        batch = batch.to(engine.device)
        output = engine(batch)
        bins = count_bins(batch.target_counts)
        for row, values in enumerate((torch.ones_like(batch.targets), (output.regression - batch.targets).square(),
                                      (output.mvc - batch.targets).square())):
            totals[row].index_add_(0, bins, values.double())
    engine.train()
    dist.all_reduce(totals)
    tokens, regression, mvc = totals.tolist()
    result: dict[str, float] = {"masked_genes": sum(tokens)}
    for head, errors in {"regression": regression, "mvc": mvc}.items():
        if getattr(engine.module, f"{head}_head") is None:
            continue
        result[f"{head}_loss"] = sum(errors) / max(1.0, sum(tokens))
        for name, count, error in zip(BINS, tokens, errors, strict=True):
            result[f"{head}_loss_count_{name}"] = error / count if count else math.nan
    result["loss"] = result.get("regression_loss", 0.0) + result.get("mvc_loss", 0.0)
    return result
