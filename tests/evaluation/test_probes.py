"""Probes and baselines against plain scikit-learn and planted answers."""

import numpy as np
import pytest
import scipy.sparse
from sklearn.decomposition import PCA
from sklearn.linear_model import LogisticRegression, Ridge
from sklearn.metrics import balanced_accuracy_score
from sklearn.neighbors import KNeighborsClassifier
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from scbench.evaluation import baselines, probes
from scbench.evaluation.classification import selection

GENERATOR = np.random.default_rng(0)
CLASSES = GENERATOR.integers(0, 3, 200)
FEATURES = GENERATOR.normal(size=(200, 8)) + 0.8 * CLASSES[:, None]
TRAIN, TEST = np.arange(150), np.arange(150, 200)


def counts(cells: int = 120, genes: int = 300) -> scipy.sparse.csr_matrix:
    rates = np.exp(np.random.default_rng(1).normal(-1, 1.5, (cells, genes)))
    return scipy.sparse.csr_matrix(np.random.default_rng(2).poisson(rates).astype(np.float32))


def test_nearest_neighbours_equal_a_hand_written_vote():
    predicted = probes.nearest_neighbours(FEATURES[TRAIN], CLASSES[TRAIN], FEATURES[TEST])
    for cell, found in zip(FEATURES[TEST], predicted, strict=True):
        nearest = np.argsort(np.square(FEATURES[TRAIN] - cell).sum(1))[:10]
        assert found == np.bincount(CLASSES[TRAIN][nearest]).argmax()
    plain = KNeighborsClassifier(10).fit(FEATURES[TRAIN], CLASSES[TRAIN])
    np.testing.assert_array_equal(predicted, plain.predict(FEATURES[TEST]))


def test_linear_probe_equals_a_plain_pipeline():
    """At each strength; the best of them on validation cells speaks."""
    train, validation = TRAIN[:100], TRAIN[100:]
    plain = [make_pipeline(StandardScaler(), LogisticRegression(C=c, max_iter=5000)).fit(FEATURES[train], CLASSES[train])
             for c in (0.001, 0.01, 0.1, 1, 10)]
    reached = [balanced_accuracy_score(CLASSES[validation], one.predict(FEATURES[validation])) for one in plain]
    fitted, aside, asked = probes.standardised(FEATURES[train], FEATURES[validation], FEATURES[TEST])
    chosen = selection.choose_regression(fitted, CLASSES[train], aside, CLASSES[validation], asked)
    assert chosen.reached == pytest.approx(max(reached))
    assert chosen.strength == (0.001, 0.01, 0.1, 1, 10)[int(np.argmax(reached))]
    np.testing.assert_array_equal(chosen.predicted, plain[int(np.argmax(reached))].predict(FEATURES[TEST]))


def test_depth_is_read_where_it_is_and_not_where_it_is_not():
    log_totals = GENERATOR.normal(8, 1, 200)
    with_depth = np.column_stack([FEATURES, log_totals])
    plain = make_pipeline(StandardScaler(), Ridge()).fit(with_depth[TRAIN], log_totals[TRAIN]).predict(with_depth[TEST])
    predicted = probes.read_depth(with_depth[TRAIN], log_totals[TRAIN], with_depth[TEST])
    np.testing.assert_allclose(predicted, plain)
    assert probes.r_squared(log_totals[TEST], predicted[None]) > 0.99
    without = probes.read_depth(FEATURES[TRAIN], log_totals[TRAIN], FEATURES[TEST])
    assert probes.r_squared(log_totals[TEST], without[None]) < 0.2
    assert probes.r_squared(np.ones(3), np.ones((1, 3))) == 0


def test_log_normalised_counts_sum_to_ten_thousand():
    values = baselines.log_normalise(counts())
    np.testing.assert_allclose(np.expm1(values.toarray().astype(np.float64)).sum(1), 1e4, rtol=1e-5)
    empty = scipy.sparse.csr_matrix((2, 5), dtype=np.float32)
    assert baselines.log_normalise(empty).nnz == 0


def test_depth_features():
    features = baselines.depth_features(scipy.sparse.csr_matrix(np.array([[0, 3, 4], [1, 0, 0]], dtype=np.float32)))
    np.testing.assert_allclose(features, [[np.log(8), 2], [np.log(2), 1]])
    train, test = baselines.standardised(features, np.array([0, 1]), np.array([0]))
    np.testing.assert_allclose(train.mean(0), 0, atol=1e-12)
    np.testing.assert_allclose(test[0], [1, 1])


def test_principal_components_span_those_of_a_dense_solver_on_training_cells():
    values = baselines.log_normalise(counts())
    train, test = np.arange(100), np.arange(100, 120)
    fitted, held_out = baselines.principal_components(values, train, test)
    assert fitted.shape == (100, 50)
    dense = PCA(50, svd_solver="full").fit(values[train].toarray().astype(np.float64))
    expected = dense.transform(values[test].toarray())
    np.testing.assert_allclose(np.abs(held_out[:, :20]), np.abs(expected[:, :20]), atol=1e-3)  # signs are free
    again, _ = baselines.principal_components(values, train, test)
    np.testing.assert_array_equal(fitted, again)
    narrow, _ = baselines.principal_components(values[:, :10], train, test)
    assert narrow.shape == (100, 9)
    wide, aside, _ = baselines.principal_components(values, train, test[:5], test, components=70)
    assert (wide.shape, aside.shape) == ((100, 70), (5, 70))
    np.testing.assert_allclose(wide[:, :20], fitted[:, :20], atol=1e-2)  # the first ones of many are those of few


def test_variable_genes_are_those_of_the_largest_variance(monkeypatch):
    values = baselines.log_normalise(counts())
    monkeypatch.setattr(baselines, "VARIABLE_GENES", 40)
    variances = values.toarray().astype(np.float64).var(axis=0)
    np.testing.assert_array_equal(baselines.variable_genes(values), np.sort(np.argsort(-variances)[:40]))


def test_regression_on_genes_looks_at_training_cells_alone():
    values = baselines.log_normalise(counts())
    classes = np.arange(120) % 2
    values = scipy.sparse.csr_matrix(scipy.sparse.hstack([values, 30.0 * classes[:, None]]))
    train, test = np.arange(100), np.arange(100, 120)
    np.testing.assert_array_equal(baselines.regress_on_genes(values, classes, train, test), classes[test])
    poisoned = classes.copy()
    poisoned[test] = 7  # a class that only test cells have
    assert 7 not in baselines.regress_on_genes(values, poisoned, train, test)


@pytest.mark.parametrize(("classes", "expected"), [([0, 1, 1, 2], 1), ([2, 2, 0, 0], 0)])
def test_majority(classes, expected):
    np.testing.assert_array_equal(baselines.majority(np.array(classes), 3), [expected] * 3)
