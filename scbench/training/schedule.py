"""The learning rate of a step."""

import math
from collections.abc import Callable

from scbench.config import PretrainConfig


def rates(config: PretrainConfig, steps: int, train_cells: int) -> Callable[[int], float]:
    """The learning rate by step (from 0) of a run of `steps` steps over `train_cells` cells an epoch."""
    if config.recipe == "aaai2025":
        epoch = math.ceil(train_cells / config.batch_cells)
        return lambda step: reference_rate(step, config.lr, config.warmup_steps, epoch)
    warmup = min(10_000, steps // 10) if config.warmup_steps is None else config.warmup_steps
    return lambda step: learning_rate(step, steps, config.lr, warmup)


def learning_rate(step: int, steps: int, peak: float, warmup_steps: int) -> float:
    """Linear warm-up to `peak` over `warmup_steps`, then a cosine to a tenth of it at the last step.

    `step` counts from 0; the first step of a warm-up already learns (peak / warmup_steps).
    """
    if step < warmup_steps:
        return peak * (step + 1) / warmup_steps
    progress = (step - warmup_steps) / max(1, steps - 1 - warmup_steps)
    return peak * (0.1 + 0.9 * 0.5 * (1 + math.cos(math.pi * min(1.0, progress))))


def reference_rate(step: int, peak: float, warmup_steps: int, epoch_steps: int) -> float:
    """The reference's: linear warm-up from 0, but only in the first epoch; what the rate is at that epoch's end stays.

    With 906,890 cells and batches of 128 that is 7,085 steps of 10,000: 0.71 of the peak for the rest of the run.
    """
    return peak * min(1.0, min(step, epoch_steps - 1) / warmup_steps) if warmup_steps else peak
