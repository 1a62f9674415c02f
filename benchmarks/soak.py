"""A run that is killed again and again, against the same run left alone.

    python benchmarks/soak.py STORE OUT [--cycles 100] [--seed 0] [--changing] [--precision fp32|bf16]

Each cycle starts the run with --resume and ends it by kill -9 of one rank, by kill -9 of all, by SIGTERM or by SIGUSR1. Which,
at which moment (a quarter at a time of the start-up, the others after a number of steps and up to 50 ms: amid steps,
validations and checkpoints), and with --changing at which ZeRO stage and on how many ranks, is drawn by the seed. After the
last cycle the run may finish. Its rows and its weights are then those of the uninterrupted run: bit for bit at a fixed
topology, else within BAND. Prints one line a cycle, writes OUT/soak.json, and exits with 1 if something was lost.
"""

import argparse
import json
import os
import random
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
from safetensors.numpy import load_file

from scbench.training.telemetry import OF_THE_MACHINE

WAYS = ("kill one", "kill all", "SIGTERM", "SIGUSR1")
# With another topology the same numbers are added in another order; SGD carries that rounding on, Adam would enlarge it where
# gradients are nothing but rounding.
BAND = {"fp32": 1e-4, "bf16": 5e-2}
OPTIONS = ["--width", "16", "--layers", "1", "--heads", "2", "--max-genes", "40", "--batch-cells", "32",
           "--validate-every", "7", "--checkpoint-every", "3", "--keep-last", "2"]
EXITS = {0, 1, 75, 143, -signal.SIGKILL, -signal.SIGTERM, -signal.SIGUSR1}  # before the handlers stand a signal just ends it
PATIENCE = 60  # seconds; ranks that have not met yet wait for each other longer, and a launcher would end them


def start(arguments: list[str], stage: int, world: int) -> list[subprocess.Popen]:
    """One run of `scbench pretrain`, a process a rank."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    ranks = []
    for rank in range(world):
        place = {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(world), "MASTER_ADDR": "127.0.0.1",
                 "MASTER_PORT": port} if world > 1 else {}
        command = [sys.executable, "-m", "scbench", "pretrain", *arguments, "--resume", "--deepspeed", f"zero{stage}"]
        ranks.append(subprocess.Popen(command, env={**os.environ, **place, "OMP_NUM_THREADS": "1"}, stdout=subprocess.DEVNULL,
                                      stderr=subprocess.PIPE, text=True))
    return ranks


def end(ranks: list[subprocess.Popen], way: str, victim: int) -> None:
    """Interrupt a run."""
    if way == "kill all":
        for process in ranks:
            process.kill()
    else:
        number = {"kill one": signal.SIGKILL, "SIGTERM": signal.SIGTERM, "SIGUSR1": signal.SIGUSR1}[way]
        ranks[victim].send_signal(number)


def last_step(run: Path) -> int:
    """The step of the newest checkpoint, 0 without one."""
    return max((int(path.name[5:]) for path in (run / "checkpoints").glob("step-*")), default=0) if run.exists() else 0


def rows(run: Path) -> list[dict]:
    """Of metrics.jsonl, without what depends on the machine; no step twice, none missing."""
    found = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [{name: value for name, value in row.items() if name not in (*OF_THE_MACHINE, "token_imbalance")} for row in found]


def difference(first: Path, second: Path) -> dict[str, float]:
    """Largest relative difference of the rows, and of the weights as a share of each tensor's largest."""
    a, b = rows(first), rows(second)
    if [(row["step"], row.keys()) for row in a] != [(row["step"], row.keys()) for row in b]:
        return {"rows": float("inf"), "weights": float("inf")}
    of_rows = max(abs(x[name] - y[name]) / max(abs(x[name]), 1e-12) for x, y in zip(a, b, strict=True) for name in x)
    x, y = (load_file(run / "model" / "model.safetensors") for run in (first, second))
    of_weights = max(float(np.abs(x[name] - y[name]).max() / max(np.abs(x[name]).max(), 1e-12)) for name in x)
    return {"rows": of_rows, "weights": of_weights}


def wait(ranks: list[subprocess.Popen], run: Path, seconds: float, step: int) -> None:
    """Until so much time has passed, or the run has come to this step, or is over."""
    metrics, until = run / "metrics.jsonl", time.monotonic() + seconds
    old = metrics.stat().st_ino if metrics.is_file() else None  # a run that resumes cuts it back, in a new file
    while time.monotonic() < until and any(process.poll() is None for process in ranks):
        if metrics.is_file() and metrics.stat().st_ino != old and f'"step": {step},' in metrics.read_text():
            return
        time.sleep(0.01)


def soak(store: Path, out: Path, *, cycles: int, seed: int, changing: bool, precision: str, steps: int,
         startup: float) -> dict:
    """Run it all; `startup`: seconds that a run takes until its first step, about."""
    draw = random.Random(seed)
    out.mkdir(parents=True)
    arguments = [str(store), *OPTIONS, "--steps", str(steps), "--precision", precision,
                 *(["--optimizer", "sgd", "--lr", "0.02"] if changing else [])]
    topology = (1, 2)
    whole, cut = out / "whole", out / "cut"
    if any(process.wait() for process in start([*arguments, "-o", str(whole)], *topology)):
        raise SystemExit("the uninterrupted run failed")
    history = []
    for cycle in range(cycles):
        stage, world = (draw.randrange(4), draw.randint(1, 3)) if changing else topology
        way, victim, early = draw.choice(WAYS), draw.randrange(world), draw.random() < 0.25
        moment, extra = draw.uniform(0, startup), draw.uniform(0, 0.05)
        more = draw.randint(1, max(2, 8 * steps // (5 * cycles)))
        done = last_step(cut)
        ranks = start([*arguments, "-o", str(cut)], stage, world)
        wait(ranks, cut, moment if early else 600, steps + 1 if early else done + more)
        time.sleep(extra)
        end(ranks, way, victim)
        deadline, hung = time.monotonic() + PATIENCE, False
        while any(process.poll() is None for process in ranks):
            if time.monotonic() > deadline:
                hung = True
                end(ranks, "kill all", 0)
            time.sleep(0.02)
        said = [process.stderr.read() for process in ranks]
        codes = [process.returncode for process in ranks]
        saved = sorted(path.name for path in (cut / "checkpoints").glob("step-*")) if cut.exists() else []
        history.append({"cycle": cycle, "stage": stage, "ranks": world, "way": way, "rank": victim, "early": early,
                        "exit_codes": codes, "ended_as_by_a_launcher": hung, "step": last_step(cut), "checkpoints": saved})
        print(json.dumps(history[-1]), flush=True)
        if not set(codes) <= EXITS or any("damaged" in words for words in said) or (hung and not early):
            raise SystemExit(f"cycle {cycle} ended in a way that nobody documented:\n" + "\n".join(said))
    stage, world = (draw.randrange(4), draw.randint(1, 3)) if changing else topology
    if any(process.wait() for process in start([*arguments, "-o", str(cut)], stage, world)):
        raise SystemExit("the last run failed")
    found = difference(whole, cut)
    allowed = BAND[precision] if changing else 0.0
    ways = {way: sum(entry["way"] == way for entry in history) for way in WAYS}
    result = {"cycles": cycles, "seed": seed, "changing": changing, "precision": precision, "steps": steps, "ways": ways,
              "difference": found, "allowed": allowed, "nothing_lost": all(value <= allowed for value in found.values())}
    (out / "soak.json").write_text(json.dumps({**result, "history": history}, indent=1) + "\n")
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("store", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--cycles", type=int, default=100)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--changing", action="store_true", help="draw stage and ranks anew each time")
    parser.add_argument("--precision", choices=BAND, default="fp32")
    parser.add_argument("--steps", type=int, default=600)
    parser.add_argument("--startup", type=float, default=12.0, help="seconds that a run takes until its first step, about")
    arguments = parser.parse_args()
    if arguments.out.exists():
        shutil.rmtree(arguments.out)
    result = soak(**vars(arguments))
    print(json.dumps(result, indent=1))
    raise SystemExit(0 if result["nothing_lost"] else 1)


if __name__ == "__main__":
    main()
