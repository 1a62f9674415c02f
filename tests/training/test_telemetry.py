"""What a step's row says, against sums made here."""

import json

import numpy as np
import pytest
import torch

from scbench import Store, pretrain
from scbench.config import PretrainConfig
from scbench.data.loader import Loader
from scbench.errors import UserError
from scbench.models.flops import training_flops
from scbench.training import hardware, step_facts

SMALL = {"width": 16, "layers": 2, "heads": 2, "max_genes": 40, "batch_cells": 32, "steps": 3, "validation_cells": 1}


def windows(store, world: int, micro: int | None = None) -> tuple[list, object]:
    """The first window of each rank, and the model's shape."""
    store = Store.open(store)
    config = PretrainConfig(store="s", output="o", **SMALL).model(store.vocabulary.size)
    first = []
    for rank in range(world):
        with Loader(store.split("train"), store.vocabulary, config.inputs, seed=0, batch_cells=32, micro_batch_cells=micro,
                    mask_ratio=0.4, weighted_share=0.5, lanes=None, rank=rank, world=world) as loader:
            first.append(next(loader))
    return first, config


def test_the_ranks_vectors_add_up_to_the_step(small_store):
    own = [0.0, 1.0, 0.0]
    per_rank, config = windows(small_store, 3, micro=4)
    vectors = [step_facts.facts(window, own if rank == 1 else [0.0] * 3, config, rank, 3)
               for rank, window in enumerate(per_rank)]
    summed = torch.stack(vectors).sum(0)
    wishes, work = step_facts.read(summed.tolist())
    tokens = [sum(len(batch.genes) for batch in window) for window in per_rank]
    assert wishes == own
    assert summed[0] == sum(len(batch.masked) for window in per_rank for batch in window)
    assert work["tokens"] == sum(tokens)
    assert work["token_imbalance"] == pytest.approx(max(tokens) / np.mean(tokens))
    assert work["token_imbalance"] > 1


def test_flops_are_those_of_the_formula(small_store):
    (window,), config = windows(small_store, 1)
    (batch,) = window
    cells = batch.n_cells
    expected = training_flops(config, np.diff(batch.cell_offsets.numpy()), len(batch.masked) / cells,
                              len(set(batch.genes[batch.masked.long()].tolist())) / cells).sum()
    _, work = step_facts.read(step_facts.facts(window, [0.0] * 3, config, 0, 1).tolist())
    assert work["teraflops"] * 1e12 == pytest.approx(expected, rel=1e-6)


def test_a_row(small_store, tmp_path):
    run = pretrain(small_store, tmp_path / "run", **SMALL, peak_tflops=1e-3)
    rows = [json.loads(line) for line in (run.directory / "metrics.jsonl").read_text().splitlines()]
    (window,), config = windows(small_store, 1)
    first = rows[0]
    assert first.keys() == {"step", "loss", "regression_loss", "mvc_loss", "gradient_norm", "lr", "tokens", "token_imbalance",
                            "cells_per_second", "tokens_per_second", "mfu", "wait_share", "peak_memory_bytes"}
    assert first["token_imbalance"] == 1 and first["tokens"] == len(window[0].genes)
    assert first["tokens_per_second"] / first["cells_per_second"] == pytest.approx(first["tokens"] / 32)
    flops = step_facts.read(step_facts.facts(window, [0.0] * 3, config, 0, 1).tolist())[1]["teraflops"] * 1e12
    assert first["mfu"] == pytest.approx(flops / (32 / first["cells_per_second"]) / 1e9, rel=1e-5)
    assert all(0 <= row["wait_share"] <= 1 and row["peak_memory_bytes"] > 1e8 for row in rows[:3])


def test_without_a_peak_there_is_no_mfu(small_store, tmp_path):
    assert hardware.peak_flops(torch.device("cpu"), "fp32", None) is None
    with pytest.raises(UserError, match=r"--peak-tflops is 0"):
        PretrainConfig(store="s", output="o", peak_tflops=0)


@pytest.mark.parametrize(("name", "bf16"), [("NVIDIA H100 80GB HBM3", 989), ("NVIDIA H100 PCIe", 756),
                                            ("NVIDIA A100-SXM4-40GB", 312), ("NVIDIA A10", 125),
                                            ("NVIDIA L40S", 362), ("NVIDIA L4", 121), ("Somebody's", None)])
def test_peaks_of_data_sheets(name, bf16, monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: name)
    peak = hardware.peak_flops(torch.device("cuda"), "bf16", None)
    assert peak == (None if bf16 is None else bf16 * 1e12)
