"""`scbench export`: a model directory from a checkpoint, in one process and without DeepSpeed."""

import sys
from pathlib import Path

from safetensors import SafetensorError

from scbench.config import ExportConfig
from scbench.data.store import Store
from scbench.errors import UserError
from scbench.files import refuse_existing
from scbench.training import checkpoint
from scbench.training.model_directory import read_data, read_run, write_model_directory


def run_export(config: ExportConfig) -> dict:
    """The verb `export`: write the model directory, and return where it is and what it was made of."""
    refuse_existing(config.output)
    run, path = find_checkpoint(config.checkpoint)
    store, why_not = find_store(config, run)
    try:
        step = write_model_directory(run, path, config.output, store)
    except (OSError, ValueError, KeyError, RuntimeError, SafetensorError) as error:
        if isinstance(error, OSError) and error.errno is not None and not isinstance(error, FileNotFoundError):
            raise  # a full disk, a directory that cannot be written: the command line says which
        raise UserError(f"the checkpoint {path} is damaged or not of this run ({str(error).splitlines()[0]}): "
                        f"export another one of {path.parent}.") from error
    if why_not:
        print(f"warning: {why_not}, so the model is not checkable by the leakage guard: give --store to make it so.",
              file=sys.stderr)
    if not config.json:
        print(f"model after {step:,} steps: {config.output}")
    return {"output": str(config.output), "checkpoint": str(path), "steps": step, "leakage_guard": store is not None}


def find_checkpoint(path: Path) -> tuple[Path, Path]:
    """(run directory, checkpoint) that the argument of `export` means; a damaged checkpoint is refused.

    Raises
    ------
    UserError
        If there is none.
    """
    if (path / "state.json").is_file():
        if not checkpoint.is_whole(path):
            raise UserError(f"the checkpoint {path} is damaged: export another one, or the run's newest whole one by its "
                            "run directory.")
        return path.resolve().parents[1], path
    if not path.is_dir():
        raise UserError(f"there is no checkpoint {path}: give run/checkpoints/step-…, or the run directory.")
    if not (path / "checkpoints").is_dir():
        raise UserError(f"{path} is neither a checkpoint (no state.json) nor a run directory (no checkpoints/).")
    newest = checkpoint.newest(path)
    if newest is None:
        raise UserError(f"the run {path} has no whole checkpoint yet: nothing can be exported.")
    return path, newest


def find_store(config: ExportConfig, run: Path) -> tuple[Store | None, str]:
    """(the store of a run, or None and why it cannot be had). A store that was asked for must be there."""
    if config.store is not None:
        return Store.open(config.store), ""
    recorded = read_run(run).store
    try:
        store = Store.open(recorded)
    except UserError:
        return None, f"there is no store at {recorded} any more"
    if store.fingerprint != read_data(run)["store_fingerprint"]:
        return None, f"the store at {recorded} is not the one that the run was trained on"
    return store, ""
