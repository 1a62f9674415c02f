"""Probabilities that mean what they say, and the limits beyond which a cell is left unassigned.

Both are chosen on validation cells. Temperature: one number that divides all logits (Guo et al., "On calibration of modern
neural networks", ICML 2017). A cell is left unassigned if its probability is too small or it lies too far from every class.
"""

import math

import numpy as np
from scipy.optimize import minimize_scalar
from scipy.special import logsumexp, softmax

LEAST_TEMPERATURE, LARGEST_TEMPERATURE = 0.05, 20.0


def fit_temperature(logits: np.ndarray, classes: np.ndarray) -> float:
    """The temperature, of 0.05 to 20, with the lowest cross-entropy. `logits` [cells, classes], `classes` int [cells]."""
    logits = logits.astype(np.float64)
    bounds = math.log(LEAST_TEMPERATURE), math.log(LARGEST_TEMPERATURE)

    def loss(log_temperature: float) -> float:
        return cross_entropy(logits * math.exp(-log_temperature), classes)

    return math.exp(minimize_scalar(loss, bounds=bounds, method="bounded").x)


def cross_entropy(logits: np.ndarray, classes: np.ndarray) -> float:
    """The mean of −ln p(true class)."""
    return float(np.mean(logsumexp(logits, axis=1) - logits[np.arange(len(classes)), classes]))


def probabilities(logits: np.ndarray, temperature: float) -> np.ndarray:
    """float64 [cells, classes]."""
    return softmax(logits.astype(np.float64) / temperature, axis=1)


def limits(best: np.ndarray, distances: np.ndarray, coverage: float) -> tuple[float, float]:
    """The strictest (smallest probability, largest distance) that leave at least `coverage` of the cells assigned.

    Each alone leaves out at most half of the others. `best`: each cell's largest probability; `distances` from the classes.
    """
    kept = max(1, math.ceil((1 + coverage) / 2 * len(best) - 1e-9))
    return float(np.sort(best)[len(best) - kept]), float(np.sort(distances)[kept - 1])


def calibration_error(best: np.ndarray, right: np.ndarray, bins: int = 10) -> float:
    """How far confidence is from accuracy: the mean gap over bins of confidence, weighted by cells (the ECE of Guo et al.)."""
    place = np.minimum((best * bins).astype(int), bins - 1)
    gaps = [abs(best[place == bin_].sum() - right[place == bin_].sum()) for bin_ in range(bins)]
    return float(np.sum(gaps) / len(best))
