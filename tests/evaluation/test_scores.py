"""Folds, scores, confusion and bootstrap intervals, against scikit-learn and the binomial law."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import binom
from sklearn.metrics import accuracy_score, balanced_accuracy_score, confusion_matrix, f1_score

from scbench.evaluation.scores import RESAMPLES, confusion, interval, resamples, score, stratified_folds, verdict


def random_hashes(n: int) -> np.ndarray:
    return np.random.default_rng(n).integers(0, 2**63, n, dtype=np.uint64)


@settings(deadline=None, max_examples=30)
@given(st.lists(st.integers(10, 60), min_size=2, max_size=6), st.integers(2, 10), st.integers(0, 5))
def test_folds_spread_every_class_and_all_cells_evenly(sizes, folds, seed):
    classes = np.repeat(np.arange(len(sizes)), sizes)
    fold = stratified_folds(classes, random_hashes(len(classes)), folds, seed, 0)
    for cells in [*(fold[classes == c] for c in range(len(sizes))), fold]:
        counts = np.bincount(cells, minlength=folds)
        assert counts.max() - counts.min() <= 1
        assert len(counts) == folds


def test_folds_follow_the_cells_not_their_rows_and_differ_between_repetitions_and_seeds():
    classes = np.arange(200) % 3
    hashes = random_hashes(200)
    fold = stratified_folds(classes, hashes, 5, 0, 0)
    shuffled = np.random.default_rng(0).permutation(200)
    np.testing.assert_array_equal(stratified_folds(classes[shuffled], hashes[shuffled], 5, 0, 0), fold[shuffled])
    assert (stratified_folds(classes, hashes, 5, 0, 1) != fold).mean() > 0.5
    assert (stratified_folds(classes, hashes, 5, 1, 0) != fold).mean() > 0.5


def test_scores_equal_scikit_learns_mean_over_repetitions():
    generator = np.random.default_rng(0)
    truth = np.repeat(np.arange(4), [80, 40, 20, 12])
    predicted = np.where(generator.random((3, len(truth))) < 0.6, truth, generator.integers(0, 4, (3, len(truth))))
    found = score(truth, {"method": predicted}, seed=0)["method"]
    assert found.accuracy.shape == found.macro_f1.shape == (1 + RESAMPLES,)
    assert found.accuracy[0] == pytest.approx(np.mean([accuracy_score(truth, p) for p in predicted]), abs=1e-12)
    assert found.macro_f1[0] == pytest.approx(np.mean([f1_score(truth, p, average="macro") for p in predicted]), abs=1e-12)
    balanced = np.mean([balanced_accuracy_score(truth, p) for p in predicted])
    assert found.balanced_accuracy[0] == pytest.approx(balanced, abs=1e-12)
    expected = sum(confusion_matrix(truth, p, labels=range(5)) for p in predicted)
    np.testing.assert_array_equal(confusion(truth, predicted, 5), expected)


def test_interval_of_accuracy_is_close_to_the_binomial_one():
    truth = np.arange(400) % 2
    predicted = truth.copy()
    predicted[:120] = 1 - predicted[:120]  # accuracy .7
    found = interval(score(truth, {0: predicted[None]}, seed=3)[0].accuracy)
    low, high = binom.ppf([0.025, 0.975], 400, 0.7) / 400
    assert found.value == pytest.approx(0.7)
    assert found.low == pytest.approx(low, abs=0.01)
    assert found.high == pytest.approx(high, abs=0.01)


def test_macro_f1_of_resamples_has_the_scatter_of_scikit_learns():
    generator = np.random.default_rng(1)
    truth = np.repeat(np.arange(3), [60, 30, 15])
    predicted = np.where(generator.random(len(truth)) < 0.7, truth, 0)
    draws = generator.integers(0, len(truth), (1000, len(truth)))
    expected = np.percentile([f1_score(truth[d], predicted[d], average="macro") for d in draws], [2.5, 97.5])
    found = interval(score(truth, {0: predicted[None]}, seed=0)[0].macro_f1)
    np.testing.assert_allclose([found.low, found.high], expected, atol=0.03)


def test_methods_share_the_resamples():
    truth = np.arange(300) % 3
    worse = truth.copy()
    worse[:30] = (worse[:30] + 1) % 3
    scores = score(truth, {"same": worse[None], "again": worse[None], "perfect": truth[None]}, seed=0)
    np.testing.assert_array_equal(scores["same"].accuracy, scores["again"].accuracy)
    np.testing.assert_array_equal(scores["perfect"].accuracy, 1.0)
    difference = interval(scores["perfect"].accuracy - scores["same"].accuracy)
    assert 0.05 < difference.low < 0.1 < difference.high < 0.15


def test_the_seed_decides():
    truth = np.arange(50) % 2
    predicted = {0: np.zeros((1, 50), dtype=np.int64)}
    first, again, other = (score(truth, predicted, seed)[0].accuracy for seed in (0, 0, 1))
    np.testing.assert_array_equal(first, again)
    assert (first != other).any()


def test_a_paired_bootstrap_over_groups_equals_its_few_lines():
    """A resample draws groups: of 9 donors, some cells count twice and some not at all, and all methods see the same ones."""
    generator = np.random.default_rng(4)
    donors = generator.integers(0, 9, 200)
    truth = generator.integers(0, 3, 200)
    predicted = {name: np.where(generator.random((2, 200)) < share, truth, 0) for name, share in [("a", 0.8), ("b", 0.6)]}
    found = score(truth, predicted, 7, donors)
    rows = np.concatenate(list(resamples(9, 7)))
    assert rows.shape == (1 + RESAMPLES, 9)
    assert (rows.sum(axis=1) == 9).all()
    for number in (0, 1, 500, 1000):
        drawn = np.concatenate([np.tile(np.flatnonzero(donors == d), int(times)) for d, times in enumerate(rows[number])])
        for name, repetitions in predicted.items():
            for metric, oracle in [
                ("accuracy", accuracy_score), ("balanced_accuracy", balanced_accuracy_score),
                ("macro_f1", lambda t, p: f1_score(t, p, average="macro", labels=np.unique(t))),
            ]:
                expected = np.mean([oracle(truth[drawn], p[drawn]) for p in repetitions])
                assert getattr(found[name], metric)[number] == pytest.approx(expected, abs=1e-12)
    difference = interval(found["a"].accuracy - found["b"].accuracy)
    low, high = np.percentile((found["a"].accuracy - found["b"].accuracy)[1:], [2.5, 97.5])
    assert (difference.low, difference.high) == (low, high)


def test_what_an_interval_says_in_words():
    assert verdict("accuracy", 0.1, 0.2) == "beats" and verdict("accuracy", -0.2, -0.1) == "loses to"
    assert verdict("mse", -0.2, -0.1) == "beats" and verdict("mse", 0.1, 0.2) == "loses to"
    for low, high in [(-0.1, 0.1), (0.0, 0.1), (-0.1, 0.0), (1e-18, 0.1), (-0.1, -1e-18)]:  # rounding is no difference
        assert verdict("accuracy", low, high) == verdict("mse", low, high) == "is not clearly apart from"
