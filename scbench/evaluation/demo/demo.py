"""The whole path on real cells in minutes: prepare, pretrain, embed, benchmark, plots; the verb `scbench demo`."""

import shutil
import time
from pathlib import Path

import anndata
import numpy as np
import torch
from threadpoolctl import threadpool_limits

from scbench.config import DemoConfig, EmbedConfig
from scbench.data.prepare import prepare
from scbench.errors import UserError
from scbench.evaluation import baselines, plots
from scbench.evaluation.classification.benchmark import benchmark_classification
from scbench.evaluation.demo import cells as demo_cells
from scbench.evaluation.embed import load_model, run_embed
from scbench.evaluation.embedding_files import KEY
from scbench.evaluation.labels import read_labels
from scbench.evaluation.report import Table, screen
from scbench.files import refuse_existing, write_text
from scbench.training.pretrain import pretrain

SPLIT = (0.5, 0.1, 0.4)  # a large test split: the benchmark's cells
# tuned on the default cells for what 400 steps can do: a high rate and no dropout
TRAINING = {
    "width": 64, "layers": 2, "heads": 4, "max_genes": 128, "dropout": 0.0, "batch_cells": 64, "lr": 3e-3, "precision": "fp32",
}


def run_demo(config: DemoConfig) -> dict:
    """`scbench demo`: everything goes to --output, which is removed again if a step fails; returns the benchmark's record."""
    began = time.monotonic()
    refuse_existing(config.output)
    if config.input is not None and config.label is None:
        raise UserError(f"--label is missing: say which column of obs in {config.input} the benchmark should predict.")
    if config.input is None and config.label is not None:
        raise UserError("--label goes with your own file: give an h5ad file too, or leave --label out.")
    if config.input is None:
        cells, label = demo_cells.pbmcs(), demo_cells.PBMC_LABEL
    else:
        cells, label = demo_cells.own_cells(config.input, config.label, SPLIT[2], config.seed), config.label
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # threads of so small a model mostly wait for each other; and the numbers don't depend on cores
    try:
        with threadpool_limits(1):
            table = _demo(config, cells, label)
    except BaseException:
        shutil.rmtree(config.output, ignore_errors=True)
        raise
    finally:
        torch.set_num_threads(threads)
    summary = _summary(config.output, label, time.monotonic() - began)
    write_text(config.output / "README.md", f"{table.markdown()}\n{summary}")
    console = screen(quiet=config.json)
    table.show(console)
    console.print(f"\n{summary}", markup=False)
    return {"output": str(config.output), "benchmark": table.record()}


def _demo(config: DemoConfig, cells: anndata.AnnData, label: str) -> Table:
    """The five steps; the benchmark's table."""
    console = screen(quiet=config.json)
    output = config.output
    output.mkdir(parents=True, exist_ok=True)
    file = output / "cells.h5ad"
    cells.write_h5ad(file)

    console.print(f"1 prepare: {cells.n_obs:,} cells × {cells.n_vars:,} genes → {output / 'store'}")
    store = prepare([file], output / "store", split=",".join(map(str, SPLIT)), seed=config.seed, workers=1)
    console.print(f"2 pretrain: {config.steps} steps of a small transformer → {output / 'run'}")
    run = pretrain(
        store, output / "run", steps=config.steps, validate_every=max(1, config.steps // 10), checkpoint_every=config.steps,
        seed=config.seed, **TRAINING,
    )
    console.print(f"3 embed → {output / 'embedded.h5ad'}")
    run_embed(EmbedConfig(model=run.model_dir, input=file, output=output / "embedded.h5ad", seed=config.seed, json=True))
    console.print(f"4 benchmark: {label} of the test split, which pretraining never saw → {output / 'benchmark'}")
    model = load_model(run.model_dir)
    table = benchmark_classification(model, file, label, max_overlap=1, seed=config.seed, progress=not config.json)
    table.write(output / "benchmark")
    console.print(f"5 plots → {output / 'plots'}\n")
    _plot(output, label)
    return table


def _plot(output: Path, label: str) -> None:
    """The loss curve, and maps of the model's embedding and of PCA, each by label and by depth."""
    cells = anndata.read_h5ad(output / "embedded.h5ad")
    labels = read_labels(cells.obs, label, "embedded.h5ad")
    log_totals = baselines.depth_features(cells.X)[:, 0]
    everyone = np.arange(cells.n_obs)
    components, _ = baselines.principal_components(baselines.log_normalise(cells.X), everyone, everyone)
    plots.plot_loss(output / "run" / "metrics.jsonl", output / "plots" / "loss.png")
    for name, title, embedding in [
        ("embedding", "Embedding of the pretrained model", cells.obsm[KEY]),
        ("pca", f"PCA of log-normalised counts, {components.shape[1]} components", components),
    ]:
        plots.plot_embedding(embedding, labels, log_totals, title, output / "plots" / f"{name}.png")


def _summary(output: Path, label: str, seconds: float) -> str:
    """What is where and what to try next; Markdown that reads well on a terminal."""
    return f"""## Done in {seconds:.0f} s

A model of this size, trained for a minute, shows that every part works; it is no measure of what pretraining can do.

What is where in {output}:

- cells.h5ad: the cells with raw counts; store: the same as a shard store, split for training, validation and test
- run: metrics.jsonl, tensorboard, checkpoints, and model, the folder that others load
- embedded.h5ad: the cells with obsm["{KEY}"]
- benchmark: the table above as JSON, CSV and Markdown
- plots: loss.png, and embedding.png and pca.png by label and by depth

What to try next:

- scbench demo MY.h5ad --label COLUMN -o my_demo: the same on your own cells
- scbench pretrain {output}/store -o longer --steps 2000 --max-genes 128: a larger model, trained longer
- scbench prepare A.h5ad B.h5ad -o store; scbench pretrain store -o run; scbench embed run/model A.h5ad A_embedded.h5ad;
  scbench benchmark classification run/model C.h5ad --label {label} -o results: the path step by step
"""
