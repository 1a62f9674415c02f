"""Predictors of counts and their deviances, against scikit-learn and few-line restatements."""

import numpy as np
import pytest
import scipy.sparse
from sklearn.linear_model import PoissonRegressor
from sklearn.metrics import mean_poisson_deviance

from scbench.evaluation import baselines
from scbench.evaluation.counts import predictors
from scbench.evaluation.counts.predictors import Fold, Part

SIZES = {"train": 600, "validation": 200, "test": 200}


def simulate(genes: int = 30, dimensions: int = 3, seed: int = 0, effect: float = 0.5):
    """Poisson counts, log-linear in features: the fold, the features of its parts, and the true means of the test cells."""
    generator = np.random.default_rng(seed)
    shares = generator.gamma(1.0, 1.0, genes) + 0.05
    coefficients = generator.normal(0, effect, (dimensions, genes))
    parts, features = [], []
    for size in SIZES.values():
        exposure = generator.uniform(1, 4, size)
        values = generator.normal(2, 1, (size, dimensions))
        means = exposure[:, None] * shares * np.exp((values - 2) @ coefficients)
        parts.append(Part(exposure, scipy.sparse.csr_matrix(generator.poisson(means).astype(np.float64))))
        features.append(values)
    return Fold(*parts, predictors.shares_of(parts[0])), features, means


def test_the_deviance_is_scikit_learns():
    generator = np.random.default_rng(0)
    means = generator.gamma(1.0, 2.0, (20, 15)) + 1e-3
    counts = generator.poisson(means)
    counts[3], counts[:, 4] = 0, 0
    found = predictors.deviance(scipy.sparse.csr_matrix(counts), means)
    np.testing.assert_allclose(found, [mean_poisson_deviance(*pair) for pair in zip(counts, means, strict=True)], rtol=1e-12)
    assert found.mean() == pytest.approx(mean_poisson_deviance(counts.ravel(), means.ravel()), rel=1e-12)
    itself = scipy.sparse.csr_matrix(counts + 1)
    np.testing.assert_allclose(predictors.deviance(itself, counts + 1.0), 0, atol=1e-12)


def test_genes_are_those_expressed_by_five_cells_that_vary_most(monkeypatch):
    generator = np.random.default_rng(0)
    counts = generator.poisson(generator.gamma(0.3, 1.0, 40), (100, 40))
    values = np.log1p(1e4 * counts / counts.sum(axis=1, keepdims=True))
    enough = np.flatnonzero((counts > 0).sum(axis=0) >= 5)
    assert 0 < len(enough) < 40
    assert predictors.choose_genes(scipy.sparse.csr_matrix(counts)).tolist() == enough.tolist()
    monkeypatch.setattr(baselines, "VARIABLE_GENES", 6)
    most = enough[np.argsort(-values[:, enough].var(axis=0))[:6]]
    assert predictors.choose_genes(scipy.sparse.csr_matrix(counts)).tolist() == sorted(most)


def test_exposures_of_deep_cells_are_their_totals_and_of_equal_ones_the_mean():
    generator = np.random.default_rng(0)
    rates = generator.gamma(2.0, 2000, 5000)
    totals, other = generator.poisson(rates), generator.poisson(rates)
    train = np.arange(3000)
    np.testing.assert_allclose(predictors.exposures(totals, train), totals, rtol=0.01, atol=5)
    equal = predictors.exposures(generator.poisson(30, 5000), train)
    assert equal.std() < 2 < np.sqrt(30)
    rates = generator.gamma(2.0, 5, 5000)  # shallow: the other half is nearer to the estimate than to the total
    totals, other = generator.poisson(rates), generator.poisson(rates)
    estimate = predictors.exposures(totals, train)
    slope = np.polyfit(totals[train], other[train], 1)[0]
    assert np.polyfit(totals, estimate, 1)[0] == pytest.approx(slope, abs=0.05)
    assert estimate[train].sum() == pytest.approx(totals[train].sum())
    assert predictors.exposures(np.array([0, 0, 50, 60]), np.array([2, 3])).min() > 0


def test_the_gene_mean_is_what_it_says():
    fold, _, _ = simulate()
    counts = fold.train.counts.toarray()
    means = fold.test.exposure[:, None] * (counts.sum(axis=0) / fold.train.exposure.sum())
    expected = mean_poisson_deviance(fold.test.counts.toarray().ravel(), means.ravel())
    assert predictors.gene_mean(fold).deviance.mean() == pytest.approx(expected, rel=1e-12)


def test_a_planted_log_linear_law_reaches_the_oracle():
    fold, features, means = simulate()
    oracle = predictors.deviance(fold.test.counts, means).mean()
    mean = predictors.gene_mean(fold).deviance.mean()
    found = predictors.log_linear(fold, *features).deviance.mean()
    assert mean > 1.3 * oracle
    assert found - oracle < 0.03 * (mean - oracle)
    near = predictors.nearest_cells(fold, *features).deviance.mean()
    assert oracle < found < near < mean


def test_the_log_linear_law_is_scikit_learns_poisson_regression(monkeypatch):
    fold, features, _ = simulate(genes=6)
    monkeypatch.setattr(predictors, "PENALTIES", (40.0,))
    monkeypatch.setattr(predictors, "_TOLERANCE", 1e-9)
    choice = predictors.log_linear(fold, *features)
    centre = fold.train.exposure @ features[0] / fold.train.exposure.sum()
    scale = np.sqrt(np.square(features[0] - centre).mean())
    means = np.empty((SIZES["test"], 6))
    for gene, counts in enumerate(fold.train.counts.toarray().T):
        plain = PoissonRegressor(alpha=40 / fold.train.exposure.sum(), tol=1e-8, max_iter=1000)
        plain.fit((features[0] - centre) / scale, counts / fold.train.exposure, sample_weight=fold.train.exposure)
        means[:, gene] = plain.predict((features[2] - centre) / scale) * fold.test.exposure
    expected = predictors.deviance(fold.test.counts, means)
    assert choice.strength == (40.0,)
    assert choice.deviance.mean() == pytest.approx(expected.mean(), rel=2e-3)  # a few test cells lie beyond the training cells
    assert np.median(np.abs(choice.deviance / expected - 1)) < 1e-3


def test_a_rotation_and_a_unit_of_the_features_change_nothing():
    fold, features, _ = simulate()
    rotation = np.linalg.qr(np.random.default_rng(1).normal(size=(3, 3)))[0]
    for probe in (predictors.log_linear, predictors.nearest_cells):
        plain, turned = probe(fold, *features), probe(fold, *[1000 * values @ rotation for values in features])
        assert turned.strength == plain.strength
        np.testing.assert_allclose(turned.deviance, plain.deviance, rtol=1e-3)


def test_features_that_say_nothing_lose_next_to_nothing():
    fold, features, _ = simulate()
    generator = np.random.default_rng(2)
    noise = [generator.normal(size=(len(values), 20)) for values in features]
    mean = predictors.gene_mean(fold).deviance.mean()
    choice = predictors.log_linear(fold, *noise)
    assert choice.strength[0] >= 1e3
    assert choice.deviance.mean() == pytest.approx(mean, rel=0.01)
    constant = [np.ones((len(values), 2)) for values in features]
    assert predictors.log_linear(fold, *constant).deviance.mean() == pytest.approx(mean, rel=1e-5)
    assert predictors.nearest_cells(fold, *constant).deviance.mean() == pytest.approx(mean, rel=0.02)


def test_nearest_cells_and_the_smoothed_half_are_what_they_say(monkeypatch):
    fold, features, _ = simulate(genes=5)
    monkeypatch.setattr(predictors, "NEIGHBOURS", (7,))
    monkeypatch.setattr(predictors, "MEAN_SHARES", (0.2,))
    monkeypatch.setattr(predictors, "PSEUDO_COUNTS", (9.0,))
    counts = fold.train.counts.toarray()
    shares = counts.sum(axis=0) / fold.train.exposure.sum()
    means = []
    for exposure, values in zip(fold.test.exposure, features[2], strict=True):
        near = np.argsort(np.linalg.norm(features[0] - values, axis=1))[:7]
        means.append(exposure * (0.8 * counts[near].sum(axis=0) / fold.train.exposure[near].sum() + 0.2 * shares))
    expected = predictors.deviance(fold.test.counts, np.array(means))
    np.testing.assert_allclose(predictors.nearest_cells(fold, *features).deviance, expected, rtol=1e-9)

    halves = [np.random.default_rng(3).poisson(2.0, (200, 5)) for _ in range(2)]
    totals = [half.sum(axis=1) + 4.0 for half in halves]
    means = fold.test.exposure[:, None] * (halves[1] + 9 * shares) / (totals[1][:, None] + 9)
    expected = predictors.deviance(fold.test.counts, means)
    found = predictors.smoothed_half(fold, tuple(map(scipy.sparse.csr_matrix, halves)), tuple(totals))
    np.testing.assert_allclose(found.deviance, expected, rtol=1e-9)


def test_strengths_are_chosen_without_test_cells():
    fold, features, _ = simulate()
    rows = np.random.default_rng(4).permutation(SIZES["test"])
    other = fold._replace(test=fold.test._replace(counts=fold.test.counts[rows]))
    for probe in (predictors.log_linear, predictors.nearest_cells):
        assert probe(other, *features).strength == probe(fold, *features).strength


@pytest.mark.parametrize("genes", [1, 8])
def test_one_gene_and_genes_without_training_counts(genes):
    fold, features, _ = simulate(genes=genes)
    train = fold.train.counts.toarray()
    train[:, 0] = 0
    part = fold.train._replace(counts=scipy.sparse.csr_matrix(train))
    fold = fold._replace(train=part, shares=predictors.shares_of(part))
    assert np.isfinite(predictors.gene_mean(fold).deviance).all()
    for probe in (predictors.log_linear, predictors.nearest_cells):
        assert np.isfinite(probe(fold, *features).deviance).all()
