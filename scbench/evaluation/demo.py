"""The whole path on real cells in minutes: prepare, pretrain, embed, benchmark, plots; the verb `scbench demo`."""

import shutil
import time
from pathlib import Path

import anndata
import numpy as np
from rich.console import Console

from scbench.config import ClassificationConfig, DemoConfig, EmbedConfig
from scbench.data.prepare import prepare
from scbench.errors import UserError
from scbench.evaluation import baselines, demo_cells, plots
from scbench.evaluation.classification import run_classification
from scbench.evaluation.embed import run_embed
from scbench.evaluation.embedding_files import KEY
from scbench.evaluation.labels import read_labels
from scbench.files import refuse_existing, write_text
from scbench.training.pretrain import pretrain

SPLIT = (0.5, 0.1, 0.4)  # a large test split: the benchmark's cells
MODEL = {"width": 64, "layers": 2, "heads": 4, "max_genes": 128, "batch_cells": 64}


def run_demo(config: DemoConfig) -> dict:
    """`scbench demo`: everything goes to --output, which is removed again if a step fails; returns the benchmark."""
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
    try:
        return _demo(config, cells, label, began)
    except BaseException:
        shutil.rmtree(config.output, ignore_errors=True)
        raise


def _demo(config: DemoConfig, cells: anndata.AnnData, label: str, began: float) -> dict:
    console = Console(quiet=config.json, highlight=False)
    output = config.output
    output.mkdir(parents=True, exist_ok=True)
    file = output / "cells.h5ad"
    cells.write_h5ad(file)

    console.print(f"[bold]1 prepare[/] {cells.n_obs:,} cells × {cells.n_vars:,} genes → {output / 'store'}")
    store = prepare([file], output / "store", split=",".join(map(str, SPLIT)), seed=config.seed, workers=1)
    console.print(f"[bold]2 pretrain[/] {config.steps} steps of a small transformer → {output / 'run'}")
    run = pretrain(
        store, output / "run", steps=config.steps, lr=1e-3, precision="fp32", validate_every=max(1, config.steps // 10),
        checkpoint_every=config.steps, seed=config.seed, **MODEL,
    )
    console.print(f"[bold]3 embed[/] → {output / 'embedded.h5ad'}")
    run_embed(EmbedConfig(model=run.model_dir, input=file, output=output / "embedded.h5ad", seed=config.seed, json=True))
    console.print(f"[bold]4 benchmark[/] {label} on cells that pretraining never saw → {output / 'benchmark'}")
    results = run_classification(
        ClassificationConfig(model=run.model_dir, input=file, label=label, output=output / "benchmark", seed=config.seed,
                             json=config.json)
    )
    console.print(f"[bold]5 plots[/] → {output / 'plots'}")
    _plot(output, label)
    summary = _summary(output, label, results, time.monotonic() - began)
    write_text(output / "README.md", summary)
    console.print("\n" + summary, markup=False)
    return results


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


def _summary(output: Path, label: str, results: dict, seconds: float) -> str:
    """What is where, what came out, and what to try next; Markdown that reads well on a terminal."""
    said = "\n".join(f"- {sentence}" for sentence in results["sentences"])
    return f"""# {results["title"]}: the demo, done in {seconds:.0f} s

What came out ({output}/benchmark/results.md has the table):

{said}

A model of this size, trained for minutes, shows that every part works. It is no measure of what pretraining can do.

What is where:

- {output}/cells.h5ad: the cells, raw counts
- {output}/store: the shard store (scbench info {output}/store)
- {output}/run: metrics.jsonl, tensorboard, checkpoints, and model/, which others load
- {output}/embedded.h5ad: the cells with obsm["{KEY}"]
- {output}/benchmark: results as JSON, CSV and Markdown
- {output}/plots: loss.png, embedding.png and pca.png (by label and by depth)

What to try next:

- train longer: scbench pretrain {output}/store -o longer --steps 2000 --width 128 --layers 4 --max-genes 128
- your own cells: scbench demo MY.h5ad --label COLUMN -o my_demo
- step by step: scbench prepare A.h5ad B.h5ad -o store; scbench pretrain store -o run;
  scbench embed run/model A.h5ad A_embedded.h5ad;
  scbench benchmark classification run/model C.h5ad --label {label} -o results
"""
