"""What a recipe's optimizer, precision and clipping are in the engine itself, not in the options."""

import json

import pytest
import torch
from safetensors.torch import load_file

from scbench import ExpressionModel, pretrain
from scbench.config import STRUCTURES, PretrainConfig
from scbench.data.vocabulary import Vocabulary
from scbench.training import pretrain as module
from scbench.training.engine import make_optimizer

SMALL = {"width": 16, "layers": 1, "heads": 2, "max_genes": 40, "batch_cells": 32}
VOCABULARY = Vocabulary.build(f"G{i}" for i in range(20))


@pytest.mark.parametrize(("recipe", "optimizer", "decays", "clip", "dtype"), [
    ("default", torch.optim.AdamW, {0.01, 0.0}, 1.0, torch.bfloat16),
    ("aaai2025", torch.optim.Adam, {0.0}, 0.0, torch.float32),
])
def test_the_engine_of_a_recipe(recipe, optimizer, decays, clip, dtype, small_store, tmp_path, monkeypatch):
    seen = {}
    real = module.backward

    def spy(engine, window, denominator):
        seen["engine"], seen["dtypes"] = engine, {p.dtype for p in engine.module.parameters()}
        return real(engine, window, denominator)

    monkeypatch.setattr(module, "backward", spy)
    pretrain(small_store, tmp_path / "run", recipe=recipe, steps=2, **SMALL)
    engine = seen["engine"]
    inner = getattr(engine.optimizer, "optimizer", engine.optimizer)
    assert type(inner) is optimizer
    assert {group["weight_decay"] for group in inner.param_groups} == decays
    assert {(group["betas"], group["eps"]) for group in inner.param_groups} == {((0.9, 0.999), 1e-8)}
    assert engine.gradient_clipping() == clip
    assert seen["dtypes"] == {dtype}
    assert not engine.torch_autocast_enabled()


@pytest.mark.parametrize("structure", STRUCTURES)
def test_what_is_decayed(structure):
    """Matrices; no table, norm, bias or rate of decay. In the recipe aaai2025 nothing."""
    config = PretrainConfig(store="s", output="o", structure=structure, width=16, heads=2, layers=1)
    model = ExpressionModel(config.model(VOCABULARY.size), VOCABULARY)
    decayed, rest = make_optimizer(model, config).param_groups
    assert (decayed["weight_decay"], rest["weight_decay"]) == (0.01, 0.0)
    left = {id(p) for p in rest["params"]}
    names = {name for name, p in model.named_parameters() if id(p) in left}
    assert "embedding.table" in names and "embedding.value_weight2" not in names
    assert all(p.ndim == 1 or name.endswith(("table", "logarithm")) for name, p in model.named_parameters() if name in names)
    assert len(decayed["params"]) + len(rest["params"]) == len(list(model.parameters()))


@pytest.mark.parametrize(("recipe", "clip"), [("default", 1e-3), ("aaai2025", 0.0)])
def test_one_step_of_plain_descent_shows_the_clipping(recipe, clip, small_store, tmp_path):
    """SGD at rate 1 moves the weights by the gradient itself: its norm is the clip by default, and whole where none is."""
    options = {"optimizer": "sgd", "lr": 1.0, "warmup_steps": 0, "precision": "fp32", "steps": 1, "dropout": 0.0}
    run = pretrain(small_store, tmp_path / "run", recipe=recipe, clip=clip, **options, **SMALL)
    after = load_file(run.model_dir / "model.safetensors")
    model = ExpressionModel.from_pretrained(run.model_dir)
    before = ExpressionModel(model.config, model.vocabulary, 0).state_dict()
    moved = torch.stack([(after[name] - before[name]).double().norm() for name in after]).norm()
    row = json.loads((run.directory / "metrics.jsonl").read_text().splitlines()[0])
    assert row["gradient_norm"] > 0.1, "before clipping"
    assert float(moved) == pytest.approx(clip or row["gradient_norm"], rel=1e-3)
