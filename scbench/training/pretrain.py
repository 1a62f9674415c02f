"""The pretraining loop.

Run directory:

    config.json       options of the run, and the store's fingerprint
    environment.json  versions and hardware
    vocabulary.json   the store's, and
    data.json         its fingerprint, sources and splits: what `export` says of the data when the store is gone
    metrics.jsonl     one row a step, one a validation
    tensorboard/      the same
    checkpoints/      step-…: portable checkpoints
    model/            what others load (written at the end)
"""

import dataclasses
import json
import math
import shutil
import sys
import time
from collections import deque
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import torch

from scbench.config import InputLaw, PretrainConfig
from scbench.data.batch import CellBatch
from scbench.data.loader import Loader
from scbench.data.stage import stage
from scbench.data.store import Split, Store
from scbench.errors import UserError
from scbench.files import refuse_existing, write_text
from scbench.models.model import ExpressionModel
from scbench.training import checkpoint, faults, hardware, step_facts, stopping
from scbench.training import engine as engines
from scbench.training.deepspeed_settings import read_deepspeed_config
from scbench.training.engine import dist
from scbench.training.lifeline import Lifeline
from scbench.training.model_directory import record_data, write_model_directory
from scbench.training.on_device import Moment, Windows, to_host
from scbench.training.schedule import rates
from scbench.training.stopping import Stopping
from scbench.training.telemetry import Telemetry, environment
from scbench.training.validation import validate

# Options that a resumed run may change: where and how it runs, not what it computes.
MAY_CHANGE = {"store", "stage_to", "output", "resume", "json", "debug", "deepspeed", "micro_batch_cells", "checkpoint_every",
              "keep_last", "validate_every", "loader_workers", "time_limit", "timeout", "peak_tflops"}
READ_LAG = 8  # steps that the host may run ahead of the losses it has read from a GPU


@dataclass(frozen=True)
class Run:
    """A finished run."""

    directory: Path
    model_dir: Path
    steps: int
    validation: dict[str, float]


def pretrain(store: Store | str | Path, output: str | Path = "run", **options) -> Run:
    """Pretrain a model on a store.

    Parameters
    ----------
    store
        A Store or its path.
    output
        The run directory to make.
    options
        Fields of PretrainConfig: structure, width, steps, …

    Returns
    -------
    Run, whose `model_dir` `ExpressionModel.from_pretrained` reads.

    Raises
    ------
    UserError
        For options that make no sense, a store that can't be read, an output that exists, a loss that is not finite.
    """
    path = store.path if isinstance(store, Store) else Path(store)
    return _pretrain(PretrainConfig(store=Path(path), output=Path(output), **options))


def run_pretrain(config: PretrainConfig) -> dict:
    """The verb `pretrain`."""
    run = _pretrain(config)
    if dist.get_rank() == 0 and not config.json:
        print(f"{run.steps:,} steps done; validation loss {run.validation.get('loss', math.nan):.4f}")
        print(f"model: {run.model_dir}   next: scbench embed {run.model_dir} IN.h5ad OUT.h5ad")
    return {"directory": str(run.directory), "model": str(run.model_dir), "steps": run.steps, "validation": run.validation}


def _pretrain(config: PretrainConfig) -> Run:
    store = Store.open(config.store)
    if config.stage_to is not None:
        store = stage(store, config.stage_to)  # before the ranks meet: their collectives would time out meanwhile
    rank, world = engines.start_process_group(config.timeout_seconds)
    with Lifeline(rank, world, engines.device(), config.timeout_seconds):
        try:
            return _run(config, store, rank, world)
        except (MemoryError, RuntimeError) as error:
            if faults.out_of_memory(error):
                raise faults.memory_error(error, config, rank, world) from error
            raise


def _run(config: PretrainConfig, store: Store, rank: int, world: int) -> Run:
    if rank == 0:
        store.check_files()  # now, and not after hours, when the loader comes to a file that is missing
    train = store.split("train")
    if train.n_cells == 0:
        raise UserError(f"the store {config.store} has no training cells: prepare it with a larger training share.")
    train = train.first(math.ceil(config.data_share * train.n_cells))
    if config.batch_cells < world:
        raise UserError(f"--batch-cells {config.batch_cells} is less than one cell for each of the {world} ranks.")
    steps = config.steps or math.ceil((config.epochs or 1) * train.n_cells / config.batch_cells)
    run_config = {**dataclasses.asdict(config), "steps": steps, "epochs": None, "store_fingerprint": store.fingerprint}
    if rank == 0:
        _open_run(config, run_config)
    start_step = _last_step(config, rank)

    model = ExpressionModel(config.model(store.vocabulary.size), store.vocabulary, config.seed)
    tensors = None
    if start_step:
        tensors = checkpoint.read_tensors(checkpoint.checkpoint_path(config.output, start_step))
        model.load_state_dict(checkpoint.model_state(tensors))
    state_bytes = 3 * 4 * sum(p.numel() for p in model.parameters())  # master weights and two moments in fp32
    stop = Stopping(config.time_limit_seconds, state_bytes, _read_lag(engines.device()))
    loader = Loader(
        train, store.vocabulary, model.config.inputs, seed=config.seed, batch_cells=config.batch_cells,
        micro_batch_cells=config.micro_batch_cells, mask_ratio=config.mask_ratio,
        weighted_share=0.5 if config.weighted_sampling else 0.0, lanes=config.lanes, rank=rank, world=world,
        start_step=start_step, workers=config.loader_workers,
    )
    settings, notes = read_deepspeed_config(config, loader.micro_steps)
    engine = engines.make_engine(model, config, settings)
    telemetry = None
    if rank == 0:
        record_data(config.output, store)
        write_text(config.output / "environment.json", json.dumps(environment(world), indent=2) + "\n")
        peak = hardware.peak_flops(engine.device, config.precision, config.peak_tflops)
        telemetry = Telemetry(config.output, start_step, steps, config.batch_cells, peak and peak * world, engine.device)
        for note in notes:
            print(note, file=sys.stderr)
    with stop:
        try:
            with loader:
                validation = _train(config, store, train, engine, loader, telemetry, stop, start_step, steps, tensors)
        finally:
            engine.destroy()  # else its hooks hold it, and the memory of a whole run, as long as the process lives
            if telemetry is not None:
                telemetry.close()
        return _finish(config, store, steps, validation)


def _last_step(config: PretrainConfig, rank: int) -> int:
    """The step of the newest whole checkpoint, 0 if the run begins. Rank 0 looks: others may see an older file system."""
    step = 0
    if rank == 0 and config.resume:
        checkpoint.remove_unfinished(config.output)
        newest = checkpoint.newest(config.output)
        step = 0 if newest is None else checkpoint.read_state(newest)["step"]
    return _from_rank_0(step)


def _from_rank_0(number: int) -> int:
    """Rank 0's number, on every rank."""
    shared = torch.tensor([number], device=engines.device())
    dist.broadcast(shared, 0)
    return int(shared)


def _open_run(config: PretrainConfig, run_config: dict) -> None:
    """Make the run directory, or check that a resumed run's options are those it was started with."""
    path = config.output / "config.json"
    if config.resume and path.is_file():
        before = json.loads(path.read_text(encoding="utf-8"))
        now = json.loads(json.dumps(run_config, default=str))
        for name in sorted(now.keys() - MAY_CHANGE):
            if before.get(name) != now[name]:
                option = "the store" if name == "store_fingerprint" else f"--{name.replace('_', '-')}"
                raise UserError(f"{option} was {before.get(name)} when the run {config.output} started and is "
                                f"{now[name]} now: give the same, or start a new run.")
        return
    refuse_existing(config.output)
    config.output.mkdir(parents=True, exist_ok=True)
    write_text(path, json.dumps(run_config, indent=2, default=str) + "\n")


def _restore(engine, tensors: dict, step: int) -> None:
    """Put a checkpoint's master weights and moments into the engine. One step at rate 0 makes the state exist first."""
    engines.set_learning_rate(engine, 0.0)
    # two cells: batch norm has no variance of one
    batch = CellBatch.from_lists([[0]] * 2, [[1.0]] * 2, [[True]] * 2, pad_to=engine.module.config.inputs.pad_to)
    batch = batch.to(engine.device)
    for _ in range(engine.gradient_accumulation_steps()):
        engine.backward(engine(batch).loss)
        engine.step()
    engines.set_full_state(engine, tensors, step)


def backward(engine, window: list[CellBatch], denominator: torch.Tensor) -> torch.Tensor:
    """Forward and backward of all micro-batches of a step; the caller's `engine.step()` ends it.

    `denominator`: masked genes of all ranks' windows. Returns this rank's part of (regression loss, MVC loss).
    """
    parts = torch.zeros(2, device=engine.device)
    for number, batch in enumerate(window, 1):
        batch = batch._replace(denominator=denominator).to(engine.device)
        output = engine(batch)
        # The losses are parts of one sum already: undo DeepSpeed's division by ranks and micro-steps.
        engine.backward(output.loss * (dist.get_world_size() * len(window)))
        parts[0] += output.regression_loss.detach()
        parts[1] += output.mvc_loss.detach()
        if number < len(window):
            engine.step()  # DeepSpeed counts micro-steps by it; only the last one updates
    return parts


def _train(config, store, train, engine, loader, telemetry, stop: Stopping, start_step: int, steps: int,
           tensors: dict | None) -> dict[str, float]:
    """Run the optimizer steps; returns the last validation. Order of a step: batch, forward and backward of each
    micro-step, optimizer, losses read, validation, checkpoint."""
    if tensors is not None:
        _restore(engine, tensors, start_step)
    engine.train()
    device, model = engine.device, engine.module.config
    rank, world = dist.get_rank(), dist.get_world_size()
    lag = _read_lag(device)
    rate_of = rates(config, steps, train.n_cells)
    split = store.split("validation")
    inputs = _validation_inputs(config, model.inputs)
    windows = Windows(loader, device)
    unread: deque[_Unread] = deque()

    def validated(step: int) -> dict[str, float]:
        started = time.monotonic()
        validation = validate(
            engine, split, store.vocabulary, inputs, seed=config.seed, mask_ratio=config.mask_ratio,
            max_cells=config.validation_cells, batch_cells=config.micro_batch_cells or 32,
        )
        if telemetry is not None:
            telemetry.validation(step, validation)
        stop.validated(time.monotonic() - started)
        return validation

    validation: dict[str, float] = {}
    due = bool(split.n_cells) and bool(start_step) and start_step % config.validate_every == 0
    if due and not _from_rank_0(int(telemetry is not None and telemetry.validated_at_start)):
        validation = validated(start_step)  # a run that was told to stop left it out
    waited = 0.0
    before = Moment(device)
    for step in range(start_step + 1, steps + 1):
        window, on_device = next(windows)
        wait, waited = loader.wait_seconds - waited, loader.wait_seconds
        shared = step_facts.facts(window, stop.wishes(), model, rank, world).to(device, non_blocking=True)
        dist.all_reduce(shared)
        rate = rate_of(step - 1)
        engines.set_learning_rate(engine, rate)
        losses = backward(engine, on_device, shared[0])
        norm = engines.gradient_norm_before_step(engine)
        engine.step()
        dist.all_reduce(losses)
        norm = engines.gradient_norm(engine) if norm is None else norm
        values = to_host(torch.cat([losses, torch.as_tensor(norm, dtype=losses.dtype, device=device).view(1), shared]))
        after = Moment(device)
        unread.append(_Unread(step, values, before, after, {"lr": rate, "wait_seconds": wait}))
        before = after
        windows.fetch()
        last = step == steps
        saving = last or step % config.checkpoint_every == 0
        validating = bool(split.n_cells) and (last or step % config.validate_every == 0)
        why = None
        while unread and (why or saving or validating or len(unread) > lag):
            why = _read(unread.popleft(), config, train, telemetry) or why
        if validating and not why:
            validation = validated(step)
        if saving or why:
            started = time.monotonic()
            if telemetry is not None:
                telemetry.flush()
            checkpoint.save(config.output, engine, step, {"step": step}, config.keep_last)
            stop.saved(time.monotonic() - started)
        if why and not last:
            if telemetry is not None:
                print(f"stopped by {why} after step {step}: go on with --resume", file=sys.stderr)
            raise SystemExit(stopping.exit_code(why))
        if validating or saving:
            before = Moment(device)
    return validation


def _read_lag(device: torch.device) -> int:
    return READ_LAG if device.type == "cuda" else 0


def _validation_inputs(config: PretrainConfig, inputs: InputLaw) -> InputLaw:
    """How validation cells are seen: as in training, but for --validation-max-genes."""
    return inputs.with_max_genes(config.validation_max_genes or inputs.max_genes)


class _Unread(NamedTuple):
    """A step whose numbers are on their way to the host."""

    step: int
    values: torch.Tensor  # regression loss, MVC loss, gradient norm, step_facts
    before: Moment
    after: Moment
    row: dict[str, float]


def _read(unread: _Unread, config: PretrainConfig, train: Split, telemetry: Telemetry | None) -> str | None:
    """Wait for a step's numbers, record them, and say why the run should stop, if it should."""
    unread.after.wait()
    regression, mvc, norm, *shared = unread.values.tolist()
    what = faults.not_finite({"loss": regression + mvc, "gradient": norm})
    if what:
        raise faults.diverged(what, unread.step, config, train, writes=telemetry is not None)
    wishes, work = step_facts.read(shared)
    if telemetry is not None:
        losses = {"loss": regression + mvc, "regression_loss": regression, "mvc_loss": mvc, "gradient_norm": norm}
        telemetry.step(unread.step, {**losses, **unread.row, **work}, unread.after.seconds_since(unread.before))
    return stopping.reason(wishes)


def _finish(config: PretrainConfig, store: Store, steps: int, validation: dict[str, float]) -> Run:
    """Write model/ from the last checkpoint."""
    model_dir = config.output / "model"
    if dist.get_rank() == 0:
        if model_dir.exists():
            shutil.rmtree(model_dir)  # a finished run that was resumed
        write_model_directory(config.output, checkpoint.checkpoint_path(config.output, steps), model_dir, store)
    dist.barrier()
    return Run(config.output, model_dir, steps, validation)
