"""Models against baselines over data sets: the Wilcoxon signed-rank test, where there are enough data sets for one.

A data set is one pair of scores, however many cells it has. The best baseline of a data set is the one with the best score on
it, whichever that is; it was not chosen on other cells, so this comparison is against the model rather than for it.
"""

import numpy as np
from scipy.stats import wilcoxon

FEWEST = 6  # data sets; with n of them no two-sided p is under 2 / 2ⁿ, .0625 for n = 5
BEST = "the best baseline of each data set"
Method = tuple[str, str]  # model and probe of a row


def compare_over_sets(scores: dict[str, dict[Method, float]], kinds: dict[Method, str], sign: int) -> list[dict]:
    """Every model's rows against the best baseline and against every baseline.

    Parameters
    ----------
    scores
        Of each data set: the score of each method that it has.
    kinds
        "model" or "baseline"; other methods take no part.
    sign
        1 where a larger score is better, −1 where a smaller one is.

    Returns
    -------
    For each pair: model, probe, baseline, baseline_probe (None for the best), data_sets that have both, better (in how many
    the model is), median_difference (model − baseline), p (two-sided; None with fewer than FEWEST differences other than 0).
    """
    models = [method for method, kind in kinds.items() if kind == "model"]
    baselines = [method for method, kind in kinds.items() if kind == "baseline"]
    found = []
    for model in models:
        having = [by_method for by_method in scores.values() if model in by_method]
        best = [(one[model], max((one[other] for other in baselines if other in one), key=lambda value: sign * value))
                for one in having if any(other in one for other in baselines)]
        pairs = {(BEST, None): best}
        pairs |= {other: [(one[model], one[other]) for one in having if other in one] for other in baselines}
        for (baseline, probe), values in pairs.items():
            if values:
                found.append({"model": model[0], "probe": model[1], "baseline": baseline, "baseline_probe": probe,
                              **_test(np.array(values), sign)})
    return found


def _test(pairs: np.ndarray, sign: int) -> dict:
    """The test of scores [data sets, 2] of a model and a baseline."""
    differences = pairs[:, 0] - pairs[:, 1]
    enough = np.count_nonzero(differences) >= FEWEST
    return {
        "data_sets": len(differences), "better": int((sign * differences > 0).sum()),
        "median_difference": float(np.median(differences)),
        "p": float(wilcoxon(differences).pvalue) if enough else None,
    }


def sentences(tests: list[dict], metric: str) -> list[str]:
    """What the tests say, in words."""
    if not tests:
        return []
    said = [_against_best(one, metric) for one in tests if one["baseline"] == BEST]
    made = [one for one in tests if one["p"] is not None]
    if made:
        said.append(f"Over data sets by {metric}: {len(made)} Wilcoxon signed-rank tests, two-sided, not corrected for their "
                    "number (results.json has those against each baseline).")
    if len(made) < len(tests):
        said.append(f"Over data sets by {metric}: no test is made of fewer than {FEWEST} data sets that differ, because the "
                    "Wilcoxon signed-rank test cannot reach p < .05 with them.")
    return said


def _against_best(one: dict, metric: str) -> str:
    counted = f"{one['better']} of {one['data_sets']}"
    test = "no test" if one["p"] is None else f"Wilcoxon signed-rank p = {one['p']:.2g}"
    return (f"By {metric} {one['model']} ({one['probe']}) is better than {BEST} in {counted}, median difference "
            f"{one['median_difference']:+.3g}, {test}.")
