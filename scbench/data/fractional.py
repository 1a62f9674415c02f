"""Counts that are not whole: refused, rounded or kept (--fractional), and told from values that were normalised."""

from typing import NamedTuple

import numpy as np

from scbench.config import Fractional
from scbench.data.cells import MAX_COUNT, sum_by_cell
from scbench.data.counts import FRACTIONAL, INEXACT_DISTANCE, Problem, find_problem

LEAST_VALUES = 20  # fractional values that can tell whether a cell's are multiples of one unit
MULTIPLES_SHARE = 0.95  # of them: from here on they are. One in five values that are no multiples looks like one
LEAST_CELLS = 5  # that can tell whether all cells have one sum
SUMS_SPREAD = 1e-3  # standard deviation over mean of the cells' sums: below, they were scaled to one
LARGEST_LOGARITHM = 32.0  # of a count below 2³², to the base 2; larger values are no logarithms
PLAIN_UNITS = 20  # 1, 1/2, … 1/20: what shared reads are counted in. Counts scaled cell by cell have other units


class Accepted(NamedTuple):
    """Values as counts."""

    counts: np.ndarray  # uint32 [nnz]; floating, as the values were, if fractional ones are kept
    fractional: int  # values that were not whole
    distance: float  # the largest of theirs to a whole number


def accept_counts(values: np.ndarray, offsets: np.ndarray, fractional: Fractional) -> tuple[Accepted | None, Problem | None]:
    """The counts that `values` [nnz] are (a cell's start at `offsets` [cells+1]), or else the first that is none, and why.

    Fractional ones are refused, rounded (half to even) or kept; but never if they look normalised (`disguise`).
    """
    problem = find_problem(values)
    if problem is None:
        return Accepted(values.astype(np.uint32), 0, 0.0), None
    if problem.reason != FRACTIONAL or fractional == "refuse":
        return None, problem
    wide = values.astype(np.float64)
    whole = np.rint(wide)
    if whole.max() > MAX_COUNT:
        position = int(whole.argmax())
        return None, Problem("values over 2³²−1", position, float(wide[position]))
    found = disguise(wide, offsets)
    if found is not None:
        return None, Problem(found, problem.position, problem.value)
    distances = np.abs(wide - whole)
    kept = np.result_type(values.dtype, np.float32)  # float32 or float64
    counts = whole.astype(np.uint32) if fractional == "round" else values.astype(kept)
    return Accepted(counts, int(np.count_nonzero(distances)), float(distances.max())), None


def disguise(values: np.ndarray, offsets: np.ndarray) -> str | None:
    """What `values`, float64 [nnz], seem to be instead of counts of the cells that start at `offsets`; None if nothing.

    For the values themselves and for what they are logarithms of (ln(1 + x), log₂(1 + x)), two signs are looked for: a cell's
    fractional values are multiples of its smallest one, so that they are counts times a factor a cell; or all cells have one
    sum. Normalised values of a part of the genes whose counts were not whole show neither.
    """
    forms = {"values scaled cell by cell": values}
    if values.max(initial=0) <= LARGEST_LOGARITHM:
        forms |= {"log-normalised values": np.expm1(values), "log2-normalised values": np.exp2(values) - 1}
    fractional = values != np.rint(values)
    for name, scaled in forms.items():
        sums = sum_by_cell(scaled, offsets)
        sums = sums[sums > 0]
        one_sum = len(sums) >= LEAST_CELLS and sums.std() < SUMS_SPREAD * sums.mean()
        if one_sum or _multiples(scaled, fractional, offsets, plain_units=scaled is values):
            return name
    return None


def _multiples(scaled: np.ndarray, fractional: np.ndarray, offsets: np.ndarray, *, plain_units: bool) -> bool:
    """Whether the values that were fractional are multiples of their cell's smallest value.

    `plain_units`: cells whose smallest value is 1, 1/2, … say nothing, as counts may be shared in such parts.
    """
    cells = np.repeat(np.arange(len(offsets) - 1), np.diff(offsets))
    units = np.full(len(offsets) - 1, np.inf)
    positive = scaled > 0
    np.minimum.at(units, cells[positive], scaled[positive])
    ratios = scaled / units[cells]
    telling = fractional & (ratios > 1.5)
    if plain_units:
        parts = 1 / units
        telling &= ((np.abs(parts - np.rint(parts)) > 1e-3) | (parts > PLAIN_UNITS))[cells]
    if np.count_nonzero(telling) < LEAST_VALUES:
        return False
    ratios = ratios[telling]
    return np.mean(np.abs(ratios - np.rint(ratios)) <= INEXACT_DISTANCE) >= MULTIPLES_SHARE
