"""Raw counts or not: the test of values, the way back from log1p, and the recovery from log-normalised values."""

from typing import NamedTuple

import numpy as np

from scbench.data.cells import MAX_COUNT

INEXACT_DISTANCE = 0.1  # a recovered value farther than this from an integer is inexact
INEXACT_SHARE = 0.005  # more of them than this and the values are not log1p of scaled counts
EXACT_COUNT = 300_000  # up to here, log1p in float32 tells every whole number from the next


FRACTIONAL = "fractional values"
TAKE_FRACTIONAL = "; if they are counts all the same, take them with --fractional round or keep"


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
        (FRACTIONAL, wide != np.rint(wide)),
        ("values over 2³²−1", wide > MAX_COUNT),
    ):
        if bad.any():
            position = int(np.argmax(bad))
            return Problem(reason, position, float(wide[position]))
    raise AssertionError("values failed the integer test for no reason")


def undo_log1p(values: np.ndarray, fractional: bool = False) -> tuple[np.ndarray, Problem | None]:
    """Counts from log1p(count) in float32 or float64, and what is wrong with the values if they are no such thing.

    A value is accepted if its expm1 lies as near to a whole number c as float32 storage leaves it: within
    1e-3 + 2 (c + 1) log1p(c) 2⁻²⁴. Past EXACT_COUNT that is no test any more, and the nearest whole number is a guess.

    Parameters
    ----------
    values
        Numbers [n].
    fractional
        Give expm1 of a value that is not accepted, instead of calling it a problem.

    Returns
    -------
    Whole numbers, float64 [n] (of no use if there is a problem), and the first problem.
    """
    wide = values.astype(np.float64)
    with np.errstate(all="ignore"):  # values out of range are found below
        scaled = np.expm1(wide)
        counts = np.rint(scaled)
        too_far = np.abs(scaled - counts) > 1e-3 + 2 * (counts + 1) * np.log1p(counts) * 2.0**-24
        too_far &= counts <= EXACT_COUNT
    if fractional:
        counts = np.where(too_far, scaled, counts)
        too_far[:] = False
    for reason, bad in (
        ("NaN", np.isnan(wide)),
        ("negative values", wide < 0),
        ("values over log1p(2³²−1)", counts > MAX_COUNT),
        ("values whose expm1 is no whole number", too_far),
    ):
        if bad.any():
            position = int(np.argmax(bad))
            return counts, Problem(reason, position, float(wide[position]))
    return counts, None


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
