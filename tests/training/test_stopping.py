"""Signals and the time limit: all ranks save after the same step, leave with the documented code, and nothing is lost."""

import itertools
import json
import os
import re
import signal
import time

import pytest
from safetensors.torch import load_file

from scbench import pretrain
from scbench.config import PretrainConfig
from scbench.config.duration import seconds
from scbench.errors import UserError
from scbench.training.stopping import Stopping, exit_code, reason
from scbench.training.telemetry import OF_THE_MACHINE

OPTIONS = ["--width", "16", "--layers", "1", "--heads", "2", "--max-genes", "40", "--batch-cells", "32", "--steps", "60",
           "--checkpoint-every", "1000", "--validate-every", "1000"]


@pytest.mark.parametrize(("text", "expected"), [("3h50m", 13_800), ("90m", 5_400), ("1d12h", 129_600), ("120", 120),
                                                ("7.5s", 7.5)])
def test_lengths_of_time(text, expected):
    assert seconds("--time-limit", text) == expected
    assert PretrainConfig(store="s", output="o", time_limit=text).time_limit_seconds == expected


@pytest.mark.parametrize("text", ["", "0", "soon", "3:50:00", "-5", "h", "50m3h"])
def test_other_words_are_no_length_of_time(text):
    with pytest.raises(UserError, match=r"--time-limit .* is no length of time: write it as 3h50m"):
        PretrainConfig(store="s", output="o", time_limit=text)


def test_what_is_wished():
    with Stopping(None, 0, lag=0) as stop:
        assert stop.wishes() == [0, 0, 0] and reason([0.0, 0.0, 0.0]) is None
        os.kill(os.getpid(), signal.SIGUSR1)
        assert stop.wishes() == [0, 1, 0]
        os.kill(os.getpid(), signal.SIGTERM)
        os.kill(os.getpid(), signal.SIGTERM)
        assert stop.wishes() == [1, 1, 0]
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL
    with pytest.raises(SystemExit), Stopping(None, 0, lag=0):
        raise SystemExit(75)
    os.kill(os.getpid(), signal.SIGTERM)  # on the way out
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    signal.signal(signal.SIGUSR1, signal.SIG_DFL)
    assert (reason([2.0, 1.0, 0.0]), exit_code("SIGTERM")) == ("SIGTERM", 143)
    assert (reason([0.0, 3.0, 1.0]), exit_code("SIGUSR1")) == ("SIGUSR1", 75)
    assert (reason([0.0, 0.0, 1.0]), exit_code("--time-limit")) == ("--time-limit", 75)


def test_the_limit_leaves_room_for_a_checkpoint_a_validation_and_the_steps_under_way(monkeypatch):
    now = [1000.0]
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    monkeypatch.setattr("scbench.training.stopping._process_start", lambda: 900.0)

    def first_late(**took) -> float:
        """The age of the process at which a run of 1-second steps is late, its limit being 1,000 seconds."""
        stop, now[0] = Stopping(1000.0, 12 * 10**8, lag=took.pop("lag", 0)), 1000.0
        for name, values in took.items():
            for value in values:
                getattr(stop, name)(value)
        while not stop.wishes()[2]:
            now[0] += 1.0
        return now[0] - 900.0

    assert first_late() == 1000 - 5 - 12 - 1  # 100 MB a second and 5 seconds, until one was timed
    assert first_late(saved=[30.0]) == 1000 - 30 - 1
    assert first_late(saved=[40.0, 30.0], validated=[60.0]) == 1000 - 40 - 60 - 1
    assert first_late(saved=[30.0], lag=8) == 1000 - 30 - 9


@pytest.mark.parametrize(("world", "number", "code"), [
    pytest.param(1, signal.SIGUSR1, 75, marks=pytest.mark.full),
    (2, signal.SIGTERM, 143),
    pytest.param(1, signal.SIGTERM, 143, marks=pytest.mark.full),
    pytest.param(3, signal.SIGUSR1, 75, marks=pytest.mark.full),
])
def test_a_signal_to_one_rank_saves_and_ends_all_after_the_same_step(start_ranks, small_store, tmp_path, world, number, code):
    run = tmp_path / "run"
    ranks = start_ranks(world, small_store, "-o", run, *OPTIONS)
    ranks.wait_for_step(3)
    for _ in range(20):  # signals while it saves change nothing
        ranks[world - 1].send_signal(number)
        time.sleep(0.005)
        if ranks[world - 1].poll() is not None:
            break
    codes, said = ranks.finish()
    assert codes == [code] * world, said
    step = int(re.search(rf"stopped by {signal.Signals(number).name} after step (\d+): go on with --resume", said[0])[1])
    (saved,) = (run / "checkpoints").iterdir()
    assert saved.name == f"step-{step:08d}" and json.loads((saved / "state.json").read_text())["step"] == step
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == list(range(1, step + 1))


@pytest.mark.full
def test_a_limit_of_time_is_kept_run_after_run_and_nothing_is_lost(start_ranks, small_store, tmp_path):
    """Sixty steps in runs that may each take some seconds, against one run."""
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    assert start_ranks(2, small_store, "-o", whole, *OPTIONS).finish()[0] == [0, 0]
    codes, runs = None, 0
    while codes != [0, 0]:
        started = time.time()
        codes, said = start_ranks(2, small_store, "-o", parts, *OPTIONS, "--resume", "--time-limit", "12").finish()
        assert codes in ([0, 0], [75, 75]), said
        if codes == [75, 75]:
            assert "stopped by --time-limit after step" in said[0]
        runs += 1
        assert runs < 70 and time.time() - started < 120
    assert runs > 1
    first, second = (load_file(run / "model" / "model.safetensors") for run in (whole, parts))
    assert all((first[name] == second[name]).all() for name in first)


def test_a_validation_that_was_due_when_the_run_stopped_is_made_up_for(small_store, tmp_path, monkeypatch):
    options = {"width": 16, "layers": 1, "heads": 2, "max_genes": 40, "batch_cells": 32, "steps": 6, "validate_every": 2,
               "validation_cells": 5, "checkpoint_every": 100}
    whole = pretrain(small_store, tmp_path / "whole", **options)
    with monkeypatch.context() as patch:
        calls = itertools.count(1)
        patch.setattr(Stopping, "wishes", lambda stop: [0.0, float(next(calls) == 4), 0.0])
        with pytest.raises(SystemExit) as left:
            pretrain(small_store, tmp_path / "cut", **options)
    assert left.value.code == 75
    for _ in range(2):  # the second time it is on record
        pretrain(small_store, tmp_path / "cut", **options, resume=True)
    rows = [[{name: value for name, value in json.loads(line).items() if name not in OF_THE_MACHINE}
             for line in (run / "metrics.jsonl").read_text().splitlines()] for run in (whole.directory, tmp_path / "cut")]
    assert rows[0] == rows[1]
