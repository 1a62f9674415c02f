"""`scbench plan`: what fits, how fast it would be, which command to run. Arithmetic only: nothing is trained."""

import math
import shlex
from typing import NamedTuple

import numpy as np

from scbench.config import ModelConfig, PlanConfig
from scbench.data.store import Store
from scbench.errors import UserError
from scbench.training.gpus import GPUS
from scbench.training.plan_memory import Memory, Micro, Parameters, memory_of, parameters_of
from scbench.training.plan_time import CEILINGS, StepTime, cell_flops, step_time

STAGES = ("zero0", "zero1", "zero2", "zero3", "zero2_offload", "zero3_offload")
USABLE, CONTEXT_BYTES = 0.92, 1e9  # of a GPU's memory: the rest fragments; CUDA's context, and as much again for NCCL
CELLS = 1e7  # to train on, where nothing says how many
SAMPLE = 100_000  # cells of a store whose lengths are looked at
DEVIATIONS = 4  # a micro-batch's tokens exceed the mean by so many standard deviations at most


class Cells(NamedTuple):
    """The cells to train on."""

    lengths: np.ndarray  # tokens of a sample of cells, `<cls>` included
    vocabulary_size: int
    number: float  # in a pass


class Choice(NamedTuple):
    """A configuration that fits."""

    precision: str
    deepspeed: str
    micro_cells: int
    micro_steps: int
    memory: Memory
    time: StepTime | None  # None on a CPU


def run_plan(config: PlanConfig) -> dict:
    """The verb `plan`; UserError that names the knob where nothing fits."""
    cells = cells_of(config)
    model = config.model(cells.vocabulary_size)
    usable = usable_bytes(config)
    queries = micro_of(config, cells, _share(config)).queries / _share(config)
    flops = cell_flops(model, cells.lengths, config.mask_ratio, queries)
    choices, tried = [], []
    for precision in [config.precision] if config.precision else ["bf16", "fp32"]:
        for stage in [config.deepspeed] if config.deepspeed else _stages(config):
            choice = largest(config, model, cells, precision, stage, usable, flops)
            tried.append((precision, stage, choice))
            if choice is not None:
                choices.append(choice)
    if not choices:
        raise UserError(_nothing_fits(config, model, cells, usable))
    best = min(choices, key=_rank)
    result = _result(config, cells, parameters_of(model), usable, flops, tried, best)
    if not config.json:
        _show(config, result)
    return result


def _stages(config: PlanConfig) -> tuple[str, ...]:
    """Offload moves state to the host's memory: no use where it is there already."""
    return STAGES[:4] if config.gpus == 0 else STAGES


def _share(config: PlanConfig) -> int:
    """Cells of a rank in a step."""
    return -(-config.batch_cells // config.world)


def _rank(choice: Choice) -> tuple:
    """What is better: the predicted time, in steps of a tenth; then bf16; the simpler stage, but zero1, pretrain's default,
    before zero0; fewer micro-steps."""
    speed = round(math.log(choice.time.lower * choice.time.upper) / 2 / math.log(1.1)) if choice.time else 0
    stage = -1 if choice.deepspeed == "zero1" else STAGES.index(choice.deepspeed)
    return speed, choice.precision != "bf16", stage, choice.micro_steps


def cells_of(config: PlanConfig) -> Cells:
    """Lengths and number of the cells: the store's, or all of the mean length."""
    if config.store is None:
        mean = config.max_genes if config.mean_genes is None else config.mean_genes
        return Cells(np.array([mean + 1.0]), config.vocabulary_size, config.cells or CELLS)
    store = Store.open(config.store)
    train = store.split("train")
    if train.n_cells == 0:
        raise UserError(f"the store {config.store} has no training cells: prepare it with a larger training share.")
    genes = train.first(SAMPLE).cells(["n_genes"])["n_genes"].to_numpy()
    return Cells(np.minimum(genes, config.max_genes) + 1.0, store.vocabulary.size, config.cells or float(train.n_cells))


def usable_bytes(config: PlanConfig) -> float:
    """What a rank may use."""
    given = config.memory_bytes()
    if config.gpus == 0:
        return USABLE * (_free_memory() if given is None else given)
    return USABLE * (GPUS[config.gpu].memory if given is None else given) - CONTEXT_BYTES * (1 + (config.gpus > 1))


def _free_memory() -> float:
    try:
        with open("/proc/meminfo", encoding="ascii") as file:
            return next(int(line.split()[1]) * 1024.0 for line in file if line.startswith("MemAvailable"))
    except (OSError, StopIteration):
        raise UserError("how much memory is free cannot be found out here: give --gpu-memory.") from None


def micro_of(config: PlanConfig, cells: Cells, number: int) -> Micro:
    """The largest micro-batch of `number` cells that is to be expected."""
    lengths = cells.lengths
    tokens = min(number * lengths.mean() + DEVIATIONS * lengths.std() * math.sqrt(number), number * lengths.max())
    masked = config.mask_ratio * max(0.0, tokens - number)
    genes = max(1, cells.vocabulary_size - 3)
    queries = genes * -math.expm1(masked * math.log1p(-1 / genes)) if genes > 1 else 1.0  # at most: genes equally frequent
    return Micro(number, tokens, float(lengths.max()), masked, queries)


def largest(config: PlanConfig, model: ModelConfig, cells: Cells, precision: str, stage: str, usable: float,
            flops: float) -> Choice | None:
    """The configuration with the largest micro-batch that fits (or the one asked for); None if none does."""
    share = _share(config)

    def memory(number: int) -> Memory:
        return memory_of(model, precision, stage, config.world, micro_of(config, cells, number), -(-share // number),
                         cpu=config.gpus == 0)

    def fits(number: int) -> bool:
        return memory(number).peak <= usable

    if config.micro_batch_cells is not None:
        number = min(config.micro_batch_cells, share)
        if not fits(number):
            return None
    else:
        steps = next((steps for steps in _divisions(share) if fits(-(-share // steps))), None)
        if steps is None:
            return None
        number = -(-share // steps)
    steps, time = -(-share // number), None
    if config.gpus:
        mean = micro_of(config, cells, number)._replace(tokens=number * float(cells.lengths.mean()))
        time = step_time(model, precision, stage, GPUS[config.gpu], config.world, mean, steps, flops)
    return Choice(precision, stage, number, steps, memory(number), time)


def _divisions(share: int) -> list[int]:
    """Numbers of micro-steps to try: only those that make micro-batches smaller."""
    sizes = sorted({-(-share // steps) for steps in range(1, share + 1)}, reverse=True)
    return [-(-share // size) for size in sizes]


def _nothing_fits(config: PlanConfig, model: ModelConfig, cells: Cells, usable: float) -> str:
    """Which knob would help, by what takes the memory."""
    stage = config.deepspeed or ("zero3_offload" if config.gpus else "zero3")
    precision = config.precision or "bf16"
    number = config.micro_batch_cells or 1
    memory = memory_of(model, precision, stage, config.world, micro_of(config, cells, number), -(-_share(config) // number),
                       cpu=config.gpus == 0)
    if number > 1:
        knob = "--micro-batch-cells"
    elif memory.activations > memory.peak / 2:
        knob = "--max-genes, --width or --layers"
    elif config.gpus and config.deepspeed and not config.deepspeed.endswith("offload"):
        knob = "--deepspeed to zero3_offload"
    else:
        knob = "--width, --layers or the vocabulary"
    verb = "change" if " to " in knob else "lower"
    size = config.gpu_memory or f"{GPUS[config.gpu].memory / 1e9:.0f}GB"
    where = f"a GPU with {size}" if config.gpus else "the host's memory"
    return (f"nothing fits {where}: with micro-batches of {number} a rank needs {memory.peak / 1e9:,.2f} GB in {precision} "
            f"under {stage} and may use {max(0.0, usable) / 1e9:,.2f} GB: {verb} {knob}.")


def command(config: PlanConfig, choice: Choice) -> str:
    """The `scbench pretrain` command line of a choice; only what is not the default."""
    words = ["scbench"]
    if config.world > 1:
        words = ["torchrun", "--standalone", "--nproc-per-node", str(config.gpus), "-m", "scbench"]
    words += ["pretrain", str(config.store or "STORE"), "-o", "run"]
    default = PlanConfig()
    for name in ("structure", "width", "layers", "heads", "dropout", "max_genes", "mask_ratio", "batch_cells"):
        if getattr(config, name) != getattr(default, name):
            words += [f"--{name.replace('_', '-')}", str(getattr(config, name))]
    words += [] if config.mvc else ["--no-mvc"]
    words += [] if choice.precision == "bf16" else ["--precision", choice.precision]
    words += [] if choice.deepspeed == "zero1" else ["--deepspeed", choice.deepspeed]
    words += ["--micro-batch-cells", str(choice.micro_cells)] if choice.micro_steps > 1 else []
    return shlex.join(words)


def _row(config: PlanConfig, cells: Cells, precision: str, stage: str, choice: Choice | None) -> dict:
    row: dict = {"precision": precision, "deepspeed": stage, "fits": choice is not None}
    if choice is None:
        return row
    row |= {"micro_batch_cells": choice.micro_cells, "micro_steps": choice.micro_steps, "memory": choice.memory._asdict()}
    if choice.time is not None:
        bounds = (choice.time.lower, choice.time.upper)
        row |= {"seconds": choice.time._asdict(), "step_seconds": bounds,
                "cells_per_second": tuple(config.batch_cells / seconds for seconds in reversed(bounds)),
                "hours": tuple(cells.number / config.batch_cells * seconds / 3600 for seconds in bounds)}
    return row


def _result(config: PlanConfig, cells: Cells, parameters: Parameters, usable: float, flops: float,
            tried: list[tuple[str, str, Choice | None]], best: Choice) -> dict:
    return {
        "parameters": parameters.total, "gene_table_parameters": parameters.largest,
        "tokens_per_cell": float(cells.lengths.mean()), "flops_per_cell": flops, "cells": cells.number,
        "gpus": config.gpus, "gpu": GPUS[config.gpu].name if config.gpus else None, "usable_bytes": usable,
        "ceilings": CEILINGS if config.gpus else None,
        "options": [_row(config, cells, *one) for one in tried],
        "recommended": _row(config, cells, best.precision, best.deepspeed, best),
        "command": command(config, best),
    }


def _show(config: PlanConfig, result: dict) -> None:
    """For people: one line a configuration, then the one that is recommended."""
    gb = 1e9
    device = f"{config.gpus} × {result['gpu']}" if config.gpus else "the CPU (time is not predicted there)"
    print(f"{config.structure}, {config.layers} layers × width {config.width}: {result['parameters']:,} parameters, "
          f"{result['gene_table_parameters']:,} of them the gene table; {result['tokens_per_cell']:,.0f} tokens and "
          f"{result['flops_per_cell'] / 1e9:,.2f} GFLOP a cell (the table is not counted)")
    print(f"{device}: a rank may use {result['usable_bytes'] / gb:,.1f} GB; GB a rank:\n")
    print(f"{'':20} micro-batch  parameters  optimizer  gradients  buffers  activations   peak   cells/s (predicted)")
    for row in result["options"]:
        name = f"{row['precision']} {row['deepspeed']}"
        if not row["fits"]:
            print(f"{name:<20} does not fit")
            continue
        memory = row["memory"]
        micro = f"{row['micro_batch_cells']} × {row['micro_steps']}"
        speed = "{:,.0f} to {:,.0f}".format(*row["cells_per_second"]) if config.gpus else "–"
        print(f"{name:<20} {micro:>11} {memory['parameters'] / gb:>11.3f} {memory['optimizer'] / gb:>10.3f} "
              f"{memory['gradients'] / gb:>10.3f} {memory['buffers'] / gb:>8.3f} {memory['activations'] / gb:>12.3f} "
              f"{memory['peak'] / gb:>6.2f}   {speed}")
    best = result["recommended"]
    print(f"\nrecommended: {best['deepspeed']}, {best['precision']}, micro-batches of {best['micro_batch_cells']} cells")
    if config.gpus:
        seconds, hours = best["step_seconds"], best["hours"]
        print(f"a step takes {seconds[0] * 1e3:,.1f} to {seconds[1] * 1e3:,.1f} ms, {result['cells']:,.0f} cells "
              f"{hours[0]:,.2f} to {hours[1]:,.2f} hours, at {result['ceilings']}")
        print("best: Triton kernels (SCBENCH_KERNELS=triton), everything overlaps; worst: PyTorch paths, nothing overlaps")
    print(f"\n    {result['command']}")
