"""The learning rate and the configuration files."""


import pytest

from scbench.config import PretrainConfig
from scbench.errors import UserError
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
