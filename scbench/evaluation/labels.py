"""Labels of cells: which count as missing, and which classes are large enough to be predicted."""

from typing import NamedTuple

import numpy as np
import pandas as pd

from scbench.errors import UserError

MISSING = frozenset(["", "na", "n/a", "<na>", "nan", "none", "null", "unknown"])  # whatever the case, blanks around it ignored
SMALLEST_CLASS = 10
FEWEST_GROUPS = 3  # to train, validate and test on


class Classes(NamedTuple):
    """The classes that take part."""

    keep: np.ndarray  # bool [cells]: the cell's class takes part
    codes: np.ndarray  # int64 [kept cells]: the class's place in `names`
    names: list[str]  # ascending
    dropped: dict[str, int]  # classes under SMALLEST_CLASS cells or in under FEWEST_GROUPS groups, and their cells


def read_labels(obs: pd.DataFrame, column: str, source: str, option: str = "--label") -> np.ndarray:
    """The labels of all cells as strings, object [cells], None where one is missing.

    Missing are NaN, None and pandas.NA, and the words of MISSING in any case. Whole numbers are classes (cluster
    numbers, say), other numbers are not.
    """
    if column not in obs.columns:
        known = ", ".join(map(str, obs.columns)) or "none"
        raise UserError(f"{source} has no column {column!r} in obs: choose {option} among {known}.")
    values = obs[column]
    missing = values.isna().to_numpy()
    if pd.api.types.is_numeric_dtype(values.dtype) and not pd.api.types.is_bool_dtype(values.dtype):
        numbers = values.to_numpy(dtype=np.float64, na_value=np.nan)
        if not (np.rint(numbers[~missing]) == numbers[~missing]).all() or np.isinf(numbers).any():
            raise UserError(f"column {column!r} of {source} holds fractional numbers, not names: choose another {option}.")
        words = [None if gone else str(int(number)) for gone, number in zip(missing, numbers, strict=True)]
    else:
        words = [None if gone else str(value).strip() for gone, value in zip(missing, values, strict=True)]
    return np.array([None if word is None or word.lower() in MISSING else word for word in words], dtype=object)


def choose_classes(labels: np.ndarray, groups: np.ndarray | None = None) -> Classes:
    """Keep the classes with at least SMALLEST_CLASS cells and, where cells have groups, cells in FEWEST_GROUPS of them.

    `labels`, `groups`: str objects [cells], none missing.
    """
    names, codes, sizes = np.unique(labels.astype(str), return_inverse=True, return_counts=True)
    large = sizes >= SMALLEST_CLASS
    if groups is not None:
        pairs = np.unique(np.stack([codes, np.unique(groups.astype(str), return_inverse=True)[1]]), axis=1)
        large &= np.bincount(pairs[0], minlength=len(names)) >= FEWEST_GROUPS
    keep = large[codes]
    return Classes(
        keep=keep,
        codes=(np.cumsum(large) - 1)[codes[keep]],
        names=names[large].tolist(),
        dropped={str(name): int(size) for name, size in zip(names[~large], sizes[~large], strict=True)},
    )
