"""Every structure trains under both recipes, through the real loop; the options of a run reach the model."""

import gc
import json
import shutil

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from scbench import ExpressionModel, Store, pretrain
from scbench.config import STRUCTURES
from scbench.errors import UserError

SMALL = {"width": 16, "layers": 2, "heads": 2, "max_genes": 40, "batch_cells": 16, "steps": 4, "validate_every": 2, "lanes": 1}


def run_rows(run) -> list[dict]:
    return [json.loads(line) for line in (run.directory / "metrics.jsonl").read_text().splitlines()]


@pytest.mark.parametrize("structure", STRUCTURES)
@pytest.mark.parametrize("recipe", ["default", "aaai2025"])
def test_every_structure_trains(structure, recipe, small_store, tmp_path):
    run = pretrain(small_store, tmp_path / "run", structure=structure, recipe=recipe, lr=1e-3, **SMALL)
    model = ExpressionModel.from_pretrained(run.model_dir)
    assert model.config.structure == structure and model.config.recipe == recipe
    start = ExpressionModel(model.config, model.vocabulary, 0).state_dict()
    still = [name for name, tensor in model.state_dict().items() if torch.equal(tensor, start[name])]
    assert not still, "weights that did not learn"
    assert np.isfinite(run.validation["mvc_loss"])
    assert ("regression_loss" in run.validation) == model.config.regression
    assert run.validation["loss"] == pytest.approx(run.validation.get("regression_loss", 0) + run.validation["mvc_loss"])


@pytest.mark.parametrize("options", [
    {"structure": "cnn", "recipe": "aaai2025"},  # batch norm's running statistics are part of a checkpoint
    {"structure": "linear_mixer", "recipe": "aaai2025"},
    {"structure": "mamba"},
    {"structure": "gnn", "deepspeed": "zero2"},
    {"structure": "cnn", "preprocess": "bin"},
])
def test_a_resumed_run_is_the_same_run(options, small_store, tmp_path):
    whole = pretrain(small_store, tmp_path / "whole", **SMALL, **options)
    part = pretrain(small_store, tmp_path / "part", checkpoint_every=2, keep_last=9, **SMALL, **options)
    for path in (part.directory / "checkpoints" / "step-00000004", part.model_dir):
        shutil.rmtree(path)
    again = pretrain(small_store, part.directory, checkpoint_every=2, keep_last=9, resume=True, **SMALL, **options)
    expected, found = (load_file(run.model_dir / "model.safetensors") for run in (whole, again))
    assert expected.keys() == found.keys()
    assert all(torch.equal(expected[name], found[name]) for name in expected)


def test_batch_norm_counts_what_training_saw(small_store, tmp_path):
    run = pretrain(small_store, tmp_path / "run", structure="cnn", recipe="aaai2025", **SMALL)
    state = ExpressionModel.from_pretrained(run.model_dir).state_dict()
    assert (state["encoder.layers.0.norm.running_var"] != 1).all()


def test_a_share_of_the_data(small_store, tmp_path):
    store = Store.open(small_store)
    run = pretrain(small_store, tmp_path / "run", data_share=0.1, **SMALL)
    model = ExpressionModel.from_pretrained(run.model_dir)
    train = store.split("train").cells(["content_hash"])["content_hash"].to_numpy()
    seen = set(train[:21]) | set(store.split("validation").cells(["content_hash"])["content_hash"])
    assert set(model.training_cells.tolist()) == {int(h) for h in seen}
    first = store.split("train").first(21)
    assert first.n_tokens == int(store.split("train").cells(["n_genes"])["n_genes"][:21].sum())
    assert first.extent_sizes.sum() == first.n_cells == 21


def test_validation_length(small_store, tmp_path):
    short = pretrain(small_store, tmp_path / "short", validation_max_genes=5, **SMALL)
    full = pretrain(small_store, tmp_path / "full", **SMALL)
    assert short.validation["masked_genes"] < full.validation["masked_genes"] / 3
    options = {"structure": "linear_mixer", "recipe": "aaai2025", "validation_max_genes": 5}
    padded = pretrain(small_store, tmp_path / "padded", **options, **SMALL)
    assert padded.validation["masked_genes"] == short.validation["masked_genes"]


def test_the_papers_recipe_starts_at_rate_zero(small_store, tmp_path):
    run = pretrain(small_store, tmp_path / "run", recipe="aaai2025", **SMALL)
    assert [row["lr"] for row in run_rows(run) if "lr" in row] == pytest.approx([step / 10_000 * 2e-4 for step in range(4)])


def test_a_resumed_run_keeps_its_recipe(small_store, tmp_path):
    pretrain(small_store, tmp_path / "run", **SMALL)
    with pytest.raises(UserError, match=r"--clip was 1\.0"):
        pretrain(small_store, tmp_path / "run", recipe="aaai2025", precision="bf16", resume=True, **SMALL)


def test_a_finished_run_gives_its_memory_back(small_store, tmp_path):
    """A comparison trains dozens of models in one process."""
    def alive() -> int:
        gc.collect()
        return sum(isinstance(thing, ExpressionModel) for thing in gc.get_objects())

    before = alive()
    pretrain(small_store, tmp_path / "run", **SMALL)
    assert alive() == before
