"""The documented launch commands, run as documented, against one process."""

import json
import os
import re
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import pytest

from scbench.cli import parse
from scbench.training import launchers
from scbench.training.telemetry import OF_THE_MACHINE

BIN = Path(sys.executable).parent
OPTIONS = ["--width", "16", "--layers", "1", "--heads", "2", "--max-genes", "40", "--batch-cells", "32", "--steps", "20",
           "--optimizer", "sgd", "--lr", "0.02", "--precision", "fp32"]
LAUNCHERS = {
    "alone": [sys.executable, "-m", "scbench"],
    "torchrun": [BIN / "torchrun", "--standalone", "--nproc-per-node", "2", "-m", "scbench"],
    "deepspeed": [BIN / "deepspeed", "--num_accelerators", "2", "--master_port", "29671", "--module", "scbench"],
}


def free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


def read_rows(run: Path) -> list[dict]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def pretrain(launcher: str, store: Path, output: Path, *more: str) -> list[dict]:
    command = [*map(str, LAUNCHERS[launcher]), "pretrain", str(store), "-o", str(output), *OPTIONS, *more]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PATH": f"{BIN}:{os.environ['PATH']}"}
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, env=environment)
    assert done.returncode == 0, done.stderr[-3000:]
    rows = read_rows(output)
    shutil.rmtree(output)
    return rows


def assert_same_rows(rows: list[dict], expected: list[dict]) -> None:
    """But for how evenly the ranks share the work, and what depends on the machine."""
    assert [row["step"] for row in rows] == [row["step"] for row in expected]
    for row, one in zip(rows, expected, strict=True):
        for name in one.keys() - {*OF_THE_MACHINE, "token_imbalance"}:
            assert row[name] == pytest.approx(one[name], rel=1e-4, abs=1e-7), (row["step"], name)


@pytest.fixture(scope="module")
def alone(small_store, tmp_path_factory):
    return pretrain("alone", small_store, tmp_path_factory.mktemp("alone") / "run")


@pytest.mark.full
@pytest.mark.parametrize(("launcher", "stage"), [("torchrun", 2), *(("deepspeed", stage) for stage in range(4))])
def test_two_ranks_train_as_one_process_does(small_store, tmp_path, alone, launcher, stage):
    rows = pretrain(launcher, small_store, tmp_path / "run", "--deepspeed", f"zero{stage}", "--micro-batch-cells", "8")
    assert_same_rows(rows, alone)


@pytest.mark.full
def test_two_hosts_of_two_ranks_by_a_hostfile(small_store, tmp_path, alone):
    """DeepSpeed's launcher once a node, as without ssh between them; both hosts are this one."""
    hostfile = tmp_path / "hosts"
    hostfile.write_text("127.0.0.1 slots=2\n127.0.0.2 slots=2\n")
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PATH": f"{BIN}:{os.environ['PATH']}"}
    output, port = tmp_path / "run", str(free_port())
    nodes = [
        subprocess.Popen(
            [*map(str, [BIN / "deepspeed", "--hostfile", hostfile, "--no_ssh", "--node_rank", node,
                        "--master_addr", "127.0.0.1", "--master_port", port, "--module", "scbench",
                        "pretrain", small_store, "-o", output]), *OPTIONS,
             "--deepspeed", "zero2", "--micro-batch-cells", "4"],
            env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True,
        )
        for node in (0, 1)
    ]
    said = [process.communicate(timeout=300)[1] for process in nodes]
    assert [process.returncode for process in nodes] == [0, 0], said
    assert json.loads((output / "environment.json").read_text())["world_size"] == 4
    assert_same_rows(read_rows(output), alone)


SLURM = {"SLURM_JOB_ID": "4711", "SLURM_STEP_ID": "0", "SLURM_NTASKS": "2", "SLURM_NNODES": "1"}


@pytest.mark.full
def test_srun_is_read_from_what_it_sets(small_store, tmp_path, alone):
    """There is no SLURM here: its variables as srun sets them, with neither MASTER_ADDR nor MASTER_PORT."""
    environment = {**os.environ, **SLURM, "OMP_NUM_THREADS": "1"}
    command = [*LAUNCHERS["alone"], "pretrain", str(small_store), "-o", str(tmp_path / "run"), *OPTIONS]
    tasks = [subprocess.Popen(command, env={**environment, "SLURM_PROCID": str(task), "SLURM_LOCALID": str(task)},
                              stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True) for task in (0, 1)]
    said = [task.communicate(timeout=300)[1] for task in tasks]
    assert [task.returncode for task in tasks] == [0, 0], said
    assert_same_rows(read_rows(tmp_path / "run"), alone)


def test_the_place_of_a_task_of_srun(tmp_path, monkeypatch):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    task = {**SLURM, "SLURM_PROCID": "5", "SLURM_LOCALID": "1", "SLURM_NTASKS": "8", "SLURM_NNODES": "2",
            "SLURM_STEP_NODELIST": "gpu[07-08]"}
    other = {**task, "SLURM_PROCID": "0", "SLURM_LOCALID": "0"}
    for environment in (task, other):
        launchers.prepare(environment)
    assert (task["RANK"], task["LOCAL_RANK"], task["WORLD_SIZE"], task["MASTER_ADDR"]) == ("5", "1", "8", "gpu07")
    assert task["MASTER_PORT"] == other["MASTER_PORT"] and 15_000 <= int(task["MASTER_PORT"]) < 30_000
    later = {**SLURM, "SLURM_PROCID": "0", "SLURM_LOCALID": "0", "SLURM_JOB_ID": "4712"}
    launchers.prepare(later)
    assert later["MASTER_ADDR"] == "127.0.0.1" and later["MASTER_PORT"] != task["MASTER_PORT"]
    given = {**SLURM, "SLURM_PROCID": "0", "SLURM_LOCALID": "0", "MASTER_ADDR": "head", "MASTER_PORT": "1234"}
    launchers.prepare(given)
    assert (given["MASTER_ADDR"], given["MASTER_PORT"]) == ("head", "1234")


@pytest.mark.parametrize(("nodes", "first"), [("node1", "node1"), ("node[3,5-7],x2", "node3"), ("a,b", "a"),
                                              ("r1c[01-04]-ib0", "r1c01-ib0")])
def test_the_first_host_of_a_list(nodes, first):
    assert launchers.first_host({"SLURM_NNODES": "2", "SLURM_NODELIST": nodes}) == first


@pytest.mark.parametrize("environment", [{}, {"SLURM_PROCID": "0", "SLURM_NTASKS": "1"}])
def test_alone_and_in_a_job_of_one_task_nothing_is_set(environment):
    before = dict(environment)
    launchers.prepare(environment)
    assert environment == before


def test_compiled_code_goes_to_the_nodes_own_disk(tmp_path, monkeypatch):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    environment = {"RANK": "0", "TRITON_CACHE_DIR": "/mine"}
    launchers.prepare(environment)
    folder = tmp_path / f"scbench-{os.getuid()}"
    assert environment == {"RANK": "0", "TRITON_CACHE_DIR": "/mine", "TORCH_EXTENSIONS_DIR": str(folder / "torch_extensions")}
    assert folder.stat().st_mode & 0o777 == 0o700
    folder.chmod(0o777)  # another user could put code there
    environment = {"RANK": "0"}
    launchers.prepare(environment)
    assert environment == {"RANK": "0"}


def test_a_port_that_is_taken_is_said(small_store, tmp_path):
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        port = str(other.getsockname()[1])
        environment = {**os.environ, "RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1",
                       "MASTER_PORT": port, "OMP_NUM_THREADS": "1"}
        command = [*LAUNCHERS["alone"], "pretrain", str(small_store), "-o", str(tmp_path / "run"), *OPTIONS]
        done = subprocess.run(command, capture_output=True, text=True, timeout=120, env=environment)
    assert done.returncode == 2
    assert f"port {port} of 127.0.0.1 is taken, perhaps by another run" in done.stderr


@pytest.mark.full
def test_two_runs_at_once_on_one_machine_do_not_meet(small_store, tmp_path, alone):
    command = [*map(str, LAUNCHERS["torchrun"]), "pretrain", str(small_store), *OPTIONS]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    runs = [subprocess.Popen([*command, "-o", str(tmp_path / name)], env=environment, stdout=subprocess.DEVNULL,
                             stderr=subprocess.PIPE, text=True) for name in ("a", "b")]
    said = [run.communicate(timeout=300)[1] for run in runs]
    assert [run.returncode for run in runs] == [0, 0], said
    for name in ("a", "b"):
        assert_same_rows(read_rows(tmp_path / name), alone)


@pytest.mark.full
@pytest.mark.parametrize(("launcher", "code"), [("torchrun", 1), ("deepspeed", -signal.SIGTERM)])
def test_sigterm_to_the_process_group_of_a_launcher(launcher, code, small_store, tmp_path):
    """The ranks save and leave, whatever the launcher itself makes of it: deepspeed dies by the signal (143 in a shell)."""
    command = [*map(str, LAUNCHERS[launcher]), "pretrain", str(small_store), "-o", str(tmp_path / "run"), *OPTIONS[:-8],
               "--steps", "100000"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PATH": f"{BIN}:{os.environ['PATH']}"}
    run = subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
                           start_new_session=True)
    metrics = tmp_path / "run" / "metrics.jsonl"
    while not (metrics.is_file() and '"step": 3,' in metrics.read_text()):
        assert run.poll() is None, run.stdout.read()
        time.sleep(0.05)
    os.killpg(run.pid, signal.SIGTERM)
    said = run.communicate(timeout=120)[0]
    assert run.returncode == code, said
    assert "stopped by SIGTERM after step" in said
    (saved,) = (tmp_path / "run" / "checkpoints").glob("step-*")
    assert (saved / "state.json").is_file()


TEMPLATE = Path(__file__).parents[2] / "docs" / "slurm.sbatch"


def test_the_template_for_slurm_is_right(tmp_path):
    """Its shell parses, its options are the command line's, and it requeues on the code of a run that ran out of time."""
    subprocess.run(["bash", "-n", TEMPLATE], check=True)
    text = TEMPLATE.read_text()
    command = re.search(r"srun .*?scbench (pretrain .*?)\n(?!    )", text, re.S)[1].replace("\\\n", " ")
    config = parse([word.replace("$", "") for word in shlex.split(command)])
    assert config.resume and config.time_limit_seconds == 235 * 60 and config.stage_to is not None
    assert re.search(r"--signal=USR1@\d+\b", text) and "#SBATCH --requeue" in text
    folder = tmp_path / "bin"
    folder.mkdir()
    for code, requeued in ((0, False), (75, True), (143, False), (1, False)):
        for name, body in {"srun": f"exit {code}", "scontrol": f"echo $* > {tmp_path}/asked"}.items():
            (folder / name).write_text(f"#!/bin/sh\n{body}\n")
            (folder / name).chmod(0o755)
        environment = {"PATH": f"{folder}:/usr/bin:/bin", "SLURM_JOB_ID": "9"}
        done = subprocess.run(["bash", TEMPLATE, "store", "run"], env=environment)
        assert done.returncode == code
        assert (tmp_path / "asked").exists() == requeued
        if requeued:
            assert (tmp_path / "asked").read_text() == "requeue 9\n"
            (tmp_path / "asked").unlink()


def test_a_mistake_under_a_launcher_is_one_sentence_too(small_store, tmp_path):
    verb = ["pretrain", str(small_store), "-o", str(tmp_path), "--heads", "3"]
    command = [*LAUNCHERS["alone"], "--local_rank=0", *verb]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert done.returncode == 2
    assert done.stderr.count("\n") == 1
