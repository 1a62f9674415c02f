"""prepare killed with SIGKILL and run again: the same bytes as without, finished parts used again, no process left over."""

import hashlib
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

SETTINGS = """
from scbench.data import plan, prepare
plan.SHARD_CELLS, plan.TASK_CELLS = 150, 100
INPUTS = ["a.h5ad", "b.h5ad"]
"""

# Each child goes on with what the one before it left, and dies a little later. Forking is safe as long as only the
# children use TensorStore.
KILLED = SETTINGS + """
import os, signal
from scbench.data import gather, publish, scatter


def die_at(module, name, call):
    original, calls = getattr(module, name), []

    def replacement(*arguments, **options):
        calls.append(name)
        if len(calls) == call:
            os.kill(os.getpid(), signal.SIGKILL)
        return original(*arguments, **options)

    setattr(module, name, replacement)


def prepared_by_a_child(*moment, **options):
    child = os.fork()
    if child == 0:
        if moment:
            die_at(*moment)
        prepare.prepare(INPUTS, "store", workers=1, **options)
        os._exit(0)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


for moment in [
    (scatter, "_write", 3),  # inside the second part
    (prepare, "gather", 1),  # between the passes
    (gather.ShardWriter, "append", 2),  # inside the first shards
    (publish, "write_manifest", 1),  # shards in place, no manifest
    (publish, "sync", 1),  # published, but not cleaned up
]:
    if moment[1] == "_write":  # another plan's leftovers, which must not be used
        assert prepared_by_a_child(*moment, seed=5) == -signal.SIGKILL
    assert prepared_by_a_child(*moment) == -signal.SIGKILL, moment
    assert os.path.exists("store") == (moment[1] == "sync"), moment
    if moment[1] == "_write":
        assert sorted(os.listdir(".prepare-store/runs"))[-1] == "00000"
        with open(".prepare-store/runs/00000/run-0.genes", "r+b") as file:  # a damaged leftover
            byte = file.read(1)
            file.seek(0)
            file.write(bytes([byte[0] ^ 1]))
"""

REUSED = SETTINGS + """
import os, signal
from scbench.data import scatter
work = scatter._scatter
calls = []
def counted(*arguments):
    calls.append(1)
    return work(*arguments)
scatter._scatter = counted
prepare.prepare(INPUTS, "store", workers=1)
print(len(calls))
"""


@pytest.fixture
def folder(write_cells, tmp_path):
    """A folder with two inputs; the store of an undisturbed run lies beside it, under `fresh`."""
    from scbench import prepare
    from scbench.data import plan as plan_module

    rng = np.random.default_rng(0)
    for name in ("a.h5ad", "b.h5ad"):
        write_cells(name, rng.poisson(1.0, (350, 40)))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(plan_module, "SHARD_CELLS", 150)
        prepare([tmp_path / "a.h5ad", tmp_path / "b.h5ad"], tmp_path / "fresh", workers=1)
    return tmp_path


def digest(store: Path) -> dict[str, str]:
    files = sorted(path for path in store.rglob("*") if path.is_file())
    return {str(path.relative_to(store)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def test_killed_at_five_moments(folder, run_python):
    (folder / "killed.py").write_text(KILLED)
    done = run_python(folder / "killed.py", cwd=folder)
    assert done.returncode == 0, done.stderr
    assert digest(folder / "store") == digest(folder / "fresh")


def test_killed_with_workers(folder, run_python):
    """The parent of two workers dies by SIGKILL: the workers go too, and the next run uses the parts that they finished."""
    (folder / "run.py").write_text(SETTINGS + 'prepare.prepare(INPUTS, "store", workers=2)\n')
    process = subprocess.Popen([sys.executable, "run.py"], cwd=folder, start_new_session=True)
    deadline = time.monotonic() + 60
    runs = folder / ".prepare-store" / "runs"
    while not list(runs.glob("0*")) and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.002)
    process.send_signal(signal.SIGKILL)
    process.wait()
    deadline = time.monotonic() + 10
    while (left := _session(process.pid)) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not left
    finished = len(list(runs.glob("0*")))
    assert finished and not (folder / "store").exists()
    (folder / "again.py").write_text(REUSED)
    done = run_python(folder / "again.py", cwd=folder)
    assert int(done.stdout) == 8 - finished, done.stderr
    assert digest(folder / "store") == digest(folder / "fresh")
    assert not (folder / ".prepare-store").exists()


def _session(leader: int) -> list[int]:
    """Live processes of the session that `leader` started."""
    found = []
    for entry in Path("/proc").glob("[0-9]*"):
        try:
            state, _, _, session = (entry / "stat").read_text().rpartition(")")[2].split()[:4]
        except OSError:
            continue
        if int(session) == leader and state != "Z":
            found.append(int(entry.name))
    return found


def test_two_at_once(folder, run_python):
    """A second prepare of the same store is told about the first."""
    import fcntl

    from scbench import prepare
    from scbench.errors import UserError

    (folder / ".prepare-store").mkdir()
    with open(folder / ".prepare-store" / "lock", "w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        with pytest.raises(UserError, match="another scbench prepare or merge is making this store"):
            prepare([folder / "a.h5ad"], folder / "store", workers=1)
    assert os.path.exists(folder / ".prepare-store" / "lock")
