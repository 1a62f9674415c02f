"""The learning rate and the configuration files."""

import json
from importlib import resources

import pytest

from scbench.config import PretrainConfig
from scbench.errors import UserError
from scbench.training.engine import read_deepspeed_config
from scbench.training.schedule import learning_rate
from scbench.training.schedule import rates as rates_of


def config(**options) -> PretrainConfig:
    return PretrainConfig(store="s", output="o", **options)


def test_warm_up_is_linear_and_the_cosine_ends_at_a_tenth():
    rates = [learning_rate(step, 100, 2.0, 10) for step in range(100)]
    assert rates[:10] == pytest.approx([0.2 * i for i in range(1, 11)])
    assert rates[10] == pytest.approx(2.0)
    assert rates[-1] == pytest.approx(0.2)
    assert rates[10 + 89 // 2] == pytest.approx(1.1, abs=0.03)
    assert sorted(rates[10:], reverse=True) == rates[10:]


@pytest.mark.parametrize(("steps", "warmup"), [(1, 0), (1, 5), (2, 1)])
def test_short_runs_learn(steps, warmup):
    assert all(0 < learning_rate(step, steps, 1.0, warmup) <= 1 for step in range(steps))


def test_default_warm_up():
    for steps, warmup in [(5, 0), (300, 30), (10**6, 10_000)]:
        expected = [learning_rate(step, steps, 2e-4, warmup) for step in range(5)]
        assert [rates_of(config(), steps, 1_000)(step) for step in range(5)] == expected


def test_the_recipe_of_the_paper_warms_up_in_the_first_epoch_only():
    rate = rates_of(config(recipe="aaai2025"), 70_850, 906_890)  # 7,086 steps an epoch, the last one short
    assert rate(0) == 0
    assert rate(5_000) == pytest.approx(1e-4)
    assert rate(7_085) == rate(7_086) == rate(70_849) == pytest.approx(0.7085 * 2e-4)
    long = rates_of(config(recipe="aaai2025"), 200_000, 128 * 20_000)
    assert long(10_000) == long(199_999) == 2e-4


@pytest.mark.parametrize("precision", ["bf16", "fp32"])
@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_shipped_files_are_literal_deepspeed_files_of_their_stage(stage, precision):
    file = resources.files("scbench.ds_configs") / f"zero{stage}_{precision}.json"
    settings = json.loads(file.read_text())
    assert settings["zero_optimization"]["stage"] == stage
    assert settings.get("bf16", {"enabled": False})["enabled"] == (precision == "bf16")
    ours, notes = read_deepspeed_config(config(deepspeed=f"zero{stage}", precision=precision), micro_steps=4)
    assert ours["gradient_accumulation_steps"] == 4
    assert ours["gradient_clipping"] == 1.0
    assert notes == []  # nothing of a shipped file is overridden in silence


def test_an_overridden_file_is_said(tmp_path):
    path = tmp_path / "mine.json"
    path.write_text(json.dumps({"gradient_clipping": 5.0, "bf16": {"enabled": False}, "train_batch_size": 7}))
    settings, notes = read_deepspeed_config(config(deepspeed=str(path), clip=0.5), micro_steps=1)
    assert settings["gradient_clipping"] == 0.5
    assert "train_batch_size" not in settings
    assert len(notes) == 2
    assert "gradient_clipping 5.0 is overridden by 0.5" in notes[0]


@pytest.mark.parametrize(("content", "said"), [
    (None, "neither zero0"),
    ("{", "not JSON"),
    ("[]", "JSON object"),
    ('{"optimizer": {"type": "Adam"}}', "sets an optimizer"),
    ('{"fp16": {"enabled": true}}', "fp16"),
])
def test_files_that_make_no_sense_are_refused(tmp_path, content, said):
    path = tmp_path / "mine.json"
    if content is not None:
        path.write_text(content)
    with pytest.raises(UserError, match=said):
        read_deepspeed_config(config(deepspeed=str(path)), micro_steps=1)


@pytest.mark.parametrize(("options", "said"), [
    ({"steps": -3}, "--steps is -3"),
    ({"batch_cells": 0}, "--batch-cells is 0"),
    ({"steps": 3, "epochs": 1}, "exclude each other"),
    ({"mask_ratio": 1.5}, "--mask-ratio is 1.5"),
    ({"width": 100, "heads": 8}, "not divisible"),
    ({"lr": 0}, "--lr is 0"),
    ({"dropout": 1.0}, "--dropout is 1.0"),
    ({"structure": "perceiver"}, "unknown structure 'perceiver'"),
])
def test_options_that_make_no_sense_are_refused(options, said):
    with pytest.raises(UserError, match=said):
        config(**options)
