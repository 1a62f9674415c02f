"""One rank of a small training run: SGD steps, and what test_parallel.py compares, written by rank 0.

usage: parallel_worker.py STORE OUT STRUCTURE STEPS STAGE MICRO_BATCH_CELLS MVC [PLANT]
"""

import os
import sys

import numpy as np
import torch
from deepspeed.utils import safe_get_full_grad

from scbench.config import PretrainConfig
from scbench.data.loader import Loader
from scbench.data.store import Store
from scbench.models.model import ExpressionModel
from scbench.training import engine as engines
from scbench.training.deepspeed_settings import read_deepspeed_config
from scbench.training.engine import dist
from scbench.training.pretrain import backward


def main(store_path: str, out: str, structure: str, steps: int, stage: str, micro: str, mvc: str, plant: str = "") -> None:
    rank, world = engines.start_process_group()
    config = PretrainConfig(
        store=store_path, output=out, structure=structure, width=32, layers=2, heads=4, dropout=0.1, max_genes=40,
        batch_cells=32, micro_batch_cells=int(micro), mvc=mvc == "mvc", optimizer="sgd", lr=0.05, clip=0.5, precision="fp32",
        deepspeed=f"zero{stage}", steps=steps,
    )
    store = Store.open(store_path)
    model = ExpressionModel(config.model(store.vocabulary.size), store.vocabulary, config.seed)
    if plant:  # a gradient wrong by half must not go unnoticed
        model.get_parameter(plant).register_hook(lambda gradient: gradient * 0.5)
    with Loader(store.split("train"), store.vocabulary, model.config.inputs, seed=0, batch_cells=32,
                micro_batch_cells=int(micro), mask_ratio=0.4, weighted_share=0.5, lanes=None, rank=rank,
                world=world) as loader:
        settings, _ = read_deepspeed_config(config, loader.micro_steps)
        if stage == "3":
            settings["zero_optimization"]["stage3_param_persistence_threshold"] = 0  # else these small tensors stay whole
        engine = engines.make_engine(model, config, settings)
        engine.train()
        results: dict[str, list | np.ndarray] = {"losses": [], "norms": []}
        for step in range(steps):
            window = next(loader)
            denominator = window[0].denominator.clone()
            dist.all_reduce(denominator)
            parts = backward(engine, window, denominator)
            if step in (0, steps - 1):
                for name, p in engine.module.named_parameters():
                    gradient = safe_get_full_grad(p)
                    results[f"gradient {step} {name}"] = gradient.float().numpy().copy()  # stage 0 clips it in place
            norm = engines.gradient_norm_before_step(engine)
            engine.step()
            norm = engines.gradient_norm(engine) if norm is None else norm
            dist.all_reduce(parts)
            results["losses"].append(parts.tolist())
            results["norms"].append(float(norm))
        for name, kind, tensor in engines.full_state(engine):
            assert kind == "master", "SGD has no moments"
            results[f"parameter {name}"] = tensor.numpy()
    if rank == 0:
        np.savez(out, **results)


if __name__ == "__main__":
    torch.set_num_threads(1)
    store, out, structure, steps, *rest = sys.argv[1:]
    main(store, out, structure, int(steps), *rest)
    os._exit(0)  # as scbench.cli.run: gloo's threads and Python's shutdown do not go together
