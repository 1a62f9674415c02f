"""Predicted seconds of an op on GPUs that were not at hand: bytes and FLOPs against ceilings, plus launches.

The GPUs' peaks and the ceilings are those of `scbench plan`.
"""

from scbench.training import gpus
from scbench.training.plan_time import LAUNCH_SECONDS, MEMORY_CEILING, TENSOR_CEILING

GPUS = {name: gpus.GPUS[name] for name in ("a100", "h100")}
FORMULA = (f"Predicted: max(bytes / {MEMORY_CEILING:.0%} of memory peak, FLOPs of matrix products / {TENSOR_CEILING:.0%} of "
           f"peak) + {LAUNCH_SECONDS * 1e6:.0f} us a launch; A100 and H100 SXM, 80 GB.")


def predict(gpu: str, dtype: str, *, moved: int, flops: int, launches: int) -> float:
    """Seconds; operations run one after the other, so that host and device do not overlap."""
    memory = moved / (MEMORY_CEILING * GPUS[gpu].bandwidth)
    arithmetic = flops / (TENSOR_CEILING * GPUS[gpu].flops(dtype))
    return max(memory, arithmetic) + LAUNCH_SECONDS * launches
