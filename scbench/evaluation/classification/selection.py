"""One grid of strengths for every linear method, chosen on validation cells."""

from typing import NamedTuple

import numpy as np
from sklearn.linear_model import LogisticRegression

GRID = (0.001, 0.01, 0.1, 1.0, 10.0)  # C of logistic regression: the inverse of the penalty's strength
MOST_ITERATIONS = 5000


class Chosen(NamedTuple):
    """The regression that was chosen, and what it says of test cells."""

    predicted: np.ndarray  # int64 [test cells]
    strength: float  # of GRID
    reached: float  # balanced accuracy on the validation cells


def balanced_accuracy(truth: np.ndarray, predicted: np.ndarray) -> float:
    """The mean over the classes of `truth` of the share of its cells that are called so."""
    sizes = np.bincount(truth)
    hits = np.bincount(truth[truth == predicted], minlength=len(sizes))
    return float(np.mean(hits[sizes > 0] / sizes[sizes > 0]))


def choose_regression(train, classes: np.ndarray, validation, truth: np.ndarray, test) -> Chosen:
    """Multinomial logistic regression (L2) at each strength of the grid, fitted on training cells; the one with the highest
    balanced accuracy on the validation cells speaks of the test cells. The stronger penalty wins where two are equal.

    Each is fitted from zero: started where the last one ended, the solver stops too early, and elsewhere than one alone.

    Parameters
    ----------
    train, validation, test
        Features as they are, dense or CSR [cells, D].
    classes, truth
        int64: the classes of training and validation cells. Those of test cells are not asked for.
    """
    best = None
    for strength in GRID:
        model = LogisticRegression(C=strength, max_iter=MOST_ITERATIONS).fit(train, classes)
        reached = balanced_accuracy(truth, model.predict(validation))
        if best is None or reached > best[0]:
            best = reached, strength, model
    reached, strength, model = best
    return Chosen(model.predict(test), strength, reached)
