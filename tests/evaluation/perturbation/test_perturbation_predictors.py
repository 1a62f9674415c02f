"""Ridge, contexts and baselines on changes that are known."""

import numpy as np
import pytest
from scipy.spatial.distance import cdist
from sklearn.linear_model import Ridge

from scbench.evaluation.perturbation import baselines, context, ridge
from scbench.evaluation.perturbation.changes import Changes, context_means, gene_list, group_means

SINGLES = [("A",), ("B",), ("C",), ("D",), ("A", "B"), ("A", "E")]


@pytest.fixture
def generator():
    return np.random.default_rng(0)


def changes(generator, perturbation, where, contexts=2, genes=7) -> Changes:
    shape = (len(perturbation), genes)
    return Changes.of(np.array(perturbation), np.array(where), generator.normal(size=shape), np.ones(shape, bool), contexts)


def test_ridge_equals_scikit_learn_in_one_context(generator):
    features, fitted = generator.normal(size=(6, 3)), changes(generator, [0, 1, 2, 3], [0, 0, 0, 0], 1)
    train = features[:4] - features[:4].mean(axis=0)
    scale = np.square(train).sum(axis=1).mean()
    found = ridge.predict(features, fitted, np.array([4, 5]), np.array([0, 0]), (0.01, 1.0))
    for row, strength in enumerate((0.01, 1.0)):
        plain = Ridge(alpha=strength * scale).fit(features[:4], fitted.change)
        np.testing.assert_allclose(found[row], plain.predict(features[4:]), atol=1e-8)


def test_ridge_is_centred_in_each_context(generator):
    """A context's own mean change is neither learnt from nor lost."""
    features, fitted = generator.normal(size=(6, 3)), changes(generator, [0, 1, 2, 0, 1, 2], [0, 0, 0, 1, 1, 1])
    first = ridge.predict(features, fitted, np.array([4]), np.array([1]), (0.1,))[0]
    shifted = fitted.change + np.where(fitted.context == 1, 5.0, 0.0)[:, None]
    other = Changes.of(fitted.perturbation, fitted.context, shifted, fitted.scored, 2)
    np.testing.assert_allclose(ridge.predict(features, other, np.array([4]), np.array([1]), (0.1,))[0], first + 5)


def test_equal_features_say_nothing_but_the_mean(generator):
    fitted = changes(generator, [0, 1, 2, 3], [0, 0, 1, 1])
    found = ridge.predict(np.ones((6, 3)) * 0.1, fitted, np.array([4, 5]), np.array([0, 1]), (1e-3, 1e3))
    np.testing.assert_array_equal(found, np.repeat(fitted.mean[None], 2, axis=0))


def test_the_strength_is_chosen_on_what_was_not_fitted(generator):
    """Features that determine the change want a weak ridge, features that don't a strong one; own targets don't count."""
    features = generator.normal(size=(40, 3))
    change = features @ generator.normal(size=(3, 9))
    fitted = Changes.of(np.arange(40), np.zeros(40, dtype=int), change, np.ones((40, 9), bool), 1)

    def chosen(features, fitted):
        inner = ridge.validation_folds(fitted, fitted.perturbation)
        assert sum(len(validation.change) for _, validation in inner) == 40
        return ridge.STRENGTHS[ridge.choose(
            ridge.STRENGTHS, inner, lambda a, b: ridge.predict(features, a, b.perturbation, b.context, ridge.STRENGTHS)
        )]

    assert chosen(features, fitted) == ridge.STRENGTHS[0]
    assert chosen(generator.normal(size=(40, 3)), fitted) > 1
    noisy = fitted._replace(change=np.concatenate([change, 100 * generator.normal(size=(40, 30))], axis=1),
                            scored=np.repeat(np.arange(39)[None] < 9, 40, axis=0), mean=np.zeros((1, 39)))
    assert chosen(features, noisy) == ridge.STRENGTHS[0]


def test_contexts_weigh_by_their_likeness(generator):
    centroids = generator.normal(size=(4, 5))
    fitted = changes(generator, [0, 0, 0, 1], [0, 1, 2, 2], 4)
    found = context.predict(centroids, fitted, np.array([0, 1, 2]), np.array([3, 3, 3]), (0.3, np.inf))
    squared = cdist(centroids, centroids) ** 2
    weights = np.exp(-squared[3, :3] / (0.3 * np.median(squared[np.triu_indices(4, 1)])))
    np.testing.assert_allclose(found[0, 0], np.average(fitted.change[:3], axis=0, weights=weights))
    np.testing.assert_allclose(found[1, 0], fitted.change[:3].mean(axis=0))
    np.testing.assert_allclose(found[:, 1], np.repeat(fitted.change[3:], 2, axis=0))
    np.testing.assert_allclose(found[:, 2], np.repeat(fitted.mean[3:], 2, axis=0))  # never measured


def test_baselines(generator):
    fitted = changes(generator, [0, 1, 2, 0], [0, 0, 0, 1])
    a, b, c, a_elsewhere = fitted.change
    asked, here = np.array([3, 4, 5, 0]), np.array([0, 0, 0, 0])  # D, A+B, A+E, A
    mean = (a + b + c) / 3
    assert (baselines.no_change(fitted, asked, here) == 0).all()
    np.testing.assert_allclose(baselines.train_mean(fitted, asked, here), np.repeat(mean[None], 4, axis=0))
    own = baselines.own_mean(fitted, asked, here)
    np.testing.assert_array_equal(own[3], a)
    assert np.isnan(own[:3]).all()
    additive = baselines.additive(fitted, asked, here, SINGLES)
    np.testing.assert_allclose(additive[1], a + b)
    assert np.isnan(additive[[0, 2, 3]]).all()  # single; E was never measured; single
    assert np.isnan(baselines.additive(fitted, asked[1:2], np.array([1]), SINGLES)).all()  # B was not, in this context
    matching = baselines.matching_mean(fitted, asked, here, SINGLES)
    np.testing.assert_allclose(matching, [mean, (a + b) / 2, (a + mean) / 2, (a + a_elsewhere) / 2])


def test_means_and_genes(planted, read):
    cells = read(planted(["GENE0", "GENE1"], cells=20, contexts=("a", "b")))
    dense = cells.values.toarray()
    means = group_means(cells.values, cells.pair, len(cells.pair_context))
    for pair in range(4):
        np.testing.assert_allclose(means[pair], dense[cells.pair == pair].mean(axis=0), rtol=1e-5)
    assert np.isnan(group_means(cells.values, np.full(len(dense), 1), 2)[0]).all()
    dense[:, [3, 7]] = 0
    assert gene_list(type(cells.values)(dense)).tolist() == [gene for gene in range(80) if gene not in (3, 7)]
    np.testing.assert_allclose(context_means(np.arange(6.0).reshape(3, 2), np.array([0, 0, 2]), 3), [[1, 2], [2, 3], [4, 5]])
