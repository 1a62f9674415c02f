"""The pretraining loop.

Run directory:

    config.json       options of the run, and the store's fingerprint
    environment.json  versions and hardware
    metrics.jsonl     one row a step, one a validation
    tensorboard/      the same
    checkpoints/      step-…: portable checkpoints
    model/            what others load (written at the end)
"""

import dataclasses
import json
import math
import shutil
import signal
import sys
import threading
from collections import deque
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from scbench.config import InputLaw, PretrainConfig
from scbench.data.batch import CellBatch
from scbench.data.loader import Loader
from scbench.data.stage import stage
from scbench.data.store import Split, Store
from scbench.data.training_fingerprints import TrainingFingerprints
from scbench.errors import DivergedError, UserError
from scbench.files import refuse_existing, write_text
from scbench.models.model import ExpressionModel
from scbench.training import checkpoint
from scbench.training import engine as engines
from scbench.training.engine import dist
from scbench.training.schedule import rates
from scbench.training.telemetry import Telemetry, environment
from scbench.training.validation import validate

# Options that a resumed run may change: where and how it runs, not what it computes.
MAY_CHANGE = {"store", "stage_to", "output", "resume", "json", "debug", "deepspeed", "micro_batch_cells", "checkpoint_every",
              "keep_last", "validate_every", "loader_workers"}
NOT_OF_THE_MODEL = {"store", "stage_to", "output", "resume", "json", "debug"}  # a published model carries no path of its maker
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
    rank, world = engines.start_process_group()
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
    dist.barrier()
    start = checkpoint.newest(config.output) if config.resume else None

    model = ExpressionModel(config.model(store.vocabulary.size), store.vocabulary, config.seed)
    start_step, tensors = 0, None
    if start is not None:
        start_step, tensors = checkpoint.read_state(start)["step"], checkpoint.read_tensors(start)
        model.load_state_dict(checkpoint.model_state(tensors))
    loader = Loader(
        train, store.vocabulary, model.config.inputs, seed=config.seed, batch_cells=config.batch_cells,
        micro_batch_cells=config.micro_batch_cells, mask_ratio=config.mask_ratio,
        weighted_share=0.5 if config.weighted_sampling else 0.0, lanes=config.lanes, rank=rank, world=world,
        start_step=start_step, workers=config.loader_workers,
    )
    settings, notes = engines.read_deepspeed_config(config, loader.micro_steps)
    engine = engines.make_engine(model, config, settings)
    telemetry = None
    if rank == 0:
        write_text(config.output / "environment.json", json.dumps(environment(world), indent=2) + "\n")
        telemetry = Telemetry(config.output, start_step, steps, config.batch_cells)
        for note in notes:
            print(note, file=sys.stderr)
    try:
        with loader:
            validation = _train(config, store, engine, loader, telemetry, start_step, steps, tensors, train.n_cells)
    finally:
        engine.destroy()  # else its hooks hold it, and the memory of a whole run, as long as the process lives
        if telemetry is not None:
            telemetry.close()
    return _finish(config, store, train, steps, validation)


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

    `denominator`: masked genes of all ranks' windows. Returns this rank's part of (regression loss, MVC loss, tokens).
    """
    parts = torch.zeros(3, device=engine.device)
    for number, batch in enumerate(window, 1):
        batch = batch._replace(denominator=denominator).to(engine.device)
        output = engine(batch)
        # The losses are parts of one sum already: undo DeepSpeed's division by ranks and micro-steps.
        engine.backward(output.loss * (dist.get_world_size() * len(window)))
        parts[0] += output.regression_loss.detach()
        parts[1] += output.mvc_loss.detach()
        parts[2] += batch.genes.shape[0]
        if number < len(window):
            engine.step()  # DeepSpeed counts micro-steps by it; only the last one updates
    return parts


def _train(config, store, engine, loader, telemetry, start_step: int, steps: int, tensors: dict | None,
           train_cells: int) -> dict[str, float]:
    """Run the optimizer steps; returns the last validation. Order of a step: batch, forward and backward of each
    micro-step, optimizer, losses read, validation, checkpoint."""
    if tensors is not None:
        _restore(engine, tensors, start_step)
    engine.train()
    device = engine.device
    lag = READ_LAG if device.type == "cuda" else 0
    rate_of = rates(config, steps, train_cells)
    split = store.split("validation")
    inputs = _validation_inputs(config, engine.module.config.inputs)
    unread: deque[tuple[int, torch.Tensor, dict]] = deque()
    validation: dict[str, float] = {}
    with _StopSignal() as stop:
        for step in range(start_step + 1, steps + 1):
            waited = loader.wait_seconds
            window = next(loader)
            wait = loader.wait_seconds - waited
            # One small reduction: the masked genes of all ranks, and whether any rank was told to stop.
            shared = torch.stack([window[0].denominator, torch.tensor(float(stop.asked))]).to(device, non_blocking=True)
            dist.all_reduce(shared)
            rate = rate_of(step - 1)
            engines.set_learning_rate(engine, rate)
            losses = backward(engine, window, shared[0])
            norm = engines.gradient_norm_before_step(engine)
            engine.step()
            dist.all_reduce(losses)
            norm = engines.gradient_norm(engine) if norm is None else norm
            unread.append((step, torch.cat([losses, shared[1:]]), {"lr": rate, "gradient_norm": norm, "wait_seconds": wait}))
            last = step == steps
            saving = last or step % config.checkpoint_every == 0
            stopping = False
            while unread and (len(unread) > lag or saving):
                stopping = _read(*unread.popleft(), config, telemetry) or stopping
            if split.n_cells and (last or step % config.validate_every == 0) and not stopping:
                validation = validate(
                    engine, split, store.vocabulary, inputs, seed=config.seed, mask_ratio=config.mask_ratio,
                    max_cells=config.validation_cells, batch_cells=config.micro_batch_cells or 32,
                )
                if telemetry is not None:
                    telemetry.validation(step, validation)
            if saving or stopping:
                while unread:
                    _read(*unread.popleft(), config, telemetry)
                checkpoint.save(config.output, engine, step, loader.state(), config.keep_last)
            if stopping:
                if telemetry is not None:
                    print(f"stopped by a signal after step {step}: go on with --resume", file=sys.stderr)
                raise SystemExit(128 + signal.SIGTERM)
    return validation


def _validation_inputs(config: PretrainConfig, inputs: InputLaw) -> InputLaw:
    """How validation cells are seen: as in training, but for --validation-max-genes."""
    return inputs.with_max_genes(config.validation_max_genes or inputs.max_genes)


def _read(step: int, values: torch.Tensor, row: dict, config: PretrainConfig, telemetry: Telemetry | None) -> bool:
    """Wait for a step's losses, record them, and say whether some rank was told to stop."""
    regression, mvc, tokens, stopped = values.tolist()
    if not math.isfinite(regression + mvc):
        first = (step - 1) * config.batch_cells
        raise DivergedError(
            f"the loss of step {step} is not finite (seed {config.seed}, samples {first} to "
            f"{first + config.batch_cells - 1}): lower --lr, or go on from the last checkpoint with --resume."
        )
    if telemetry is not None:
        telemetry.step(step, {"loss": regression + mvc, "regression_loss": regression, "mvc_loss": mvc, "tokens": tokens,
                              **{name: float(value) for name, value in row.items()}})
    return stopped > 0


class _StopSignal:
    """Notes SIGTERM, so that the run can save and leave after the step."""

    def __init__(self) -> None:
        self.asked = False

    def __enter__(self) -> "_StopSignal":
        self.before = None
        if threading.current_thread() is threading.main_thread():
            self.before = signal.signal(signal.SIGTERM, lambda *_: setattr(self, "asked", True))
        return self

    def __exit__(self, *_: object) -> None:
        if self.before is not None:
            signal.signal(signal.SIGTERM, self.before)


def _finish(config: PretrainConfig, store: Store, train: Split, steps: int, validation: dict[str, float]) -> Run:
    """Write model/ from the last checkpoint."""
    model_dir = config.output / "model"
    if dist.get_rank() == 0:
        model = ExpressionModel(config.model(store.vocabulary.size), store.vocabulary, config.seed)
        last = checkpoint.read_tensors(checkpoint.checkpoint_path(config.output, steps))
        model.load_state_dict(checkpoint.model_state(last))
        provenance = {
            "store_fingerprint": store.fingerprint,
            "sources": store.manifest["sources"],
            "splits": {name: store.split(name).n_cells for name in ("train", "validation", "test")},
            "training": {name: value for name, value in dataclasses.asdict(config).items() if name not in NOT_OF_THE_MODEL},
            "steps": steps,
            "batch_cells": config.batch_cells,
            "validation": validation,
        }
        splits = [split for split in (train, store.split("validation")) if split.n_cells]
        seen = [split.cells(["content_hash"])["content_hash"].to_numpy() for split in splits]
        fingerprints = TrainingFingerprints.of_store(store, splits)
        if model_dir.exists():
            shutil.rmtree(model_dir)  # a finished run that was resumed
        model.save_pretrained(model_dir, provenance, np.concatenate(seen), fingerprints and fingerprints.save)
    dist.barrier()
    return Run(config.output, model_dir, steps, validation)
