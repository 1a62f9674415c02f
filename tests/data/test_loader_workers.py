"""Worker processes of the loader: the same windows with any number of them, their errors, and that none is left."""

import gc
import itertools
import multiprocessing
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from fake_split import OPTIONS, VOCABULARY, FakeSplit, cells_of, windows
from test_loader_reading import written

from scbench.data.drawing import Share, joined
from scbench.data.loader import Loader
from scbench.data.sampler import CellSampler
from scbench.data.workers import WorkerKilledError
from scbench.errors import UserError


def records(loaded) -> list[list]:
    return [[cells_of(batch) for batch in window] for window in loaded]


def runs(pid: int) -> bool:
    try:
        return "(zombie)" not in Path(f"/proc/{pid}/status").read_text()
    except OSError:
        return False


def gone(pids: list[int]) -> bool:
    """Whether the processes end within twenty seconds."""
    deadline = time.monotonic() + 20
    while any(map(runs, pids)) and time.monotonic() < deadline:
        time.sleep(0.05)
    return not any(map(runs, pids))


def test_the_windows_are_those_without_workers(tmp_path):
    """Three workers on a rank, and a run that goes on with another number."""
    split = written(FakeSplit(700, 128, (0, 60)), tmp_path, [300, 400], blocks_per_extent=2)
    options = {"batch_cells": 25, "rank": 1, "world": 2}
    expected = records(windows(split, 40, **options))
    with Loader(split, VOCABULARY, **OPTIONS | options, workers=3) as loader:
        assert records(itertools.islice(loader, 40)) == expected
        assert loader.state() == {"step": 40}
        assert len(multiprocessing.active_children()) == 3
    assert not multiprocessing.active_children()
    with Loader(split, VOCABULARY, **OPTIONS | options, workers=1, start_step=17) as loader:
        assert records(itertools.islice(loader, 23)) == expected[17:]


@pytest.mark.parametrize("workers", [1, 2, 3, 5])
@pytest.mark.parametrize("world", [1, 2, 3, 4, 8])
@pytest.mark.parametrize("batch_cells", [8, 24, 29])
def test_slices_nest_in_slices(batch_cells, world, workers):
    """What workers of a rank draw, joined, is what the rank draws; also where they are more than its cells."""
    split = FakeSplit(560, 64)
    sampler = CellSampler(VOCABULARY, OPTIONS["inputs"], seed=7, mask_ratio=0.4, weighted_share=0.5)
    for rank in {0, world // 2, world - 1}:
        shares = [Share(split, sampler, 7, 3, batch_cells, rank * workers + i, world * workers) for i in range(workers)]
        whole = Share(split, sampler, 7, 3, batch_cells, rank, world)
        for *parts, expected in itertools.islice(zip(*(share.drawn(20) for share in [*shares, whole]), strict=True), 5):
            found = joined(parts)
            assert found.samples.tolist() == expected.samples.tolist() and found.numbers.tolist() == expected.numbers.tolist()
            for name, array in found.sampled._asdict().items():
                assert array.tolist() == getattr(expected.sampled, name).tolist(), name


@pytest.mark.full
@pytest.mark.parametrize(("world", "workers"), [(1, 3), (2, 3), (3, 1), (4, 3), (8, 1)])
def test_any_number_of_ranks_and_workers(tmp_path, world, workers):
    split = written(FakeSplit(700, 128, (0, 60)), tmp_path, [300, 400], blocks_per_extent=2)
    (whole,) = zip(*windows(split, 30, micro_batch_cells=None), strict=True)
    shares = [windows(split, 30, micro_batch_cells=None, rank=rank, world=world, workers=workers) for rank in range(world)]
    for step, batch in enumerate(whole):
        assert [record for share in shares for record in cells_of(share[step][0])] == cells_of(batch)


def test_a_killed_worker_ends_the_loader_with_its_name():
    with Loader(FakeSplit(560, 64), VOCABULARY, **OPTIONS, workers=2) as loader:
        next(loader)
        victim = next(child for child in multiprocessing.active_children() if child.name == "loader worker 1 of 2")
        os.kill(victim.pid, signal.SIGTERM)  # asks a run for a checkpoint: workers go on
        next(loader)
        victim.kill()
        with pytest.raises(WorkerKilledError, match=r"loader worker 1 of 2 \(process \d+\) was killed"):
            for _ in loader:
                pass
    assert issubclass(WorkerKilledError, UserError) and not multiprocessing.active_children()


def test_what_a_worker_raises_comes_with_its_name(tmp_path):
    split = written(FakeSplit(300, 64, (1, 60)), tmp_path, [300], blocks_per_extent=1)
    (chunk,) = (tmp_path / "shard-00000" / "counts" / "c").iterdir()
    content = bytearray(chunk.read_bytes())
    content[len(content) // 2] ^= 1
    chunk.write_bytes(content)
    with pytest.raises(UserError, match=r"^loader worker [01] of 2: block 2 of .*shard-00000 is damaged"):
        windows(split, 100, workers=2)
    broken = FakeSplit(64, 64)
    broken.genes = None
    with pytest.raises(TypeError, match="not subscriptable") as caught:
        windows(broken, 1, workers=1)
    assert "In loader worker 0 of 1" in caught.value.__notes__[0] and "read_extent" in caught.value.__notes__[0]
    assert not multiprocessing.active_children()


def test_a_forgotten_loader_leaves_no_process():
    loader = Loader(FakeSplit(560, 64), VOCABULARY, **OPTIONS, workers=1)
    next(loader)
    (worker,) = multiprocessing.active_children()
    del loader
    gc.collect()
    assert gone([worker.pid])


PARENT = f"""
import multiprocessing, os, sys, time
sys.path.insert(0, {str(Path(__file__).parent)!r})
from fake_split import OPTIONS, VOCABULARY, FakeSplit
from scbench.data.loader import Loader
loader = Loader(FakeSplit(560, 64), VOCABULARY, **OPTIONS, workers=2)
next(loader)
print(*(child.pid for child in multiprocessing.active_children()), flush=True)
if sys.argv[1] == "sleep":
    time.sleep(100)
"""  # no `if __name__`: what a user may write


@pytest.mark.full
@pytest.mark.parametrize("ending", ["sleep", "exit"])
def test_workers_end_with_their_parent(tmp_path, ending):
    script = tmp_path / "script.py"
    script.write_text(PARENT)
    with subprocess.Popen([sys.executable, script, ending], stdout=subprocess.PIPE, text=True) as parent:
        pids = [int(pid) for pid in parent.stdout.readline().split()]
        assert len(pids) == 2
        if ending == "sleep":
            parent.kill()
        assert gone(pids)
        assert parent.wait(20) == (-signal.SIGKILL if ending == "sleep" else 0)


def test_the_option_is_checked(small_store, tmp_path, scbench_command):
    result = scbench_command("pretrain", small_store, "-o", tmp_path / "run", "--loader-workers", "-1")
    assert result.returncode == 2 and "--loader-workers is -1: it must not be negative." in result.stderr
