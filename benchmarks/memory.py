"""The memory of an implementation: the peak of a process that runs nothing else."""

import multiprocessing
import os

import machine
from cells import load_batches
from implementations import DROPOUT, PRECISION, build, initial_weights
from options import Options

STEPS = 2  # the optimizer's state exists from the first on


def measure(name: str, options: Options) -> int | None:
    """Peak bytes of a fresh process that trains `name` for two steps; Python and torch themselves are included."""
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        return pool.apply(_peak_of, (name, options))


def _peak_of(name: str, options: Options) -> int | None:
    os.environ.pop("RANK", None)  # not a rank of the parent's group: it starts its own
    vocabulary, batches = load_batches(options, 1)
    weights = initial_weights(options, vocabulary)
    step = build(name, weights, options, vocabulary, precision=PRECISION[name], dropout=DROPOUT, device=machine.device())
    del weights
    batch = step.prepare(batches[0])
    for _ in range(STEPS):
        step.forward_backward(batch)
        step.update()
    return machine.peak_bytes()
