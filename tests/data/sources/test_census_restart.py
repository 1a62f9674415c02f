"""prepare from a census, killed or cut off in the middle and run again: the same bytes, finished parts used again."""

import hashlib
from pathlib import Path

import pytest

from scbench import prepare
from scbench.data import plan as plan_module
from scbench.data import scatter as scatter_module
from scbench.data.sources import census_client, census_selection
from scbench.data.sources.census import CensusSource
from scbench.errors import RetryError

SETTINGS = """
import os, signal

import cellxgene_census  # once, not in every child
from scbench.data import gather, plan, prepare, publish, scatter
plan.SHARD_CELLS, plan.TASK_CELLS = 100, 60


def die_at(module, name, call):
    original, calls = getattr(module, name), []

    def replacement(*arguments, **options):
        calls.append(name)
        if len(calls) == call:
            os.kill(os.getpid(), signal.SIGKILL)
        return original(*arguments, **options)

    setattr(module, name, replacement)


# Forking is safe as long as only the children open a census or use TensorStore.
def prepared_by_a_child(*moment):
    child = os.fork()
    if child == 0:
        die_at(*moment)
        prepare.prepare(CENSUS, "store", workers=1, split=".5,.5,0")
        os._exit(0)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


for moment in [
    (plan, "select_cells", 1),  # before anything is there
    (plan, "check_organisms", 1),  # the cells are chosen
    (scatter, "_write", 3),  # inside the second part
    (gather.ShardWriter, "append", 2),  # inside the first shards
    (publish, "write_manifest", 1),  # shards in place, no manifest
]:
    assert prepared_by_a_child(*moment) == -signal.SIGKILL, moment
    assert not os.path.exists("store"), moment
print(sorted(os.listdir(".prepare-store/runs")))
"""


def digest(store: Path) -> dict[str, str]:
    files = sorted(path for path in store.rglob("*") if path.is_file())
    return {str(path.relative_to(store)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


@pytest.fixture
def folder(census, tmp_path, monkeypatch):
    """A folder with the store of an undisturbed run, `fresh`; parts and shards are small."""
    monkeypatch.setattr(plan_module, "SHARD_CELLS", 100)
    prepare(f"census:{census[0]}", tmp_path / "fresh", workers=1, split=".5,.5,0")
    monkeypatch.setattr(plan_module, "TASK_CELLS", 60)
    return tmp_path


def test_killed_at_five_moments(folder, census, run_python):
    (folder / "killed.py").write_text(f"CENSUS = 'census:{census[0]}'\n" + SETTINGS)
    done = run_python(folder / "killed.py", cwd=folder)
    assert done.returncode == 0, done.stderr
    assert "00004" in done.stdout
    prepare(f"census:{census[0]}", folder / "store", workers=1, split=".5,.5,0")
    assert digest(folder / "store") == digest(folder / "fresh")
    assert not (folder / ".prepare-store").exists()


def test_network_lost_while_looking_at_the_inputs(folder, census, monkeypatch):
    """The list of cells stays, and serves the same request only."""
    with monkeypatch.context() as patch:
        patch.setattr(plan_module, "check_organisms", lambda _: raise_(RetryError("no network")))
        with pytest.raises(RetryError):
            prepare(f"census:{census[0]}", folder / "store", workers=1, split=".5,.5,0")
    (listed,) = (folder / ".prepare-store").glob("soma_joinids-*")
    listed.write_bytes(listed.read_bytes()[:-8] + bytes(8))  # damaged: chosen again
    prepare(f"census:{census[0]}", folder / "store", workers=1, split=".5,.5,0")
    assert digest(folder / "store") == digest(folder / "fresh")


def raise_(error: Exception):
    raise error


def test_network_lost_in_the_middle(folder, census, monkeypatch):
    """What was read stays, and the next run goes on with it."""
    read, scattered = CensusSource.read, []

    def cut_off(self, start, stop):
        with census_client.reading(self._location):
            if start >= 120:
                raise OSError("curl: connection reset by peer")
            return read(self, start, stop)

    def passed(*_, **__):
        pytest.fail("the cells were chosen again")

    with monkeypatch.context() as patch:
        patch.setattr(CensusSource, "read", cut_off)
        with pytest.raises(RetryError, match="cannot be reached: curl: connection reset"):
            prepare(f"census:{census[0]}", folder / "store", workers=1, split=".5,.5,0")
    monkeypatch.setattr(census_selection, "_choose", passed)
    work = scatter_module._scatter
    monkeypatch.setattr(scatter_module, "_scatter", lambda *task: scattered.append(task) or work(*task))
    prepare(f"census:{census[0]}", folder / "store", workers=1, split=".5,.5,0")
    assert len(scattered) == 3  # of five
    assert digest(folder / "store") == digest(folder / "fresh")
