"""Raw counts or not: the test of values, and the recovery of counts from log-normalised values."""

from typing import NamedTuple

import numpy as np

from scbench.data.cells import MAX_COUNT

INEXACT_DISTANCE = 0.1  # a recovered value farther than this from an integer is inexact
INEXACT_SHARE = 0.005  # more of them than this and the values are not log1p of scaled counts


class Problem(NamedTuple):
    """Why values are not counts: what is wrong, and the first value that shows it."""

    reason: str
    position: int
    value: float


def find_problem(values: np.ndarray) -> Problem | None:
    """None if all `values` [n] are integers in 0 … 2³²−1, whatever their dtype; else the first that is not, and why."""
    if values.dtype.kind not in "buif":
        return Problem(f"values of type {values.dtype}", 0, float("nan"))
    if len(values) == 0 or values.dtype.kind == "b":
        return None
    low, high = values.min().item(), values.max().item()  # NaN spreads into both
    if low >= 0 and high <= MAX_COUNT and (values.dtype.kind in "ui" or bool((values == values.astype(np.uint32)).all())):
        return None
    wide = values.astype(np.float64)
    for reason, bad in (
        ("NaN", np.isnan(wide)),
        ("infinite values", np.isinf(wide)),
        ("negative values", wide < 0),
        ("fractional values", wide != np.rint(wide)),
        ("values over 2³²−1", wide > MAX_COUNT),
    ):
        if bad.any():
            position = int(np.argmax(bad))
            return Problem(reason, position, float(wide[position]))
    raise AssertionError("values failed the integer test for no reason")


class Recovery(NamedTuple):
    """Counts brought back from log1p(count × unit), a unit a cell."""

    counts: np.ndarray  # float64 [nnz], whole numbers
    inexact: np.ndarray  # bool [nnz], value / unit lies over INEXACT_DISTANCE from an integer
    units: np.ndarray  # float64 [cells], NaN for a cell without values


def recover(values: np.ndarray, offsets: np.ndarray) -> Recovery:
    """Bring counts back from log-normalised values, on the assumption that a cell's smallest value is one count.

    A cell's values are log1p(count × unit). The unit is first the smallest expm1(value), then the least squares fit of
    expm1(value) to the counts that this gives, which takes the rounding of the stored values out of large counts.

    Parameters
    ----------
    values
        float [nnz], finite and not negative; zeros stay zeros.
    offsets
        int64 [cells+1], where each cell starts.
    """
    n_cells = len(offsets) - 1
    cells = np.repeat(np.arange(n_cells), np.diff(offsets))
    scaled = np.expm1(values.astype(np.float64))
    units = np.full(n_cells, np.inf)
    positive = scaled > 0
    np.minimum.at(units, cells[positive], scaled[positive])
    empty = np.isinf(units)
    units[empty] = 1.0
    counts = np.rint(scaled / units[cells])
    squares = np.bincount(cells, weights=counts * counts, minlength=n_cells)
    products = np.bincount(cells, weights=counts * scaled, minlength=n_cells)
    units = np.where(empty, 1.0, products / np.where(empty, 1.0, squares))
    ratios = scaled / units[cells]
    counts = np.rint(ratios)
    return Recovery(counts, np.abs(ratios - counts) > INEXACT_DISTANCE, np.where(empty, np.nan, units))
