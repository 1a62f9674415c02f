"""The memory of an implementation: the peak of a process that runs nothing else."""

import multiprocessing
import os

import machine
from cells import batches_to_embed, load_batches, vocabulary_of
from implementations import DROPOUT, build, initial_weights, precision_of
from options import Options, Task

STEPS = 2  # the optimizer's state exists from the first on


def measure(name: str, task: Task, options: Options) -> int | None:
    """Peak bytes of a fresh process that trains or embeds twice; Python and torch themselves are included."""
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        return pool.apply(_peak_of, (name, task, options))


def _peak_of(name: str, task: Task, options: Options) -> int | None:
    os.environ.pop("RANK", None)  # not a rank of the parent's group: it starts its own
    vocabulary = vocabulary_of(options)
    weights = initial_weights(options, vocabulary, "aaai2025" if name == "reference" else "default")
    step = build(name, task, weights, options, vocabulary, precision=precision_of(name), dropout=DROPOUT,
                 device=machine.device())
    del weights
    [batch] = batches_to_embed(options, vocabulary, 1) if task == "embedding" else load_batches(options, 1)[1]
    batch = step.prepare(batch)
    for _ in range(STEPS):
        if task == "embedding":
            step.embed(batch)
        else:
            step.forward_backward(batch)
            step.update()
    return machine.peak_bytes()
