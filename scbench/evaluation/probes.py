"""What is asked of a frozen embedding: k-NN and linear classification, and how well depth can be read from it.

Every probe is fitted on training cells and predicts the test cells of the same fold.
"""

import numpy as np
from sklearn.linear_model import LogisticRegression, Ridge
from sklearn.neighbors import KNeighborsClassifier
from sklearn.preprocessing import StandardScaler

NEIGHBOURS = 10


def nearest_neighbours(train: np.ndarray, classes: np.ndarray, test: np.ndarray) -> np.ndarray:
    """The most frequent class among the 10 nearest training cells (Euclidean, unweighted), int64 [test cells]."""
    return KNeighborsClassifier(NEIGHBOURS).fit(train, classes).predict(test)


def standardised(train: np.ndarray, *others: np.ndarray) -> tuple[np.ndarray, ...]:
    """Features of training and other cells, [cells, D], standardised by the training cells."""
    scaler = StandardScaler().fit(train)
    return tuple(scaler.transform(part) for part in (train, *others))


def logistic_regression(train, classes: np.ndarray, test) -> np.ndarray:
    """Multinomial logistic regression (L2, C = 1) on features as they are, dense or CSR; int64 [test cells]."""
    return LogisticRegression(C=1.0, max_iter=5000).fit(train, classes).predict(test)


def ridge(train: np.ndarray, log_totals: np.ndarray, test: np.ndarray) -> np.ndarray:
    """Log total counts of the test cells, float64, by ridge regression (α = 1) on features that are standardised."""
    return Ridge(alpha=1.0).fit(train, log_totals).predict(test)


def read_depth(train: np.ndarray, log_totals: np.ndarray, test: np.ndarray) -> np.ndarray:
    """The same on features as they are, standardised by the training cells."""
    train, test = standardised(train, test)
    return ridge(train, log_totals, test)


def r_squared(truth: np.ndarray, predictions: np.ndarray) -> float:
    """1 − SSE / SST, the mean over repetitions; 0 if the truth is constant. `predictions`: [repetitions, cells]."""
    total = np.square(truth - truth.mean()).sum()
    if total == 0:
        return 0.0
    return float(np.mean(1 - np.square(predictions - truth).sum(axis=1) / total))
