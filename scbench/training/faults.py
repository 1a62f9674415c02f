"""What a run says when it cannot go on: a loss that is not finite, memory that does not suffice."""

import json

import numpy as np
import torch

from scbench.config import PlanConfig, PretrainConfig
from scbench.data.order import SampleOrder, default_lanes
from scbench.data.store import Split
from scbench.errors import DivergedError, UserError
from scbench.files import write_text
from scbench.training.plan import run_plan

NAMED = 3  # cells that a sentence names; the file beside it lists all


def diverged(what: str, step: int, config: PretrainConfig, train: Split, *, writes: bool) -> DivergedError:
    """The error of step `step` (from 1), whose `what` is not finite. Its batch is a function of (seed, step): it is made
    again, and the rank that `writes` lists its cells in the run directory."""
    lanes = config.lanes or default_lanes(len(train.extent_sizes), config.batch_cells)
    order = SampleOrder(train.extent_sizes, config.seed, lanes)
    samples, located = order.rank_slice(step - 1, config.batch_cells, 0, 1)
    numbers = order.starts[located.extents] + located.indices
    cells = train.cells_at(numbers, ["source", "original_id"])
    path = config.output / f"diverged-step-{step:08d}.json"
    if writes:
        rows = [{"sample": int(sample), "cell": int(number), "source": source, "original_id": name}
                for sample, number, source, name in zip(samples, numbers, cells["source"], cells["original_id"], strict=True)]
        write_text(path, json.dumps({"step": step, "seed": config.seed, "not_finite": what, "cells": rows}, indent=1) + "\n")
    named = ", ".join(f"{name} of {source}" for source, name in cells[["source", "original_id"]].to_numpy()[:NAMED])
    return DivergedError(
        f"the {what} of step {step} is not finite (seed {config.seed}, samples {samples.min()} to {samples.max()}: {named}, … "
        f"all listed in {path}): look at these cells, or start a new run with a lower --lr. Checkpoints before it are intact."
    )


def out_of_memory(error: BaseException) -> bool:
    """Whether an error says that a device or the host has no memory left."""
    return isinstance(error, (MemoryError, torch.OutOfMemoryError)) or (
        isinstance(error, RuntimeError) and "can't allocate memory" in str(error)  # torch's CPU allocator
    )


def memory_error(error: BaseException, config: PretrainConfig, rank: int, world: int) -> UserError:
    """The sentence that says which knob helps."""
    micro = config.micro_batch_cells or -(-config.batch_cells // world)
    cells = f"--micro-batch-cells {max(1, micro // 2)} (now {micro}; the same training)" if micro > 1 else None
    stage = {"zero0": "zero2", "zero1": "zero2", "zero2": "zero3"}.get(config.deepspeed) if world > 1 else None
    knobs = [cells, stage and f"--deepspeed {stage} (the same training)", f"a smaller --max-genes (now {config.max_genes})"]
    first = str(error).strip().split("\n")[0][:200]
    return UserError(
        f"rank {rank} is out of memory ({first or type(error).__name__}): go on with --resume and "
        f"{', or '.join(knob for knob in knobs[:2] if knob) or 'more ranks'}, or start a new run with {knobs[2]}; "
        f"{_recommendation(config, micro, world)}."
    )


def _recommendation(config: PretrainConfig, micro: int, world: int) -> str:
    """What `scbench plan` has to say of this run on this machine."""
    cuda = torch.cuda.is_available()
    if world > 1 and not cuda:
        return "`scbench plan` says what fits"  # it knows a CPU as one process
    same = ("store", "structure", "width", "layers", "heads", "dropout", "mvc", "max_genes", "mask_ratio", "batch_cells",
            "precision")
    memory = str(torch.cuda.mem_get_info()[1]) if cuda else None
    try:
        options = {name: getattr(config, name) for name in same}
        plan = PlanConfig(**options, gpus=world if cuda else 0, gpu_memory=memory, json=True)
        best = run_plan(plan)["recommended"]
    except UserError as error:
        return f"`scbench plan` says: {str(error).rstrip('.')}"
    if best["deepspeed"] == config.deepspeed and best["micro_batch_cells"] >= micro:
        return "by `scbench plan` this run fits, so something else takes memory here"
    return (f"`scbench plan` recommends --deepspeed {best['deepspeed']} --micro-batch-cells {best['micro_batch_cells']} "
            "(predicted)")


def not_finite(values: dict[str, float]) -> str | None:
    """The first of some named values that is not finite."""
    return next((name for name, value in values.items() if not np.isfinite(value)), None)
