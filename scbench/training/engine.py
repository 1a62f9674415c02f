"""DeepSpeed, and only here: process group, configuration, engine, and every tensor of its state by parameter name.

One code path: a DeepSpeed engine at world size 1 as well as 64.
"""

import atexit
import contextlib
import io
import os
from collections.abc import Iterator
from datetime import timedelta

import torch
from torch import Tensor, nn

from scbench.config import PretrainConfig
from scbench.errors import UserError
from scbench.training import launchers
from scbench.training.allocator import keep_freed_memory
from scbench.training.deepspeed_settings import WEIGHT_DECAY, offloads

if not torch.cuda.is_available():
    os.environ.setdefault("DS_ACCELERATOR", "cpu")  # else DeepSpeed warns that it found no GPU
os.environ.setdefault("DEEPSPEED_LOG_LEVEL", "error")

import deepspeed
import deepspeed.comm as dist
from deepspeed import utils as zero

# The shared-memory communication op compiles C++ on its first use; gloo and NCCL need no compiler.
deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False

MOMENTS = ("exp_avg", "exp_avg_sq")
BUFFER = "buffer"


def start_process_group(timeout: float = 1800.0) -> tuple[int, int]:
    """Join the launcher's ranks, or start a group of one. Returns (rank, world size).

    `timeout`: seconds that a rank waits in a collective for the others before the run ends.
    """
    launchers.prepare(os.environ)
    cuda = torch.cuda.is_available()
    backend = "nccl" if cuda else "gloo"
    if cuda:
        number = int(os.environ.get("LOCAL_RANK", 0))
        if number >= torch.cuda.device_count():  # srun --gpus-per-task=1 shows each task its own GPU only
            number %= torch.cuda.device_count()
            os.environ["LOCAL_RANK"] = str(number)  # which DeepSpeed takes for the device too
        torch.cuda.set_device(number)
    if not dist.is_initialized():
        atexit.register(_leave_process_group)
        if "RANK" not in os.environ:  # no launcher: a group of one needs no port
            os.environ.setdefault("LOCAL_RANK", "0")  # DeepSpeed insists on this one; alone, it means nothing
            torch.distributed.init_process_group(backend, store=torch.distributed.HashStore(), rank=0, world_size=1)
        try:
            deepspeed.init_distributed(dist_backend=backend, verbose=False, timeout=timedelta(seconds=timeout))
        except torch.distributed.DistStoreError as error:
            raise UserError(
                f"rank {os.environ['RANK']} of {os.environ['WORLD_SIZE']} waited {timeout:.0f} s for the others at "
                f"{os.environ['MASTER_ADDR']}:{os.environ['MASTER_PORT']}: see where they are, or give a longer --timeout."
            ) from error
        except torch.distributed.DistNetworkError as error:
            if "EADDRINUSE" not in str(error):
                raise
            raise UserError(
                f"port {os.environ['MASTER_PORT']} of {os.environ['MASTER_ADDR']} is taken, perhaps by another run: give the "
                "launcher another one (torchrun --standalone finds one itself; deepspeed --master_port; srun: MASTER_PORT)."
            ) from error
    return dist.get_rank(), dist.get_world_size()


def device() -> torch.device:
    """What this rank computes on."""
    return torch.device("cuda", torch.cuda.current_device()) if torch.cuda.is_available() else torch.device("cpu")


def _leave_process_group() -> None:
    """gloo's threads abort a process that ends while they run."""
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


def parameter_groups(model: nn.Module, config: PretrainConfig) -> list[dict]:
    """AdamW decays matrices by 0.01, and neither tables, norms, biases nor Mamba's decay rates; the others decay nothing.

    The rate is 0 until `set_learning_rate`: DeepSpeed may step the optimizer while it starts.
    """
    if config.optimizer != "adamw":
        return [{"params": list(model.parameters()), "lr": 0.0, "weight_decay": 0.0}]
    named = list(model.named_parameters())
    matrices = [p for name, p in named if p.ndim >= 2 and not name.endswith(("table", "logarithm"))]
    chosen = {id(p) for p in matrices}
    return [{"params": matrices, "lr": 0.0, "weight_decay": WEIGHT_DECAY},
            {"params": [p for _, p in named if id(p) not in chosen], "lr": 0.0, "weight_decay": 0.0}]


def make_optimizer(model: nn.Module, config: PretrainConfig) -> torch.optim.Optimizer:
    """Torch's own optimizer over `parameter_groups`; fused: one pass over a gene table's weights and moments, not ten."""
    kind = {"adamw": torch.optim.AdamW, "adam": torch.optim.Adam, "sgd": torch.optim.SGD}[config.optimizer]
    return kind(parameter_groups(model, config), fused=True)


def make_engine(model: nn.Module, config: PretrainConfig, settings: dict) -> deepspeed.DeepSpeedEngine:
    """A DeepSpeed engine around `model`; the optimizer is torch's, or with offload DeepSpeed's Adam for the CPU."""
    if not torch.cuda.is_available():
        keep_freed_memory()
    if offloads(settings):
        _build_cpu_adam(config, settings)
        optimizer = {"model_parameters": parameter_groups(model, config)}
    else:
        optimizer = {"optimizer": make_optimizer(model, config)}
    with contextlib.redirect_stdout(io.StringIO()):  # it prints its memory, whatever its log level
        engine, *_ = deepspeed.initialize(model=model, config=settings, **optimizer)
    _set_step_count(engine, 0)  # bf16 without ZeRO has made a step on zero gradients by now (deepspeed 0.19.8)
    groups = torch.distributed.distributed_c10d
    for group in groups._world.pg_map:  # DeepSpeed's own groups have the library's timeout, half an hour
        groups._set_pg_timeout(timedelta(seconds=config.timeout_seconds), group)
    return engine


def _build_cpu_adam(config: PretrainConfig, settings: dict) -> None:
    """DeepSpeed compiles its CPU Adam at its first use (minutes, once a machine); UserError where it can't. Collective."""
    if settings["optimizer"]["params"].get("torch_adam"):
        return
    from deepspeed.ops.op_builder import CPUAdamBuilder

    try:
        for first in (True, False):  # a node's first rank compiles, the others load what it made
            if (os.environ.get("LOCAL_RANK", "0") == "0") == first:
                with contextlib.redirect_stdout(io.StringIO()):
                    CPUAdamBuilder().load(verbose=False)
            dist.barrier()
    except Exception as error:  # whatever a compiler, ninja, or torch's way to call them may raise
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise UserError(
            f"--deepspeed {config.deepspeed} offloads to DeepSpeed's CPU Adam, which cannot be compiled here ({reason}): "
            'install g++ and ninja, or set "torch_adam": true in the params of the file\'s optimizer (slower).'
        ) from error


def set_learning_rate(engine: deepspeed.DeepSpeedEngine, rate: float) -> None:
    """The same rate for every parameter group."""
    for group in engine.optimizer.param_groups:
        group["lr"] = rate


def gradient_norm_before_step(engine: deepspeed.DeepSpeedEngine) -> Tensor | None:
    """The norm of the whole gradient, before clipping, where DeepSpeed itself does not say it (fp32 without ZeRO);
    to be asked between the last backward and the step."""
    if not isinstance(engine.optimizer, torch.optim.Optimizer) or not engine.is_gradient_accumulation_boundary():
        return None
    return torch.nn.utils.get_total_norm([p.grad for p in engine.module.parameters() if p.grad is not None])


def gradient_norm(engine: deepspeed.DeepSpeedEngine) -> Tensor | float:
    """The norm of the last step's whole gradient, before clipping."""
    return engine.get_global_grad_norm()


def _masters(engine: deepspeed.DeepSpeedEngine) -> dict[Tensor, Tensor]:
    """Stage 0: parameter → the fp32 tensor that the optimizer updates (itself in fp32)."""
    optimizer = engine.optimizer
    if hasattr(optimizer, "fp16_groups"):  # DeepSpeed's wrapper for bf16 without ZeRO
        return {p: master for low, high in zip(optimizer.fp16_groups, optimizer.fp32_groups, strict=True)
                for p, master in zip(low, high, strict=True)}
    return {p: p for p in engine.module.parameters()}


def _base_optimizer(engine: deepspeed.DeepSpeedEngine) -> torch.optim.Optimizer:
    return getattr(engine.optimizer, "optimizer", engine.optimizer)


def _set_step_count(engine: deepspeed.DeepSpeedEngine, steps: int) -> None:
    """Adam's own count of steps, which corrects the bias of its moments."""
    for state in _base_optimizer(engine).state.values():
        if "step" in state:
            state["step"] = torch.full_like(state["step"], steps) if torch.is_tensor(state["step"]) else steps


def _link_moments(engine: deepspeed.DeepSpeedEngine) -> None:
    """ZeRO 1 and 2 link parameters to their moments after the first *group's* first step, when other groups have none
    yet (deepspeed 0.19.8): link them again."""
    optimizer = engine.optimizer
    if hasattr(optimizer, "_lazy_init_hp_params_optimizer_state"):
        optimizer._hp_optimizer_states_linked = False
        optimizer._lazy_init_hp_params_optimizer_state()


def full_state(engine: deepspeed.DeepSpeedEngine) -> Iterator[tuple[str, str, Tensor]]:
    """(name, "master", a moment's name or BUFFER, whole fp32 tensor on the CPU), for any ZeRO stage.

    A collective operation: every rank must run through it.
    """
    _link_moments(engine)
    masters = _masters(engine) if engine.zero_optimization_stage() == 0 else None
    states = _base_optimizer(engine).state
    adam = not isinstance(_base_optimizer(engine), torch.optim.SGD)  # SGD has no moments
    for name, parameter in engine.module.named_parameters():
        for kind in ("master", *MOMENTS):
            if masters is not None:
                master = masters[parameter]
                tensor = master if kind == "master" else states.get(master, {}).get(kind)
            elif kind == "master":
                tensor = zero.safe_get_full_fp32_param(parameter)
            else:
                tensor = zero.safe_get_full_optimizer_state(parameter, kind) if adam else None
            if tensor is not None:
                yield name, kind, tensor.detach().float().cpu()
    for name, buffer in engine.module.named_buffers():  # batch norm's running statistics; each rank has its own, rank 0's stay
        yield name, BUFFER, buffer.detach().cpu()


def set_full_state(engine: deepspeed.DeepSpeedEngine, tensors: dict[str, dict[str, Tensor]], steps: int) -> None:
    """Put back what `full_state` gave: `tensors[kind][name]`, and the optimizer's step count. The optimizer's state
    must exist (one step at learning rate 0)."""
    _link_moments(engine)
    masters = _masters(engine) if engine.zero_optimization_stage() == 0 else None
    states = _base_optimizer(engine).state
    for name, buffer in engine.module.named_buffers():
        buffer.copy_(tensors[BUFFER][name])
    for name, parameter in engine.module.named_parameters():
        for kind in tensors.keys() - {BUFFER}:
            value = tensors[kind][name]
            if masters is not None:
                master = masters[parameter]
                (master.data if kind == "master" else states[master][kind]).copy_(value)
                parameter.data.copy_(master.data)
            elif engine.zero_optimization_stage() == 3:
                _set_part(parameter, value, kind)
            elif kind == "master":
                zero.safe_set_full_fp32_param(parameter, value)
            else:
                zero.safe_set_full_optimizer_state(parameter, value, kind)
    _set_step_count(engine, steps)


def _set_part(parameter: nn.Parameter, value: Tensor, kind: str) -> None:
    """ZeRO 3: this rank's part of a whole tensor, padded where the ranks do not divide it; what sets whole tensors cannot
    do that (deepspeed 0.19.8)."""
    part = torch.zeros_like(zero.safe_get_local_fp32_param(parameter)).flatten()
    mine = value.flatten()[dist.get_rank() * len(part) : (dist.get_rank() + 1) * len(part)]
    part[: len(mine)].copy_(mine)
    if kind == "master":
        zero.safe_set_local_fp32_param(parameter, part)
    else:
        zero.safe_set_local_optimizer_state(parameter, part, kind)
