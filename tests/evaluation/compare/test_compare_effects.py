"""Effects of varied options against arithmetic by hand."""

import numpy as np
import pytest
from scipy import stats

from scbench.config import CompareConfig
from scbench.evaluation.compare.effects import METRICS, EstimateColumn, effects, estimate, sentences
from scbench.evaluation.compare.plan import plan

CONFIG = CompareConfig(store="store", output="out", budget_tokens=1e6, vary="weighted-sampling,mvc", width=32, heads=2)


def run(seed: int, **values) -> dict:
    return {"seed": seed, **dict.fromkeys(METRICS), **values}


def measured(losses: dict[tuple[str, str], list[float]], metric: str = "regression_loss", config=CONFIG):
    """Runs of the seeds 0, 1, … by (weighted-sampling, mvc)."""
    rows = {tuple(row.levels.values()): row for row in plan(config).rows}
    return [(rows[levels], [run(seed, **{metric: value}) for seed, value in enumerate(values)])
            for levels, values in losses.items()]


LOSSES = {("off", "off"): [0.50, 0.52, 0.54], ("on", "off"): [0.40, 0.43, 0.43],  # -0.10, -0.09, -0.11
          ("off", "on"): [0.40, 0.41, 0.42], ("on", "on"): [0.41, 0.40, 0.43]}  # +0.01, -0.01, +0.01


def test_an_estimate_is_the_mean_with_student_s_interval():
    values = [0.3, 0.5, 0.1, 0.2]
    found = estimate(values)
    low, high = stats.t.interval(0.95, 3, loc=np.mean(values), scale=stats.sem(values))
    assert found == pytest.approx((np.mean(values), low, high))
    assert estimate([0.3]) == (0.3, None, None)
    assert estimate([]) == (None, None, None)


def test_differences_are_paired_by_seed_in_every_setting():
    found = [row for row in effects(CONFIG, measured(LOSSES)) if row["factor"] == "weighted-sampling"]
    assert [(row["setting"], row["level"], row["instead_of"], row["metric"], row["seeds"]) for row in found] == [
        (setting, "on", "off", "regression_loss", 3) for setting in ("mvc off", "mvc on", "all settings")
    ]
    assert [row["difference"] for row in found] == pytest.approx([-0.1, 0.01 / 3, (-0.1 + 0.01 / 3) / 2])
    half = 4.302653 * 0.01 / 3**0.5
    assert found[0]["difference_low"] == pytest.approx(-0.1 - half, abs=1e-6)
    assert found[0]["difference_high"] == pytest.approx(-0.1 + half, abs=1e-6)
    by_seed = [(-0.10 + 0.01) / 2, (-0.09 - 0.01) / 2, (-0.11 + 0.01) / 2]
    half = 4.302653 * np.std(by_seed, ddof=1) / 3**0.5
    assert found[2]["difference_low"] == pytest.approx(np.mean(by_seed) - half, abs=1e-6)
    assert [row["verdict"] for row in found] == ["helps", "unclear", "helps"]


def test_what_is_better_depends_on_the_metric():
    for metric, verdict in [("mvc_loss", "helps"), ("linear_accuracy", "hurts"), ("depth_r2", "")]:
        found = effects(CONFIG, measured(LOSSES, metric))
        assert {row["metric"] for row in found} == {metric}
        assert found[0]["verdict"] == verdict


def test_missing_runs_and_metrics_are_left_out():
    losses = {**LOSSES, ("on", "on"): LOSSES["on", "on"][:1]}  # two runs diverged
    found = [row for row in effects(CONFIG, measured(losses)) if row["factor"] == "weighted-sampling"]
    assert [(row["setting"], row["seeds"], row["verdict"]) for row in found] == [
        ("mvc off", 3, "helps"), ("mvc on", 1, "unclear"), ("all settings", 1, "unclear"),
    ]
    without = measured(LOSSES, "mvc_loss")
    for row, runs in without:
        for one in runs:
            one["mvc_loss"] = one["mvc_loss"] if row.levels["mvc"] == "on" else None
    found = effects(CONFIG, without)
    assert [(row["factor"], row["setting"]) for row in found] == [
        ("weighted-sampling", "mvc on"), ("weighted-sampling", "all settings"),
    ]


def test_three_levels_are_held_against_the_first():
    config = CompareConfig(store="store", output="out", budget_tokens=1e6, vary="data-share", width=32, heads=2)
    runs = [(row, [run(0, mvc_loss=loss)]) for row, loss in zip(plan(config).rows, [0.3, 0.4, 0.6], strict=True)]
    found = [row for row in effects(config, runs) if row["setting"] != "all settings"]
    assert [(row["level"], row["instead_of"], row["setting"]) for row in found] == [("0.1", "1", "–"), ("0.01", "1", "–")]
    assert [row["difference"] for row in found] == pytest.approx([0.1, 0.3])


def test_the_sentences_count_the_settings():
    said = sentences(effects(CONFIG, measured(LOSSES)))
    assert said[0].startswith("weighted-sampling on instead of off, regression loss: helps in 1, hurts in 0, unclear in 1 "
                              "of 2 settings; over all settings -0.0483 (")
    assert said[1].startswith("mvc on instead of off, regression loss: ")
    assert len(said) == 2


def test_a_column_shows_half_the_interval_where_there_is_one():
    column = EstimateColumn("loss", ("x",), "{:.2f}")
    assert column.text({"x": 0.5, "x_low": 0.4, "x_high": 0.6}) == "0.50 ± 0.10"
    assert column.text({"x": 0.5, "x_low": None, "x_high": None}) == "0.50"
    assert column.text({"x": None, "x_low": None, "x_high": None}) == "–"
