"""Controls that don't match: what "no change" would score if they were pooled, which is how contexts pass for effects."""

from typing import NamedTuple

import numpy as np
import pandas as pd

from scbench.evaluation.labels import MISSING
from scbench.evaluation.perturbation.cells import SMALLEST, PerturbedCells
from scbench.evaluation.perturbation.changes import gene_list, group_means
from scbench.evaluation.perturbation.metrics import pearson

CAUGHT = 0.5  # mean correlation from which on pooled controls are told
MOST_VALUES = 50  # of a column that may be a context


class Pooled(NamedTuple):
    """What "no change" scores against pooled controls."""

    column: str
    pearson: float  # mean over pairs


def pooled_score(cells: PerturbedCells, coarse: np.ndarray, fine: np.ndarray) -> float | None:
    """The mean Pearson correlation of "each cell stays as the controls of its `fine` group" with the real change, both against
    the pooled controls of its `coarse` group; near 0 if the fine groups don't matter, None if nothing can be said.

    `coarse`, `fine`: int64 [cells], the latter −1 where unknown.
    """
    fine_controls = np.bincount(fine[cells.controls & (fine >= 0)], minlength=fine.max(initial=0) + 1)
    usable = (fine >= 0) & (fine_controls[fine] >= SMALLEST)
    perturbed = usable & ~cells.controls
    if not perturbed.any() or len(np.unique(fine[usable])) < 2:
        return None
    values = cells.values[:, gene_list(cells.values)]
    stay = group_means(values, np.where(cells.controls & usable, fine, -1), len(fine_controls))
    pool = group_means(values, np.where(cells.controls, coarse, -1), coarse.max() + 1)
    scores = []
    for pair in np.unique(cells.pair[perturbed]):
        rows = np.flatnonzero(perturbed & (cells.pair == pair))
        reference = pool[coarse[rows]].mean(axis=0)
        real = np.asarray(values[rows].mean(axis=0)).ravel() - reference
        scores.append(pearson(stay[fine[rows]].mean(axis=0) - reference, real[None])[0])
    return float(np.mean(scores))


def across_contexts(cells: PerturbedCells) -> float | None:
    """The score with the controls of all contexts pooled."""
    return pooled_score(cells, np.zeros_like(cells.context), cells.context)


def unmatched(cells: PerturbedCells, obs: pd.DataFrame, used: set[str]) -> Pooled | None:
    """The worst column of obs that should have been a context, because the controls differ by it; None if there is none.

    `obs`: of all cells of the file; `used`: columns that have their own meaning already.
    """
    worst = None
    for column in obs.columns:
        if column in used or pd.api.types.is_float_dtype(obs[column].dtype):
            continue
        words = obs[column].iloc[cells.rows].astype(str)
        if not 2 <= words.nunique() <= MOST_VALUES:
            continue
        inside = pd.factorize(cells.context.astype(str) + words.to_numpy().astype(object))[0]
        score = pooled_score(cells, cells.context, np.where(words.str.lower().isin(MISSING), -1, inside))
        if score is not None and score >= CAUGHT and (worst is None or score > worst.pearson):
            worst = Pooled(str(column), score)
    return worst
