"""Training runs through the kernels that SCBENCH_KERNELS names, and what test_triton_steps.py compares.

usage: triton_worker.py STORE OUT RUNS

RUNS: JSON, {name: fields of PretrainConfig}. Writes the run directory OUT/name and beside it the gradients of the first step
(OUT/name.npz) and how often the Triton kernels of each module were launched (OUT/name.json).
"""

import json
import os
import sys
from collections import Counter
from pathlib import Path

import numpy as np
import torch
from triton.runtime.interpreter import GridExecutor

from scbench.training import pretrain as module


def main(store: str, out: Path, runs: dict[str, dict]) -> None:
    gradients, launches = {}, Counter()
    backward, launch = module.backward, GridExecutor.__call__

    def recorded_backward(engine, *arguments):
        parts = backward(engine, *arguments)
        if not gradients:  # of the first step, before the engine clips them
            gradients.update({name: p.grad.numpy().copy() for name, p in engine.module.named_parameters()})
        return parts

    def counted_launch(self, *arguments, **named):
        launches[self.fn.__module__.split(".")[-1]] += 1
        return launch(self, *arguments, **named)

    module.backward, GridExecutor.__call__ = recorded_backward, counted_launch
    for name, options in runs.items():
        gradients.clear()
        launches.clear()
        module.pretrain(store, out / name, **options)
        np.savez(out / f"{name}.npz", **gradients)
        (out / f"{name}.json").write_text(json.dumps(launches))


if __name__ == "__main__":
    torch.set_num_threads(1)
    main(sys.argv[1], Path(sys.argv[2]), json.loads(sys.argv[3]))
    os._exit(0)  # as scbench.cli.run: gloo's threads and Python's shutdown do not go together
