"""kill -9 of everything at ten random moments of prepare and merge, each run again: the store of an undisturbed run."""

import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import anndata
import pytest
from sources.conftest import census  # noqa: F401 - a fixture

from scbench import Store, Vocabulary
from scbench.data.gene_identity import gene_keys, identify

DATA = os.environ.get("SCBENCH_TEST_DATA")
KILLS = 10
SCRIPT = """
from scbench.data import merge, plan, prepare
plan.SHARD_CELLS, plan.TASK_CELLS = {shard_cells}, {task_cells}
{call}
"""

pytestmark = pytest.mark.full
needs_cells = pytest.mark.skipif(DATA is None, reason="SCBENCH_TEST_DATA is not set: no real cells")


class Job:
    """A script that makes the store `store` of its folder, each time in a process group of its own."""

    def __init__(self, folder: Path, call: str, *, shard_cells: int = 4096, task_cells: int = 1024):
        self.folder, self.store = folder, folder / "store"
        folder.mkdir(exist_ok=True)
        (folder / "job.py").write_text(SCRIPT.format(call=call, shard_cells=shard_cells, task_cells=task_cells))

    def run(self, kill_after: float | None = None) -> float | None:
        """Seconds that it took; None if it was killed after `kill_after` seconds."""
        start = time.monotonic()
        process = subprocess.Popen([sys.executable, "job.py"], cwd=self.folder, start_new_session=True)
        try:
            code = process.wait(timeout=kill_after)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
            return None
        assert code == 0
        return time.monotonic() - start

    def survives_kills(self, fresh: "Job", seed: int) -> None:
        """KILLS kills at moments drawn over the time that `fresh` takes; every store that comes out is the one of `fresh`."""
        seconds = fresh.run()
        expected = Store.open(fresh.store).fingerprint
        moments = random.Random(seed)
        kills, done = 0, False
        while kills < KILLS or not done:
            after = moments.uniform(0, seconds)
            done = self.run(after if kills < KILLS else None) is not None
            if done:  # what earlier runs had finished was used again, so it was fast
                assert Store.open(self.store).fingerprint == expected
                subprocess.run(["rm", "-r", self.store], check=True)
            else:
                kills += 1
                if self.store.exists():  # between the rename and the end
                    assert Store.open(self.store).fingerprint == expected
                    subprocess.run(["rm", "-r", self.store], check=True)
        assert not [path for path in self.folder.iterdir() if path.name.startswith(".")]


@pytest.fixture(scope="module")
def real_cells(tmp_path_factory) -> tuple[list[str], str]:
    """Paths of 12,407 real cells in three h5ad files, one of them by columns, and of a vocabulary of their genes."""
    folder = tmp_path_factory.mktemp("cells")
    files = [f"{DATA}/{name}.h5ad" for name in ("pbmc3k", "onek1k_1000g")]
    adata = anndata.read_h5ad(f"{DATA}/pbmc_donorA.h5ad")
    adata[:1896].copy().write_h5ad(folder / "rows.h5ad")
    adata.X = adata.X.tocsc()
    adata.write_h5ad(folder / "columns.h5ad")
    files.append(str(folder / "columns.h5ad"))
    keys = set()
    for file in files:
        var = anndata.read_h5ad(file, backed="r").var
        keys |= set(gene_keys(identify(var.index, var, None, file)))
    Vocabulary.build(keys - {""}).save(folder / "vocabulary.json")
    return files, str(folder / "vocabulary.json")


@needs_cells
def test_files(real_cells, tmp_path):
    call = f"prepare.prepare({real_cells[0]}, 'store', workers=2)"
    Job(tmp_path / "killed", call).survives_kills(Job(tmp_path / "fresh", call), seed=1)


def test_census(census, tmp_path):  # noqa: F811
    call = f"prepare.prepare('census:{census[0]}', 'store', workers=2, split='.5,.5,0')"
    sizes = {"shard_cells": 80, "task_cells": 40}
    Job(tmp_path / "killed", call, **sizes).survives_kills(Job(tmp_path / "fresh", call, **sizes), seed=2)


@needs_cells
def test_a_part(real_cells, tmp_path):
    call = f"prepare.prepare({real_cells[0]}, 'store', workers=2, part='2/3', vocabulary={real_cells[1]!r})"
    Job(tmp_path / "killed", call).survives_kills(Job(tmp_path / "fresh", call), seed=3)


@needs_cells
def test_merge(real_cells, tmp_path):
    files = [*real_cells[0], str(Path(real_cells[1]).parent / "rows.h5ad")]  # copies of cells of another part
    for i in (1, 2, 3):
        Job(tmp_path / f"part-{i}", f"prepare.prepare({files}, 'store', workers=2, part='{i}/3', "
            f"vocabulary={real_cells[1]!r})").run()
    call = f"merge.merge({[str(tmp_path / f'part-{i}' / 'store') for i in (1, 2, 3)]}, 'store')"
    fresh = Job(tmp_path / "fresh", call)
    Job(tmp_path / "killed", call).survives_kills(fresh, seed=4)
    assert sum(source["dropped"]["duplicates"] for source in Store.open(fresh.store).manifest["sources"]) >= 1896
