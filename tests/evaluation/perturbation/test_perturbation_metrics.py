"""Metrics of predicted changes against computations of a few lines."""

import numpy as np
import pytest
from scipy.stats import pearsonr

from scbench.evaluation.perturbation.metrics import discrimination, energy_distance, mean_squared_error, pearson, top_genes


@pytest.fixture
def generator():
    return np.random.default_rng(0)


def test_error_and_correlation_equal_scipy(generator):
    predicted, truth = generator.normal(size=30), generator.normal(size=(3, 30))
    for row in range(3):
        assert mean_squared_error(predicted, truth)[row] == pytest.approx(((predicted - truth[row]) ** 2).mean())
        assert pearson(predicted, truth)[row] == pytest.approx(pearsonr(predicted, truth[row])[0])
    assert pearson(truth, truth) == pytest.approx(np.ones(3))


def test_a_constant_prediction_has_no_direction(generator):
    truth = generator.normal(size=(2, 30))
    assert (pearson(np.zeros(30), truth) == 0).all()
    assert (pearson(np.full(30, 0.1) + 1e-14 * generator.normal(size=30), truth) == 0).all()


def test_top_genes_are_the_largest_whatever_their_sign():
    assert top_genes(np.array([0.1, -5, 2, 0, 3]), 3).tolist() == [1, 4, 2]


def test_discrimination_equals_loops(generator):
    predicted, truths = generator.normal(size=(4, 12)), generator.normal(size=(5, 3, 12))
    targets = [[0], [1, 2], [], [3], [0]]
    found = discrimination(predicted, truths, 1, targets)
    for method in range(4):
        for resample in range(3):
            wins = 0
            for other in (0, 2, 3, 4):
                used = [gene for gene in range(12) if gene not in targets[1] + targets[other]]
                far, near = (np.linalg.norm((predicted[method] - truths[q, resample])[used]) for q in (other, 1))
                wins += far > near
            assert found[method, resample] == wins / 4


def test_discrimination_at_its_ends(generator):
    truths = generator.normal(size=(6, 1, 12))
    predicted = np.stack([truths[2, 0], -truths[2, 0]])
    found = discrimination(predicted, truths, 2, [[]] * 6)
    assert found[0, 0] == 1
    no_change = [discrimination(np.zeros((1, 12)), truths, own, [[]] * 6)[0, 0] for own in range(6)]
    assert np.mean(no_change) == pytest.approx(0.5)  # each is beaten as often as it beats
    same = discrimination(predicted, np.repeat(truths[:1], 6, axis=0), 2, [[]] * 6)
    assert (same == 0.5).all()
    assert discrimination(predicted, truths[:1], 0, [[]]) is None


def test_the_own_target_gives_nobody_away():
    """Changes of the targets alone: without them all perturbations are alike."""
    truths = -3 * np.eye(5, 9)[:, None]
    assert (discrimination(np.zeros((1, 9)), truths, 1, [[0], [1], [2], [3], [4]]) == 0.5).all()


def test_energy_distance_equals_loops(generator):
    real, predicted = generator.normal(size=(7, 4)), generator.normal(1, 1, size=(5, 4))
    weights = np.stack([np.ones(7), generator.integers(0, 3, 7) + 1.0])
    found = energy_distance(real, predicted, weights)

    def mean(pairs):
        distances, masses = zip(*((np.linalg.norm(a - b), mass) for a, b, mass in pairs), strict=True)
        return np.average(distances, weights=masses)

    for row, w in enumerate(weights):
        across = mean((x, y, w[i]) for i, x in enumerate(real) for y in predicted)
        within = mean((x, y, w[i] * w[j]) for i, x in enumerate(real) for j, y in enumerate(real) if i != j)
        other = mean((x, y, 1) for i, x in enumerate(predicted) for j, y in enumerate(predicted) if i != j)
        assert found[row] == pytest.approx(2 * across - within - other)


def test_energy_distance_of_equal_laws_is_about_zero(generator):
    values = [energy_distance(generator.normal(size=(40, 5)), generator.normal(size=(40, 5)), np.ones((1, 40)))[0]
              for _ in range(30)]
    assert abs(np.mean(values)) < 0.02
    assert energy_distance(generator.normal(size=(40, 5)), generator.normal(1, 1, size=(40, 5)), np.ones((1, 40)))[0] > 0.3
