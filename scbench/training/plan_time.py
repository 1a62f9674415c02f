"""The time of a training step on GPUs, predicted from ceilings; never measured on a GPU.

Two bounds. Below: the Triton kernels' traffic, and arithmetic, memory, launches and communication fully overlapped: the
longest of the four. Above: the PyTorch paths' traffic and launches, one after the other: their sum.
"""

from typing import NamedTuple

import numpy as np

from scbench.config import ModelConfig
from scbench.models.flops import training_flops
from scbench.training.gpus import Gpu
from scbench.training.plan_memory import ELEMENT, Micro, kept_bytes, parameters_of

MEMORY_CEILING, TENSOR_CEILING, LAUNCH_SECONDS, LINK_CEILING = 0.6, 0.4, 5e-6, 0.6
CEILINGS = (f"{TENSOR_CEILING:.0%} of the matrix peak, {MEMORY_CEILING:.0%} of the memory rate, "
            f"{LAUNCH_SECONDS * 1e6:.0f} µs a launch, {LINK_CEILING:.0%} of the link between GPUs; predicted, never measured "
            "on a GPU")

# Bytes moved over bytes kept for the backward. Fused: each is written once and read twice, and so is its gradient. PyTorch's
# paths, and their launches a layer (forward and backward): counted op by op (benchmarks/plan_traffic.py); most of it is
# dropout's random numbers, and the scan's walk from place to place. A CNN's count is all weights, so its traffic is assumed:
# the gene graph's.
FUSED_TRAFFIC, FUSED_LAUNCHES = 6, 35
PYTORCH_TRAFFIC = {"transformer": 20, "linear": 19, "gnn": 26, "mamba": 53, "cnn": 26, "cnn_sorted": 26, "linear_mixer": 9}
PYTORCH_LAUNCHES = {"transformer": 200, "linear": 116, "gnn": 118, "mamba": 120, "cnn": 83, "cnn_sorted": 83,
                    "linear_mixer": 16}
CELL_LAUNCHES, PLACE_LAUNCHES = 17, 17  # where attention goes cell by cell, and the scan place by place
REST_LAUNCHES = 120  # of embedding, heads and loss, a micro-step
OPTIMIZER_LAUNCHES = 100
HOST_RATE, PCIE_RATE, CPU_ADAM_BYTES = 20e9, 32e9, 28  # of offload: bytes a second (PCIe 4, one direction), bytes a parameter
OPTIMIZER_BYTES = 60  # a parameter: gradients cast and clipped, AdamW's several passes over master weights and moments


class StepTime(NamedTuple):
    """Seconds of an optimizer step; all ranks do the same."""

    arithmetic: float
    memory: tuple[float, float]  # fused, PyTorch
    launches: tuple[float, float]
    communication: float

    @property
    def lower(self) -> float:
        """Everything overlaps."""
        return max(self.arithmetic, self.memory[0], self.launches[0], self.communication)

    @property
    def upper(self) -> float:
        """Nothing overlaps."""
        return self.arithmetic + self.memory[1] + self.launches[1] + self.communication


def cell_flops(config: ModelConfig, lengths: np.ndarray, mask_ratio: float, queries_per_cell: float) -> float:
    """FLOPs to train a cell, the mean over `lengths` (tokens of cells); scbench/models/flops.py has the formula."""
    return float(training_flops(config, lengths, mask_ratio * (lengths - 1), queries_per_cell).mean())


def communicated_bytes(parameters: int, precision: str, stage: int, world: int, micro_steps: int) -> float:
    """Bytes that a rank sends in a step, by ring algorithms: all-reduce 2 (N − 1) / N of a tensor, the halves of it once.

    As counted (benchmarks/communication.py). ZeRO 3 gathers weights once a micro-step, not twice: models of fewer parameters
    than `stage3_max_reuse_distance` (10⁹) keep them from forward to backward.
    """
    e, once = ELEMENT[precision], (world - 1) / world * parameters
    if stage == 0:
        return 2 * once * e
    if stage == 1:
        return once * (2 * e + e)  # gradients all-reduced, weights gathered
    if stage == 2:
        return once * (2 * e * micro_steps + e)
    return once * 2 * e * micro_steps  # weights gathered, gradients scattered


def step_time(config: ModelConfig, precision: str, deepspeed: str, gpu: Gpu, world: int, micro: Micro, micro_steps: int,
              flops_per_cell: float) -> StepTime:
    """The prediction for `micro_steps` micro-batches a rank."""
    parameters = parameters_of(config).total
    stage = int(deepspeed[4])
    share = parameters / world if stage else parameters
    rate = MEMORY_CEILING * gpu.bandwidth
    update = OPTIMIZER_BYTES * share / rate
    if deepspeed.endswith("offload"):  # the CPU updates; gradients and weights cross PCIe, under ZeRO-3 weights in each pass
        passes = 2 + (2 * micro_steps * parameters / share if stage == 3 else 0)
        update = CPU_ADAM_BYTES * share / HOST_RATE + passes * ELEMENT[precision] * share / (LINK_CEILING * PCIE_RATE)
    kept = micro_steps * kept_bytes(config, precision, micro) / rate  # seconds to pass over it once
    launches = [micro_steps * (layer * config.layers + REST_LAUNCHES) + OPTIMIZER_LAUNCHES
                for layer in (FUSED_LAUNCHES, _pytorch_launches(config, precision, micro))]
    return StepTime(
        arithmetic=micro_steps * micro.cells * flops_per_cell / (TENSOR_CEILING * gpu.flops(precision)),
        memory=(FUSED_TRAFFIC * kept + update, PYTORCH_TRAFFIC[config.structure] * kept + update),
        launches=(launches[0] * LAUNCH_SECONDS, launches[1] * LAUNCH_SECONDS),
        communication=communicated_bytes(parameters, precision, stage, world, micro_steps) / (LINK_CEILING * gpu.link),
    )


def _pytorch_launches(config: ModelConfig, precision: str, micro: Micro) -> float:
    """Of a layer. bf16 attention has one fused path or another on every GPU; the gene graph's and fp32 have none."""
    launches = float(PYTORCH_LAUNCHES[config.structure])
    if config.structure == "gnn" or (config.structure == "transformer" and precision == "fp32"):
        launches += CELL_LAUNCHES * (micro.cells - 1)
    if config.structure == "mamba":
        launches += PLACE_LAUNCHES * micro.longest
    return launches
