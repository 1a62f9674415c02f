"""Ranks as a launcher starts them, without one: each is a process that a test can signal by itself."""

import os
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest


def free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


class Ranks:
    """The processes of one run of `scbench pretrain`."""

    def __init__(self, processes: list[subprocess.Popen], output: Path):
        self.processes, self.output = processes, output

    def __getitem__(self, rank: int) -> subprocess.Popen:
        return self.processes[rank]

    def wait_for_step(self, step: int) -> None:
        metrics = self.output / "metrics.jsonl"
        for _ in range(30000):
            if metrics.is_file() and f'"step": {step},' in metrics.read_text():
                return
            assert all(process.poll() is None for process in self.processes), self.finish()[1]
            time.sleep(0.01)
        raise AssertionError("the run did not get there")

    def finish(self, timeout: float = 300) -> tuple[list[int], list[str]]:
        """Exit codes and what the ranks said on stderr."""
        said = [process.communicate(timeout=timeout)[1] for process in self.processes]
        return [process.returncode for process in self.processes], said


@pytest.fixture
def start_ranks() -> Callable[..., Ranks]:
    """start_ranks(world, arguments of `scbench pretrain`, command=…): `world` ranks, killed at the end of the test."""
    started = []

    def start(world: int, *arguments, command=("-m", "scbench", "pretrain"), env=None) -> Ranks:
        port = free_port()
        arguments = [str(argument) for argument in arguments]
        output = Path(arguments[arguments.index("-o") + 1])
        processes = []
        for rank in range(world):
            place = {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(world), "MASTER_ADDR": "127.0.0.1",
                     "MASTER_PORT": str(port)} if world > 1 else {}
            environment = {**os.environ, **place, "OMP_NUM_THREADS": "1", **(env or {})}
            processes.append(subprocess.Popen([sys.executable, *map(str, command), *arguments], env=environment, text=True,
                                              stdout=subprocess.DEVNULL, stderr=subprocess.PIPE))
        started.extend(processes)
        return Ranks(processes, output)

    yield start
    for process in started:
        process.kill()
        process.communicate()
