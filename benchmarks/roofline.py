"""Predicted seconds of an op on GPUs that were not at hand: bytes and FLOPs against ceilings, plus launches."""

from typing import NamedTuple

MEMORY_CEILING, TENSOR_CEILING, LAUNCH_SECONDS = 0.6, 0.4, 5e-6


class Gpu(NamedTuple):
    """Peaks a second, dense, from NVIDIA's data sheets."""

    bytes: float
    flops: dict[str, float]


GPUS = {
    "a100": Gpu(2.039e12, {"bf16": 312e12, "fp32": 19.5e12}),  # SXM, 80 GB; fp32 without tensor cores, as TF32 is not used
    "h100": Gpu(3.35e12, {"bf16": 989e12, "fp32": 67e12}),  # SXM
}
FORMULA = (f"Predicted: max(bytes / {MEMORY_CEILING:.0%} of memory peak, FLOPs of matrix products / {TENSOR_CEILING:.0%} of "
           f"peak) + {LAUNCH_SECONDS * 1e6:.0f} us a launch; A100 and H100 SXM, 80 GB.")


def predict(gpu: str, dtype: str, *, moved: int, flops: int, launches: int) -> float:
    """Seconds; operations run one after the other, so that host and device do not overlap."""
    peak = GPUS[gpu]
    memory, arithmetic = moved / (MEMORY_CEILING * peak.bytes), flops / (TENSOR_CEILING * peak.flops[dtype])
    return max(memory, arithmetic) + LAUNCH_SECONDS * launches
