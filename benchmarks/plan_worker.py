"""One rank of training steps whose tensor memory is counted; started by plan_check.py.

usage: plan_worker.py SETTINGS.json OUT.json

SETTINGS.json holds a list of cases, each the fields of `Case`; rank 0 writes what each one took.

Counted: what torch's CPU allocator hands out and takes back, every temporary included, by the profiler's memory events, from
before the model is made. gloo's own buffers and Python's memory are not tensors and are not counted.
"""

import dataclasses
import gc
import json
import os
import sys
from dataclasses import dataclass

import numpy as np
import torch
from torch._C._profiler import _EventType
from torch.profiler import ProfilerActivity, profile, record_function

from scbench.config import PretrainConfig
from scbench.data.batch import CellBatch
from scbench.data.vocabulary import Vocabulary
from scbench.models.model import ExpressionModel
from scbench.training import engine as engines
from scbench.training.deepspeed_settings import read_deepspeed_config
from scbench.training.engine import dist
from scbench.training.pretrain import backward

STEPS = 3  # the last one is counted: the optimizer's state and every buffer exists by then
MASK_RATIO = 0.4


@dataclass(frozen=True, kw_only=True)
class Case:
    """A training step to be counted: cells of equal length, the micro-batch of one rank."""

    structure: str
    width: int = 64
    layers: int = 2
    heads: int = 4
    vocabulary_size: int = 2000
    cells: int = 8
    genes: int = 127
    precision: str = "bf16"
    stage: int = 1
    world: int = 1
    micro_steps: int = 1
    dropout: float = 0.15

    def config(self) -> PretrainConfig:
        """The same as a run's options; its store and output are never opened."""
        return PretrainConfig(
            store="none", output="none", structure=self.structure, width=self.width, layers=self.layers, heads=self.heads,
            dropout=self.dropout, max_genes=self.genes, batch_cells=self.cells * self.world * self.micro_steps,
            micro_batch_cells=self.cells, precision=self.precision, deepspeed=f"zero{self.stage}",
        )


def synthetic_batch(case: Case) -> CellBatch:
    """Cells of `case.genes` genes each, 40 % of them masked."""
    rng = np.random.default_rng(0)
    ids = [np.sort(rng.choice(case.vocabulary_size - 3, case.genes, replace=False)) for _ in range(case.cells)]
    masks = [rng.permutation(case.genes) < round(MASK_RATIO * case.genes) for _ in range(case.cells)]
    return CellBatch.from_lists(ids, [np.ones(case.genes)] * case.cells, masks)


def live_bytes(tree: list) -> tuple[np.ndarray, np.ndarray]:
    """Times of all allocations and frees, and the bytes that are live after each: of what was allocated in here. What the case
    before left behind, and Python's garbage collector frees meanwhile, is not counted."""
    stack, changes = list(tree), []
    while stack:
        event = stack.pop()
        stack += event.children
        if event.typed[0] == _EventType.Allocation:
            changes.append((event.start_time_ns, event.typed[1].ptr, event.typed[1].alloc_size))
    changes.sort(key=lambda change: change[0])
    sizes: dict[int, int] = {}
    times, live = [], []
    for time, pointer, size in changes:
        if size > 0:
            sizes[pointer] = size
        elif sizes.pop(pointer, None) is None:
            continue
        times.append(time)
        live.append(size)
    return np.array(times), np.cumsum(live)


def measure(case: Case) -> dict[str, int]:
    """Bytes: `at_rest` between steps, `before_update` once all gradients are there, `peak_gradients` of forward and backward,
    `peak_update` of the optimizer; and `parameters`, a number, as the engine holds them."""
    config, batch = case.config(), synthetic_batch(case)
    vocabulary = Vocabulary.build(f"gene-{i:06d}" for i in range(case.vocabulary_size - 3))
    gc.collect()
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        model = ExpressionModel(config.model(case.vocabulary_size), vocabulary)
        settings, _ = read_deepspeed_config(config, case.micro_steps)
        engine = engines.make_engine(model, config, settings)
        engine.train()
        engines.set_learning_rate(engine, 1e-4)
        denominator = batch.denominator * case.world * case.micro_steps
        for _ in range(STEPS):
            gc.collect()  # else a bucket of the step before, in a cycle, may still be there: up to 20 MB more, now and then
            with record_function("phase: gradients"):
                backward(engine, [batch] * case.micro_steps, denominator)
            with record_function("phase: update"):
                engine.step()
    results = profiler.profiler.kineto_results
    phases = {event.name()[7:]: (event.start_ns(), event.end_ns()) for event in results.events()
              if event.name().startswith("phase: ")}  # the last one of its name stays
    times, live = live_bytes(results.experimental_event_tree())
    inside = {name: live[(times >= start) & (times <= end)] for name, (start, end) in phases.items()}
    parameters = sum(getattr(p, "ds_numel", p.numel()) for p in engine.module.parameters())
    engine.destroy()
    return {"parameters": parameters, "at_rest": int(live[-1]),
            "before_update": int(live[times <= phases["gradients"][1]][-1]),
            "peak_gradients": int(inside["gradients"].max()), "peak_update": int(inside["update"].max())}


def main(settings: str, out: str) -> None:
    rank, _ = engines.start_process_group()
    with open(settings, encoding="utf-8") as file:
        cases = [Case(**fields) for fields in json.load(file)]
    rows = [dataclasses.asdict(case) | {"measured": measure(case)} for case in cases]
    if rank == 0:
        with open(out, "w", encoding="utf-8") as file:
            json.dump(rows, file)
    dist.barrier()


if __name__ == "__main__":
    torch.set_num_threads(1)
    main(*sys.argv[1:])
    os._exit(0)  # as scbench.cli.run: gloo's threads and Python's shutdown do not go together
