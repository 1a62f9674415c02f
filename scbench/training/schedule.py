"""The learning rate of a step."""

import math


def learning_rate(step: int, steps: int, peak: float, warmup_steps: int) -> float:
    """Linear warm-up to `peak` over `warmup_steps`, then a cosine to a tenth of it at the last step.

    `step` counts from 0; the first step of a warm-up already learns (peak / warmup_steps).
    """
    if step < warmup_steps:
        return peak * (step + 1) / warmup_steps
    progress = (step - warmup_steps) / max(1, steps - 1 - warmup_steps)
    return peak * (0.1 + 0.9 * 0.5 * (1 + math.cos(math.pi * min(1.0, progress))))


def default_warmup(steps: int) -> int:
    """min(10,000, a tenth of the steps)."""
    return min(10_000, steps // 10)
