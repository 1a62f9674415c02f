"""The memory of a training step on one rank, by arithmetic: what `scbench plan` predicts.

Three parts, each read off the code and held against counted steps (benchmarks/plan_check.py):

    states       parameters, optimizer, gradients and DeepSpeed's buffers (0.19.8), multiples of the parameters: exact
    kept         what autograd keeps from the forward pass for the backward, on the PyTorch paths of the ops (the Triton
                 kernels keep less): a law linear in tokens for each structure, exact but for vectors of a few bytes a token
    working      the largest temporaries beside those: one constant for each structure, counted

Recipe default. All in bytes; e is the size of an element of the weights: 2 in bf16, 4 in fp32.
"""

from functools import cache
from typing import NamedTuple

import torch
from torch import nn

from scbench.config import ModelConfig
from scbench.models.embedding import GeneValueEmbedding
from scbench.models.encoders import ENCODERS
from scbench.models.encoders.gnn import FACTOR_WIDTH
from scbench.models.encoders.mamba import EXPANSION, STATES
from scbench.models.heads import LibrarySizeOffset, MvcHead, RegressionHead

BUCKET = 5_000_000  # elements: reduce_bucket_size of the shipped files
SMALL_PARAMETER = 10_000  # elements: stage3_param_persistence_threshold of the shipped files
ELEMENT = {"bf16": 2, "fp32": 4}
SCAN_BORDER = 8  # places of a chunk of the scan's PyTorch path


class Parameters(NamedTuple):
    """Elements of a model."""

    total: int
    largest: int  # of one parameter: the gene table
    group: int  # of the optimizer's larger group: what AdamW decays, or the rest
    small: int  # in parameters that ZeRO-3 leaves whole on every rank


@cache
def parameters_of(config: ModelConfig) -> Parameters:
    """Counted on the model's own modules, without their memory."""
    with torch.device("meta"):
        parts = nn.ModuleDict({"embedding": GeneValueEmbedding(config, 0), "encoder": ENCODERS[config.structure](config)})
        if config.regression:
            parts["regression_head"] = RegressionHead(config.width)
        if config.mvc:
            parts["mvc_head"] = MvcHead(config.width)
        if config.library_size_offset:
            parts["offset"] = LibrarySizeOffset(config.width)
    named = list(parts.named_parameters())
    total = sum(p.numel() for _, p in named)
    decayed = sum(p.numel() for name, p in named if p.ndim >= 2 and not name.endswith(("table", "logarithm")))
    return Parameters(total, max(p.numel() for _, p in named), max(decayed, total - decayed),
                      sum(p.numel() for _, p in named if p.numel() < SMALL_PARAMETER))


class Micro(NamedTuple):
    """A micro-batch."""

    cells: float
    tokens: float  # `<cls>` included
    longest: float  # tokens of the longest cell
    masked: float
    queries: float  # distinct masked genes


def kept_bytes(config: ModelConfig, precision: str, micro: Micro) -> float:
    """What autograd keeps from the forward pass for the backward, weights and the batch left out (by the PyTorch paths; the C
    code on a CPU keeps less)."""
    e, width, drops = ELEMENT[precision], config.width, int(config.dropout > 0)
    states = micro.tokens * width  # elements of one [T, D] tensor
    embedding = 4 * states + (4 * width**2 if e < 4 else 0)  # the value MLP's hidden layer and weights, in fp32
    mvc = (5 * e + 4) * micro.queries * width + 20 * micro.masked if config.mvc else 0
    regression = (4 * e + 4) * micro.masked * width + 12 * micro.masked if config.regression else 0
    return embedding + _encoder_bytes(config, e, drops, micro) + mvc + regression


def _encoder_bytes(config: ModelConfig, e: int, drops: int, micro: Micro) -> float:
    tokens, width, layers = micro.tokens, config.width, config.layers
    states = tokens * width
    match config.structure:
        case "transformer":
            # Input, query, key, value, attention's output, two sums and a norm's output, ReLU, and its dropped copy; masks.
            # fp32 takes torch's attention cell by cell, which keeps its output once more.
            attention = states * e + 4 * tokens * config.heads if e == 4 else 0
            return layers * ((9 + drops) * states * e + 3 * drops * states + 4 * e * tokens + attention)
        case "linear":
            return layers * ((4 + drops) * states * e + 2 * drops * states + 2 * e * tokens)
        case "gnn":  # F's rows, hidden layer and its GELU; F and G side by side
            factors = (3 * FACTOR_WIDTH + 2 * FACTOR_WIDTH) * tokens * e
            return layers * (4 * states * e + drops * states + factors + 2 * e * tokens)
        case "mamba":
            # Three sums in fp32 (a norm's input and output, steps before and after softplus: 24 bytes), 15 elements of
            # the weights' dtype, and the scan's states at the borders of its chunks
            rank = -(-width // 16)
            borders = 4 * STATES * EXPANSION * states / SCAN_BORDER
            layer = (24 + 15 * e) * states + drops * states + (rank + 2 * STATES) * e * tokens + 4 * tokens + borders
            return layers * layer + 8 * states + 4 * tokens  # the last norm
        case "cnn" | "cnn_sorted":
            rows, total = micro.cells * micro.longest, 0.0
            total += rows * width * e + 8 * tokens  # the cells side by side, padded
            for number in range(layers):
                out = rows if number % 6 == 0 else micro.cells * -(-rows // micro.cells // 2)
                # Input of convolution and pool; of norm and GELU; the pool's 64-bit indices; masks
                total += 2 * e * rows * width + (2 * e + 8 + drops) * out * width + (2 * e + 1) * out + rows
                rows = out
            return total
        case "linear_mixer":
            positions, total = config.max_genes + 1, 8.0 * tokens
            for number in range(layers):
                new = 1 if number == layers - 1 else max(1, positions // 2)
                total += micro.cells * e * width * (positions + 3 * new)
                positions = new
            return total
    raise ValueError(config.structure)


# Bytes of temporaries a state (a token's channel) at the peak, counted by benchmarks/plan_check.py.
WORKING = {"transformer": 4.4, "linear": 3.2, "gnn": 4.4, "mamba": 6.0, "cnn": 7.0, "cnn_sorted": 7.0, "linear_mixer": 1.6}


def working_bytes(config: ModelConfig, precision: str, micro: Micro, *, cpu: bool) -> float:
    """Temporaries beside what is kept. Paths that go cell by cell hold a cell's scores three times."""
    e = ELEMENT[precision]
    rows = micro.cells * micro.longest if config.structure in ("cnn", "cnn_sorted", "linear_mixer") else micro.tokens
    working = WORKING[config.structure] * rows * config.width
    if config.structure == "gnn":
        return max(working + e * rows * 2 * FACTOR_WIDTH, 3 * e * micro.longest**2)
    if config.structure == "transformer" and (cpu or e == 4):
        return max(working, 3 * e * config.heads * micro.longest**2)
    return working


class Memory(NamedTuple):
    """Bytes of one rank. `peak` is less than the sum: not everything is there at once."""

    parameters: float
    optimizer: float  # master weights and moments
    gradients: float  # the most that is held of them, the dense gradient of the gene table included
    buffers: float  # DeepSpeed's
    activations: float  # kept and working
    peak: float
    host: float = 0.0  # with offload: pinned memory of the host


class _Gradients(NamedTuple):
    """Bytes beside parameters, optimizer and activations, at three moments of a step."""

    waiting: float  # accumulators that are there while the next micro-batch runs forward
    end: float  # at the end of a backward pass
    update: float  # while the optimizer steps: gradients, and flat copies of them
    buffers: float = 0.0  # a bucket


def _gradients(counted: Parameters, stage: int, world: int, bf16: bool) -> _Gradients:
    """DeepSpeed 0.19.8 as it was counted at one and two ranks. The sum for the gene table's gradient is made in fp32."""
    e, several = (2 if bf16 else 4), int(world > 1)
    number, table, share, group = counted.total, counted.largest, counted.total / world, counted.group / world
    if stage == 0:
        whole = (1 + several) * e * number
        return _Gradients(e * number, whole + 4 * table, (e + 4) * number)
    if stage == 1 and bf16:  # fp32 accumulators beside the bf16 gradients
        return _Gradients(4 * number, 10 * number + 4 * share, 4 * number + 4 * share)
    if stage == 2 and bf16:
        return _Gradients(4 * share, 2 * number + 4 * share + 4 * table, 4 * share + 8 * group, 2.0 * BUCKET)
    if stage < 3:  # fp32: slices of the gradients keep the whole ones alive
        whole = 4 * number * (1 + several * (stage == 1))
        return _Gradients(4 * number, whole, whole + 8 * group, 4.0 * BUCKET)
    gathered = several * table * (e + 4 if bf16 else e)  # the gene table's weights, and in bf16 its gradient in fp32
    return _Gradients(4 * share, e * number + 4 * table + 4 * share + gathered, 4 * share + 12 * group + e * table,
                      float(e * BUCKET))


def memory_of(config: ModelConfig, precision: str, deepspeed: str, world: int, micro: Micro, micro_steps: int, *,
              cpu: bool = False) -> Memory:
    """The memory of a step of `micro_steps` equal micro-batches, with AdamW and the shipped file `deepspeed`."""
    counted, e = parameters_of(config), ELEMENT[precision]
    stage, offload, bf16 = int(deepspeed[4]), deepspeed.endswith("offload"), precision == "bf16"
    number, table, share = counted.total, counted.largest, counted.total / world
    activations = kept_bytes(config, precision, micro) + working_bytes(config, precision, micro, cpu=cpu)
    master = 0 if stage == 0 and not bf16 else 4  # without ZeRO, fp32 weights are their own master
    parameters, optimizer = e * number, (master + 8) * (share if stage else number)
    gradients, gathered, host = _gradients(counted, stage, world, bf16), 0.0, 0.0
    if stage == 3 and (world > 1 or offload):  # the gene table and what is fetched ahead
        gathered = e * (table + min(BUCKET, number - table))
    if stage == 3:
        parameters = e * (share + int(world > 1) * counted.small)
    if offload:
        host, optimizer = optimizer + 4 * share, 0.0
        gradients = gradients._replace(update=e * share)
    if offload and stage == 3:
        host, parameters = host + e * share, e * counted.small
        gradients = gradients._replace(waiting=0.0, end=e * number + 4 * table + e * table)
    # ZeRO-1's fp32 accumulators are let go only when the next forward pass has begun, ZeRO-3's gradients never
    waits = micro_steps > 1 or (stage == 1 and bf16) or stage == 3
    forward = activations + gathered + gradients.buffers + gradients.waiting * waits
    update = gradients.update + gradients.buffers * (stage == 3)
    peak = parameters + optimizer + max(forward, gradients.end + gradients.buffers, update)
    return Memory(parameters, optimizer, gradients.end, gradients.buffers, activations, peak, host)
