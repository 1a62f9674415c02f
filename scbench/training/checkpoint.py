"""The portable checkpoint: safetensors by parameter name, so that any ZeRO stage and world size can go on from it.

    checkpoints/step-00000100/
        master.safetensors  exp_avg.safetensors  exp_avg_sq.safetensors     fp32, whole, by parameter name
        buffer.safetensors                                                  batch norm's running statistics, if there are any
        state.json          step, loader state, optimizer steps, SHA-256 of each file

A checkpoint is published by one rename once every part is written and synced; nothing in it is a pickle.
(DeepSpeed's own checkpoints are pickles, and its universal ones do not convert between all stages.)
"""

import json
import shutil
import warnings
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from scbench.errors import UserError
from scbench.files import published_directory, sha256

FORMAT = 1
BUFFER = "buffer"  # the kind of what is no parameter: batch norm's running statistics


def checkpoint_path(run: Path, step: int) -> Path:
    """Where the checkpoint after `step` steps lies."""
    return run / "checkpoints" / f"step-{step:08d}"


def save(run: Path, engine, step: int, loader_state: dict, keep_last: int) -> None:
    """Write the checkpoint after `step` steps and remove all but the newest `keep_last`. Collective; rank 0 writes."""
    from scbench.training import engine as engines  # DeepSpeed: whoever only reads checkpoints (export) does without
    from scbench.training.engine import dist

    tensors: dict[str, dict[str, Tensor]] = {}
    for name, kind, tensor in engines.full_state(engine):
        if dist.get_rank() == 0:
            tensors.setdefault(kind, {})[name] = tensor.clone()
    failure = None
    if dist.get_rank() == 0:
        try:
            _write(checkpoint_path(run, step), tensors, step, loader_state)
            for old in sorted((run / "checkpoints").glob("step-*"))[:-keep_last]:
                shutil.rmtree(old)
        except (OSError, SafetensorError) as error:
            failure = error
    failed = torch.tensor([float(failure is not None)], device=engine.device)
    dist.all_reduce(failed)  # so that all ranks stop together
    if failed.item():
        reason = getattr(failure, "strerror", None) or failure or "rank 0 says why"
        raise UserError(f"the checkpoint of step {step} could not be written to {run} ({reason}): "
                        "make room and go on with --resume; the checkpoints before it are intact.")


def _write(path: Path, tensors: dict[str, dict[str, Tensor]], step: int, loader_state: dict) -> None:
    with published_directory(path) as partial:
        for kind, values in tensors.items():
            save_file(values, partial / f"{kind}.safetensors")
        state = {"format": FORMAT, "step": step, "loader": loader_state,
                 "files": {file.name: sha256(file) for file in sorted(partial.iterdir())}}
        (partial / "state.json").write_text(json.dumps(state, indent=2) + "\n", encoding="utf-8")


def remove_unfinished(run: Path) -> None:
    """Remove what a process that was killed while it wrote a checkpoint has left."""
    for partial in (run / "checkpoints").glob(".partial-*"):
        shutil.rmtree(partial, ignore_errors=True)


def newest(run: Path) -> Path | None:
    """The newest whole checkpoint of a run; damaged ones are skipped with a warning. None if there is none."""
    for path in sorted((run / "checkpoints").glob("step-*"), reverse=True):
        if is_whole(path):
            return path
        warnings.warn(f"the checkpoint {path} is damaged: the one before it is used", stacklevel=2)
    return None


def is_whole(path: Path) -> bool:
    """Whether every part of a checkpoint is there, byte for byte; UserError if a newer scbench wrote it."""
    try:
        return all(sha256(path / name) == digest for name, digest in read_state(path)["files"].items())
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return False


def read_state(path: Path) -> dict:
    """The checkpoint's state.json; UserError if a newer scbench wrote it."""
    state = json.loads((path / "state.json").read_text(encoding="utf-8"))
    if state["format"] > FORMAT:
        raise UserError(f"the checkpoint {path} was written by a newer scbench (format {state['format']}): upgrade scbench.")
    return state


def read_tensors(path: Path) -> dict[str, dict[str, Tensor]]:
    """{kind: {parameter name: fp32 tensor}} of a checkpoint."""
    return {file.stem: load_file(file) for file in sorted(path.glob("*.safetensors"))}


def model_state(tensors: dict[str, dict[str, Tensor]]) -> dict[str, Tensor]:
    """What `load_state_dict` wants of `read_tensors`."""
    return tensors["master"] | tensors.get(BUFFER, {})
