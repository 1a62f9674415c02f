"""The launchers: what torchrun, deepspeed and srun tell a process of its place, and what this node should keep to itself.

torchrun and deepspeed set RANK, WORLD_SIZE, LOCAL_RANK, MASTER_ADDR and MASTER_PORT. srun sets SLURM_… of its own, from which
those follow here. Alone, there are none.
"""

import os
import re
import stat
import tempfile
from collections.abc import MutableMapping
from pathlib import Path

FIRST_PORT, PORTS = 15_000, 15_000  # below the range from which systems take ports for their own connections
CACHES = {"TRITON_CACHE_DIR": "triton", "TORCH_EXTENSIONS_DIR": "torch_extensions"}


def prepare(environment: MutableMapping[str, str]) -> None:
    """Add to the environment of a process what it lacks: its place in a run of srun, and caches on the node's own disk."""
    if "RANK" not in environment and "SLURM_PROCID" in environment and int(environment.get("SLURM_NTASKS", 1)) > 1:
        environment["RANK"] = environment["SLURM_PROCID"]
        environment["LOCAL_RANK"] = environment["SLURM_LOCALID"]
        environment["WORLD_SIZE"] = environment["SLURM_NTASKS"]
        environment.setdefault("MASTER_ADDR", first_host(environment))
        environment.setdefault("MASTER_PORT", str(port_of_job(environment)))
    if "RANK" in environment:
        _keep_caches_local(environment)


def first_host(environment: MutableMapping[str, str]) -> str:
    """The host of task 0: `node07` of `node[07-09,12],other3`."""
    if environment.get("SLURM_NNODES", "1") == "1":
        return "127.0.0.1"
    names = environment.get("SLURM_STEP_NODELIST") or environment["SLURM_NODELIST"]
    name, number, rest = re.match(r"([^,\[]+)(?:\[(\d+)[^\]]*\])?([^,]*)", names).groups()
    return name + (number or "") + rest


def port_of_job(environment: MutableMapping[str, str]) -> int:
    """A port that all tasks of a job step agree on without talking, and that other steps and jobs hardly ever share."""
    job, step = (int(environment.get(f"SLURM_{name}_ID", 0)) for name in ("JOB", "STEP"))
    return FIRST_PORT + (job * 31 + step) % PORTS


def _keep_caches_local(environment: MutableMapping[str, str]) -> None:
    """Compiled code goes to the node's own disk unless the environment says where: on a shared home directory hundreds of
    ranks would wait for each other's locks. The folder must be ours alone, since code is loaded from it."""
    missing = [name for name in CACHES if name not in environment]
    if not missing:
        return
    folder = Path(tempfile.gettempdir()) / f"scbench-{os.getuid()}"
    folder.mkdir(mode=0o700, exist_ok=True)
    facts = folder.lstat()
    if not stat.S_ISDIR(facts.st_mode) or facts.st_uid != os.getuid() or facts.st_mode & 0o022:
        return  # somebody else's: the defaults are slower, but safe
    for name in missing:
        environment[name] = str(folder / CACHES[name])
