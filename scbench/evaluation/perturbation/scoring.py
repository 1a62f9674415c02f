"""Scores of predicted changes, pair by pair, gathered over folds and repetitions, with paired bootstrap intervals."""

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np

from scbench.evaluation.perturbation import metrics
from scbench.evaluation.perturbation.cells import PerturbedCells
from scbench.evaluation.perturbation.changes import Changes, group_means
from scbench.evaluation.perturbation.splits import ALL, CELLS, CONTEXT, Fold
from scbench.evaluation.scores import RESAMPLES, resamples
from scbench.evaluation.split_files import unit_hashes
from scbench.kernels import random

METRICS = ("mse", "pearson_control", "pearson_mean", "mse_top", "pearson_control_top", "pearson_mean_top", "discrimination",
           "energy")
CEILING = "other half of the cells"
MOST_CELLS = 100  # of a pair, and of its controls, in an energy distance
_BOOTSTRAP = 16  # what a key of Stream.EVALUATION decides
_CHUNK = 16_000_000  # numbers in memory at once

Key = str | tuple[str, str]  # a method, or the first method minus the second


class Held(NamedTuple):
    """The held-out part of a fold, on the fold's genes."""

    cells: PerturbedCells
    fold: Fold
    genes: np.ndarray  # int64, columns of the file
    values: object  # CSR [cells, genes]
    scored_controls: np.ndarray  # bool [cells]
    fitted: Changes
    controls: np.ndarray  # float64 [contexts, genes], mean of the controls that are not scored


def cell_weights(keys: np.ndarray, first: int, last: int, seed: int) -> np.ndarray:
    """Weights of cells in resamples first … last−1, float64 [R, cells]: ones in resample 0, else exponential ones.

    Rubin, "The Bayesian bootstrap" (1981): unlike drawn cells, few weighted ones never vanish all. A cell has the same weight
    in every fold, repetition and method. `keys`: hashes of their ids, uint64 [cells].
    """
    key = random.key(seed, random.Stream.EVALUATION, _BOOTSTRAP)
    weights = -np.log(random.uniform(random.bits(random.bits(key, np.arange(first, last))[:, None], keys)))
    weights[np.arange(first, last) == 0] = 1
    return weights


def score_fold(held: Held, predictions: dict[str, np.ndarray], bootstrap_cells: bool, seed: int) -> Iterator[tuple]:
    """Yield (pair, stratum, {method: float64 [metrics, R]}) of every held-out pair; NaN where a metric is not defined.

    `predictions`: changes of the fold's pairs, [pairs, genes], NaN rows where a method says nothing. R is 1, or 1 + RESAMPLES
    of the scored cells.
    """
    total = 1 + RESAMPLES if bootstrap_cells else 1
    context = held.cells.pair_context[held.fold.pairs]
    for number in np.unique(context):
        candidates = np.unique(held.cells.pair[held.fold.scored & (held.cells.context == number)])
        rows = [_by_hash(held.cells, held.fold.scored & (held.cells.pair == pair)) for pair in candidates]
        keys = [unit_hashes(held.cells.ids[one]) for one in rows]
        cells = [held.values[one].toarray().astype(np.float64) for one in rows]
        step = max(1, _CHUNK // (len(candidates) * len(held.genes)))
        found: dict[tuple[int, str], list[np.ndarray]] = {}
        for first in range(0, total, step):
            weights = [cell_weights(one, first, min(first + step, total), seed) for one in keys]
            means = np.stack([w @ x / w.sum(axis=1, keepdims=True) for w, x in zip(weights, cells, strict=True)])
            for place in np.flatnonzero(context == number):
                own = int(np.searchsorted(candidates, held.fold.pairs[place]))
                scored = _score_pair(held, predictions, place, own, candidates, means, cells[own], weights[own])
                for name, values in scored.items():
                    found.setdefault((place, name), []).append(values)
        for place in np.flatnonzero(context == number):
            joined = {name: np.concatenate(parts, axis=1) for (where, name), parts in found.items() if where == place}
            yield int(held.fold.pairs[place]), held.fold.strata[place], joined


def _score_pair(
    held: Held, predictions: dict[str, np.ndarray], place: int, own: int, candidates: np.ndarray, means: np.ndarray,
    real: np.ndarray, weights: np.ndarray,
) -> dict[str, np.ndarray]:
    """Metrics of one held-out pair by method. `means`: [candidates, R, genes], of scored cells; `real`: its scored cells."""
    cells, pair = held.cells, held.fold.pairs[place]
    number = cells.pair_context[pair]
    controls = cells.controls & (cells.context == number)
    scored_control = _mean(held.values, controls & held.scored_controls)
    targets = [np.flatnonzero(np.isin(held.genes, cells.own_columns(cells.pair_perturbation[one]))).tolist()
               for one in candidates]
    keep = np.setdiff1d(np.arange(len(held.genes)), targets[own])
    names = [name for name, predicted in predictions.items() if not np.isnan(predicted[place]).any()]
    changes = np.stack([predictions[name][place] for name in names])
    discrimination = metrics.discrimination(changes, means - scored_control, own, targets)
    everything = _mean(held.values, held.fold.scored & (cells.pair == pair) | held.fold.other & (cells.pair == pair))
    top = keep[metrics.top_genes((everything - _mean(held.values, controls))[keep])]
    truth = means[own] - scored_control
    base = held.fitted.mean[number]
    truth_of_mean = means[own] - held.controls[number] - base
    starts = held.values[_by_hash(cells, controls & ~held.scored_controls)[:MOST_CELLS]].toarray()
    halves = held.values[_by_hash(cells, held.fold.other & (cells.pair == pair))[:MOST_CELLS]].toarray()
    result = {}
    for row, (name, change) in enumerate(zip(names, changes, strict=True)):
        values = [
            metric
            for genes in (keep, top)
            for metric in (
                metrics.mean_squared_error(change[genes], truth[:, genes]),
                metrics.pearson(change[genes], truth[:, genes]),
                metrics.pearson((change - base)[genes], truth_of_mean[:, genes]),
            )
        ]
        values.append(np.full(len(truth), np.nan) if discrimination is None else discrimination[row])
        predicted = halves if name == CEILING else starts + change
        shown = real[:MOST_CELLS, keep]
        values.append(metrics.energy_distance(shown, predicted[:, keep], weights[:, : len(shown)]))
        result[name] = np.stack(values)
    return result


def _mean(values, rows: np.ndarray) -> np.ndarray:
    """The mean of some cells, float64 [genes]."""
    return group_means(values, np.where(rows, 0, -1), 1)[0]


def _by_hash(cells: PerturbedCells, chosen: np.ndarray) -> np.ndarray:
    """Places of the chosen cells in an order that says nothing of the file, so that the first of them are any of them."""
    rows = np.flatnonzero(chosen)
    return rows[np.argsort(cells.hashes[rows], kind="stable")]


class Board:
    """Gathers scores by method, stratum and pair. Pairs of several studies are kept apart by the study's number."""

    def __init__(self, split: str, seed: int):
        self.split, self.seed = split, seed
        self._sums: dict[tuple[Key, str], dict[tuple[int, int, int], list]] = {}  # (study, unit, pair) → [sum, count]
        self._samples: dict[tuple[Key, str], dict[str, np.ndarray]] = {}  # what `samples` has found

    def add(self, study: int, cells: PerturbedCells, pair: int, stratum: str, scores: dict[Key, np.ndarray]) -> None:
        """Scores of one pair in one fold, [metrics, R]; the pair is part of a unit that is resampled as a whole."""
        self._samples.clear()
        unit = cells.pair_context[pair] if self.split == CONTEXT else cells.pair_perturbation[pair]
        for key, values in scores.items():
            for name in {ALL, stratum}:
                entry = self._sums.setdefault((key, name), {}).setdefault((study, int(unit), pair), [0, 0])
                entry[0] = entry[0] + np.nan_to_num(values)
                entry[1] = entry[1] + ~np.isnan(values)

    @property
    def strata(self) -> list[str]:
        """ALL, then the others, ascending, if there are several."""
        others = sorted({stratum for _, stratum in self._sums} - {ALL})
        return [ALL, *others] if len(others) > 1 else [ALL]

    def pairs(self, key: Key, stratum: str) -> int:
        """How many pairs a method has scores for."""
        return len(self._sums.get((key, stratum), {}))

    def units(self, key: Key, stratum: str) -> int:
        """Of how many units (perturbations; contexts if these are held out) these are."""
        return len({one[:2] for one in self._sums.get((key, stratum), {})})

    def samples(self, key: Key, stratum: str) -> dict[str, np.ndarray]:
        """Each metric's mean over units, [1 + RESAMPLES]: on all at 0, then on resamples. A unit's score is its pairs' mean.

        NaN where a resample holds no unit with the metric. Resamples of cells are centred on the value on all.
        """
        if (key, stratum) in self._samples:
            return self._samples[key, stratum]
        names = sorted({one[:2] for (_, name), found in self._sums.items() if name == stratum for one in found})
        by_unit: dict[tuple[int, int], list[np.ndarray]] = {name: [] for name in names}
        for (study, unit, _), (total, count) in self._sums[key, stratum].items():
            with np.errstate(invalid="ignore"):
                by_unit[study, unit].append(np.where(count > 0, total / count, np.nan))
        some = next(one[0] for one in by_unit.values() if one)
        units = np.stack([_nan_mean(np.stack(one)) if one else np.full_like(some, np.nan) for one in by_unit.values()])
        if self.split == CELLS:
            means = _nan_mean(units)
            # weights make means of few cells noisier, which worsens every score: what is left is their spread
            means[:, 1:] += means[:, :1] - means[:, 1:].mean(axis=1, keepdims=True)
        else:
            defined = ~np.isnan(units[:, :, 0])
            filled = np.nan_to_num(units[:, :, 0])
            parts = [(w @ filled, w @ defined) for w in resamples(len(units), self.seed)]
            with np.errstate(invalid="ignore"):
                means = (np.concatenate([a for a, _ in parts]) / np.concatenate([b for _, b in parts])).T
        self._samples[key, stratum] = dict(zip(METRICS, means, strict=True))
        return self._samples[key, stratum]


def _nan_mean(values: np.ndarray) -> np.ndarray:
    """The mean over the first axis of what is not NaN."""
    count = (~np.isnan(values)).sum(axis=0)
    return np.where(count > 0, np.nansum(values, axis=0) / np.maximum(count, 1), np.nan)
