"""A rank that dies, or stops by an error of its own, ends the others at once with a sentence that names it."""

import re
import signal
import time

import pytest

OPTIONS = ["--width", "16", "--layers", "1", "--heads", "2", "--max-genes", "40", "--batch-cells", "32", "--steps", "100000",
           "--checkpoint-every", "5", "--validate-every", "100000", "--validation-cells", "1"]
WORKER = """
import os, sys
from scbench.training import pretrain as module
from scbench.cli import run
real, steps = module.backward, []
def backward(*arguments):
    steps.append(1)
    if len(steps) == 4 and os.environ["RANK"] == "1":
        {what}
    return real(*arguments)
module.backward = backward
sys.argv = ["scbench", "pretrain", *sys.argv[1:]]
run()
"""


@pytest.mark.parametrize(("world", "victim"), [
    (3, 2),
    pytest.param(2, 0, marks=pytest.mark.full),
    pytest.param(3, 1, marks=pytest.mark.full),
    pytest.param(4, 0, marks=pytest.mark.full),
])
def test_kill_9_of_a_rank_ends_the_others_and_names_it(start_ranks, small_store, tmp_path, world, victim):
    ranks = start_ranks(world, small_store, "-o", tmp_path / "run", *OPTIONS)
    ranks.wait_for_step(7)
    ranks[victim].kill()
    killed = time.monotonic()
    codes, said = ranks.finish(timeout=30)
    assert time.monotonic() - killed < 30
    assert codes == [-signal.SIGKILL if rank == victim else 1 for rank in range(world)]
    for rank in set(range(world)) - {victim}:
        assert re.search(rf"scbench: rank {victim} \(.*\) died: the run ends; go on from its last", said[rank]), said
        assert str(ranks[victim].pid) in said[rank] or victim == 0
    assert any((tmp_path / "run" / "checkpoints").glob("step-*"))


@pytest.mark.full
def test_an_error_of_one_rank_is_told_to_the_others(start_ranks, small_store, tmp_path):
    """Here memory runs out on rank 1; the others would wait for it in a collective."""
    script = tmp_path / "worker.py"
    script.write_text(WORKER.format(what='import torch; torch.empty(2**55, dtype=torch.uint8)'))
    ranks = start_ranks(3, small_store, "-o", tmp_path / "run", *OPTIONS, command=[script])
    codes, said = ranks.finish()
    assert codes == [1, 2, 1]
    assert re.search(r"^scbench: rank 1 is out of memory \(.*--micro-batch-cells 5 ", said[1], re.M)
    assert re.search(r"^scbench: rank 1 \(process \d+ on .*\) stopped: rank 1 is out of memory", said[0], re.M)
    assert re.search(r"^scbench: rank 1 \(process \d+ on .*\) stopped: rank 1 is out of memory", said[2], re.M)


@pytest.mark.full
def test_an_error_of_all_ranks_is_said_by_each_as_it_is(start_ranks, small_store, tmp_path):
    ranks = start_ranks(2, small_store, "-o", tmp_path / "run", *OPTIONS, "--batch-cells", "1")
    codes, said = ranks.finish()
    assert codes == [2, 2]
    assert all("scbench: --batch-cells 1 is less than one cell for each of the 2 ranks." in words for words in said)


@pytest.mark.full
def test_a_refusal_by_rank_0_ends_the_others_too(start_ranks, small_store, tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "mine").write_text("precious")
    codes, said = start_ranks(2, small_store, "-o", tmp_path / "run", *OPTIONS).finish()
    assert codes == [2, 1]
    assert all("exists already" in words for words in said)


@pytest.mark.full
def test_a_rank_that_hangs_ends_the_run_after_the_timeout(start_ranks, small_store, tmp_path):
    script = tmp_path / "worker.py"
    script.write_text(WORKER.format(what='import time; time.sleep(1000)'))
    ranks = start_ranks(2, small_store, "-o", tmp_path / "run", *OPTIONS, "--timeout", "8", command=[script])
    _, said = ranks[0].communicate(timeout=300)
    assert ranks[0].returncode == 1
    assert "imed out" in said or "imeout" in said
    assert ranks[1].wait(timeout=30) == 1  # rank 0 told it
