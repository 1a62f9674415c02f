"""Temperature and limits against what they were planted as."""

import numpy as np
import pytest

from scbench.evaluation.finetuning.calibration import calibration_error, cross_entropy, fit_temperature, limits, probabilities


def planted_logits(cells: int = 20_000, temperature: float = 1.0):
    generator = np.random.default_rng(0)
    logits = generator.normal(size=(cells, 4)) * 2
    shares = probabilities(logits, 1.0)
    classes = (generator.random(cells)[:, None] > shares.cumsum(axis=1)).sum(axis=1)
    return logits * temperature, classes


@pytest.mark.parametrize("temperature", [0.3, 1.0, 4.0])
def test_the_temperature_that_was_planted_is_found(temperature):
    logits, classes = planted_logits(temperature=temperature)
    found = fit_temperature(logits, classes)
    assert found == pytest.approx(temperature, rel=0.05)
    shares = probabilities(logits, found)
    best, right = shares.max(axis=1), shares.argmax(axis=1) == classes
    assert calibration_error(best, right) < 0.02
    assert cross_entropy(logits / found, classes) == pytest.approx(-np.log(shares[np.arange(20_000), classes]).mean())


def test_calibration_error_of_the_overconfident():
    assert calibration_error(np.full(100, 0.95), np.arange(100) < 60) == pytest.approx(0.35)


@pytest.mark.parametrize("coverage", [0.5, 0.9, 0.95, 1.0])
@pytest.mark.parametrize("together", [True, False])
def test_limits_leave_the_share_assigned_and_no_more_than_needed(coverage, together):
    generator = np.random.default_rng(1)
    best = generator.random(400)
    distances = 1 - best if together else generator.random(400)
    smallest, largest = limits(best, distances, coverage)
    assert ((best >= smallest) & (distances <= largest)).mean() >= coverage
    for alone in (best >= smallest, distances <= largest):
        assert alone.mean() == pytest.approx((1 + coverage) / 2)
