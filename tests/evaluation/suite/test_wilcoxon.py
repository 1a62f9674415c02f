"""Tests over data sets are scipy's on the same numbers, and are refused in words where they cannot find anything."""

import numpy as np
import pytest
from scipy.stats import wilcoxon as plain

from scbench.evaluation.suite.wilcoxon import BEST, FEWEST, compare_over_sets, sentences

KINDS = {
    ("ours", "linear"): "model", ("PCA", "linear"): "baseline", ("majority", "none"): "baseline", ("half", "none"): "ceiling",
}


def planted(sets: int, shift: float = 0.05) -> dict:
    """Scores of data sets; PCA is the best baseline on even ones, the majority on odd ones."""
    generator = np.random.default_rng(3)
    scores = {}
    for number in range(sets):
        high = generator.uniform(0.4, 0.8)
        pair = (high, high - 0.1) if number % 2 == 0 else (high - 0.1, high)
        scores[f"set {number}"] = {
            ("ours", "linear"): high + shift + generator.normal(0, 0.03), ("PCA", "linear"): pair[0],
            ("majority", "none"): pair[1], ("half", "none"): 0.99,
        }
    return scores


@pytest.mark.parametrize("sign", [1, -1])
def test_equals_scipy(sign):
    scores = planted(9)
    found = {one["baseline"]: one for one in compare_over_sets(scores, KINDS, sign)}
    assert set(found) == {BEST, "PCA", "majority"}
    ours = np.array([one["ours", "linear"] for one in scores.values()])
    others = {name: np.array([one[method] for one in scores.values()])
              for name, method in [("PCA", ("PCA", "linear")), ("majority", ("majority", "none"))]}
    others[BEST] = (np.maximum if sign == 1 else np.minimum)(others["PCA"], others["majority"])
    for name, other in others.items():
        assert found[name]["p"] == pytest.approx(plain(ours - other).pvalue)
        assert found[name]["median_difference"] == pytest.approx(np.median(ours - other))
        assert found[name]["better"] == (sign * ours > sign * other).sum()
        assert found[name]["data_sets"] == 9


def test_too_few_data_sets_are_refused_in_words():
    found = compare_over_sets(planted(FEWEST - 1), KINDS, 1)
    assert all(one["p"] is None for one in found)
    said = sentences(found, "accuracy")
    assert "of 5, median difference" in said[0] and "no test" in said[0]
    assert "fewer than 6 data sets that differ" in said[-1] and "cannot reach p < .05" in said[-1]
    assert plain(np.arange(1, FEWEST)).pvalue > 0.05 >= plain(np.arange(1, FEWEST + 1)).pvalue  # why it is 6


def test_data_sets_count_only_where_both_have_a_score_and_differ():
    scores = planted(8)
    del scores["set 0"]["PCA", "linear"]
    scores["set 2"]["ours", "linear"] = scores["set 2"]["PCA", "linear"]
    scores["set 4"]["ours", "linear"] = scores["set 4"]["PCA", "linear"]
    found = {one["baseline"]: one for one in compare_over_sets(scores, KINDS, 1)}
    assert (found["PCA"]["data_sets"], found["PCA"]["p"]) == (7, None)
    assert found["majority"]["data_sets"] == 8 and found["majority"]["p"] is not None
    assert len(sentences(list(found.values()), "accuracy")) == 3


def test_nothing_to_compare_says_nothing():
    assert sentences(compare_over_sets({}, {}, 1), "accuracy") == []
