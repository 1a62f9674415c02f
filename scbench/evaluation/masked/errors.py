"""Errors on masked genes: summed cell by cell, so that methods can be compared on resampled cells.

All values are log1p counts. A method's errors under one draw are float64 [cells, FIELDS]: sums over the masked genes of
each cell. Everything that is reported is a ratio of their totals, a masked gene counting the same whatever its cell.
"""

import numpy as np

from scbench.evaluation.scores import resamples

COUNT_BINS = {"1": 1, "2_10": 2, "over_10": 11}  # smallest raw count of each bin
_N = len(COUNT_BINS)
GENES, SQUARED = slice(0, _N), slice(_N, 2 * _N)  # masked genes and squared errors, by bin of the true count
VALUES, WEIGHTED, RELATIVE = 2 * _N, 2 * _N + 1, 2 * _N + 2  # sums of v, v e² and (e / v)², v the true value, e the error
FIELDS = RELATIVE + 1

Errors = dict[str, dict[str, np.ndarray]]  # method → draw → float64 [cells, FIELDS]


def error_sums(predicted: np.ndarray, counts: np.ndarray, cells: np.ndarray, n_cells: int) -> np.ndarray:
    """Errors of predictions, float64 [n_cells, FIELDS].

    Parameters
    ----------
    predicted
        float [M], predicted log1p counts.
    counts, cells
        int [M]: the true raw counts (at least 1), and the cells they are in, 0 … n_cells − 1.
    """
    truth = np.log1p(counts.astype(np.float64))
    squared = (predicted - truth) ** 2
    bins = np.searchsorted(list(COUNT_BINS.values()), np.maximum(counts, 1), side="right") - 1  # a fractional one under 1
    sums = np.zeros((n_cells, FIELDS))
    np.add.at(sums, (cells, GENES.start + bins), 1)
    np.add.at(sums, (cells, SQUARED.start + bins), squared)
    for field, values in [(VALUES, truth), (WEIGHTED, truth * squared), (RELATIVE, squared / truth**2)]:
        sums[:, field] = np.bincount(cells, weights=values, minlength=n_cells)
    return sums


def metrics(sums: np.ndarray) -> dict[str, float | None]:
    """What is reported of a method's errors; None for a bin of counts that no masked gene is in."""
    totals = sums.sum(axis=0).tolist()
    genes, squared = totals[GENES], totals[SQUARED]
    by_bin = zip(COUNT_BINS, genes, squared, strict=True)
    return {
        "masked_genes": int(sum(genes)),
        "mse": sum(squared) / sum(genes),
        "value_weighted": totals[WEIGHTED] / totals[VALUES],
        "relative": totals[RELATIVE] / sum(genes),
        **{f"mse_count_{name}": error / number if number else None for name, number, error in by_bin},
    }


def bootstrap(errors: Errors, seed: int) -> dict[tuple[str, str], np.ndarray]:
    """Mean squared errors of each method and draw: the value on all cells, then one a resample of the cells.

    float64 [1 + RESAMPLES]; the resamples are the same for all, so differences are paired.
    """
    keys = [(method, draw) for method, draws in errors.items() for draw in draws]
    sums = [errors[method][draw] for method, draw in keys]
    squared = np.stack([s[:, SQUARED].sum(axis=1) for s in sums], axis=1)
    genes = np.stack([s[:, GENES].sum(axis=1) for s in sums], axis=1)
    samples = [(w @ squared) / np.maximum(w @ genes, 1) for w in resamples(len(genes), seed)]  # few cells may hide no gene
    return dict(zip(keys, np.concatenate(samples).T, strict=True))
