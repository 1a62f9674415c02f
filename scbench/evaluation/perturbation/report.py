"""The table of a perturbation benchmark: rows, columns, and what they say in words."""

import numpy as np

from scbench.evaluation.perturbation.cells import NAMED, PANEL, SMALLEST, PerturbedCells, Reading
from scbench.evaluation.perturbation.fold import (
    ADDITIVE,
    FITTED,
    MATCHING_MEAN,
    MODEL,
    NO_CHANGE,
    OWN_MEAN,
    RIDGE,
    TRAIN_MEAN,
)
from scbench.evaluation.perturbation.pooled import Pooled
from scbench.evaluation.perturbation.scoring import CEILING, METRICS, Board, Key
from scbench.evaluation.perturbation.splits import ALL, CELLS, COMBINATION, CONTEXT
from scbench.evaluation.report import Column
from scbench.evaluation.scores import interval

ROUGH = 10  # units under which an interval is called rough
LOWER_IS_BETTER = {"mse", "mse_top", "energy"}
BASELINES = (NO_CHANGE, TRAIN_MEAN, OWN_MEAN, MATCHING_MEAN, ADDITIVE)
TITLES = {
    "mse": "MSE", "pearson_control": "Pearson, against control", "pearson_mean": "Pearson, against mean of perturbed",
    "mse_top": "top-20 MSE", "pearson_control_top": "top-20 Pearson, against control",
    "pearson_mean_top": "top-20 Pearson, against mean of perturbed", "discrimination": "discrimination",
    "energy": "energy distance",
}
SPOKEN = {"mse": "the MSE of the change", "pearson_control": "the Pearson correlation of the change against control",
          "pearson_mean": "the Pearson correlation of the change against the mean of the perturbed"}

class Shown(Column):
    """A metric with its interval, or alone where there are too few units for one."""

    def text(self, row: dict) -> str:
        name = self.fields[0]
        if row[name] is None:
            return "–"
        low, high = row[f"{name}_low"], row[f"{name}_high"]
        return f"{row[name]:.3f}" if low is None else f"{row[name]:.3f} ({low:.3f}–{high:.3f})"


COLUMNS = [
    Column("model", ("model",)),
    Column("probe", ("probe",)),
    Column("held out", ("stratum",)),
    *(Shown(TITLES[name], (name,), "{:.3f}") for name in METRICS),
    Column("pairs", ("pairs",)),
    Column("overlap", ("overlap",)),
]


def keys(board: Board, predictor: str) -> list[tuple[Key, str]]:
    """Methods and differences of the table with what they are fitted by, in its order."""
    fitted = FITTED[predictor]
    differences = [(MODEL, other) for other in fitted[1:]]
    return [
        *((name, predictor) for name in fitted), *((key, predictor) for key in differences),
        *((name, "none") for name in (*BASELINES, CEILING) if board.pairs(name, ALL)),
    ]


def rows(board: Board, predictor: str, common: dict) -> list[dict]:
    """All rows: every method in every stratum."""
    found = []
    for stratum in board.strata:
        for key, probe in keys(board, predictor):
            if board.pairs(key, stratum):
                found.append({
                    "task": "perturbation", "model": " − ".join(key) if isinstance(key, tuple) else key, "probe": probe,
                    "stratum": stratum, **fields(board, key, stratum), "pairs": board.pairs(key, stratum),
                    "units": board.units(key, stratum), **common,
                })
    return found


def fields(board: Board, key: Key, stratum: str) -> dict:
    """Value, low and high of every metric; None where there is none."""
    found = {}
    for name, samples in board.samples(key, stratum).items():
        value = float(samples[0])
        found[name] = None if np.isnan(value) else value
        some = np.concatenate([samples[:1], samples[1:][~np.isnan(samples[1:])]])
        enough = found[name] is not None and (board.split == CELLS or board.units(key, stratum) > 1)
        low, high = interval(some)[1:] if enough else (None, None)
        found |= {f"{name}_low": low, f"{name}_high": high}
    return found


def differences(board: Board, predictor: str) -> list[dict]:
    """The model minus every other method, on the pairs that both predict; paired in every resample."""
    others = [*FITTED[predictor][1:], *BASELINES, CEILING]
    return [
        {"model": MODEL, "baseline": other, "pairs": board.pairs((MODEL, other), ALL), **fields(board, (MODEL, other), ALL)}
        for other in others if board.pairs((MODEL, other), ALL)
    ]


def sentences(board: Board, predictor: str) -> list[str]:
    """How the model stands to the best baseline and to what its features have to beat."""
    all_pairs = board.pairs(MODEL, ALL)
    best_of = [name for name in BASELINES if board.pairs(name, ALL) == all_pairs]
    said = []
    for metric, words in SPOKEN.items():
        sign = 1 if metric in LOWER_IS_BETTER else -1
        values = {name: board.samples(name, ALL)[metric][0] for name in best_of}
        best = min(values, key=lambda name: sign * values[name])
        parts = [
            _compare(fields(board, (MODEL, other), ALL), metric, label)
            for other, label in [(best, f"the best baseline, {best}"), *((one, one) for one in FITTED[predictor][1:])]
        ]
        said.append(f"In {words} the trained model {'; '.join(parts)}.")
    if board.pairs(ADDITIVE, ALL) and ADDITIVE not in best_of:
        said.append(f"The additive baseline is defined for {board.pairs(ADDITIVE, ALL)} of {all_pairs} pairs, its row's.")
    said.append("Against the mean of the perturbed, “no change” is the opposite of the train mean and shares its error, so it "
                "may score above 0.")
    ceiling = board.samples(CEILING, ALL)["mse"][0]
    if any(board.samples(name, ALL)["mse"][0] < ceiling for name in best_of):
        said.append("The other half of a pair's cells has a larger error than a baseline: these changes are about as small as "
                    "the noise of half the cells, and their errors say little.")
    units, name = board.units(MODEL, ALL), "contexts" if board.split == CONTEXT else "perturbations"
    if board.split == CELLS:
        said.append("Intervals weight the scored cells at random; they don't cover the choice of perturbations or controls.")
    elif units == 1:
        said.append(f"Only one of the {name} is held out: there is no interval.")
    else:
        rough = ": with so few they are rough and rather too short" if units < ROUGH else ""
        said.append(f"Intervals resample the {units} held-out {name}{rough}.")
    if board.split == COMBINATION and len(board.strata) > 1:
        counted = "; ".join(f"{board.pairs(MODEL, stratum)} with {stratum}" for stratum in board.strata[1:])
        said.append(f"Held-out pairs by what was trained, over all repetitions: {counted}.")
    return said


def reading_sentences(
    reading: Reading, studies: list[PerturbedCells], unsplit: list[str], pooled_scores: list[float], caught: list[Pooled]
) -> list[str]:
    """Which cells took part, and whether their controls match."""
    c = reading.counted
    used = ("total", "perturbed", "controls")
    removed = ", ".join(f"{number:,} {reason}" for reason, number in c.items() if number and reason not in used)
    pairs = sum(len(cells.pair_context) for cells in studies)
    said = [
        f"{c['perturbed']:,} perturbed cells and {c['controls']:,} controls of {c['total']:,} cells; {pairs} pairs of a "
        f"perturbation and a context in {len(studies)} {'study' if len(studies) == 1 else 'studies'}; left out: "
        f"{removed or 'none'}."
    ]
    if "small" in reading.left_out:
        said.append(f"Under {SMALLEST} cells, left out everywhere: {_some(reading.left_out['small'])}.")
    if "no controls" in reading.left_out:
        said.append(f"Contexts under {SMALLEST} controls, left out: {_some(reading.left_out['no controls'])}.")
    if unsplit:
        said.append(f"Studies that cannot be split so, left out: {'; '.join(unsplit)}.")
    if studies[0].values.shape[1] < PANEL and not reading.totals.startswith("column"):
        said.append(
            f"A cell's total is the sum over {reading.totals}: if these are cut from larger profiles, changes are distorted "
            "and --total-counts-column is needed."
        )
    if pooled_scores:
        said.append(
            "With the controls of all contexts pooled, “no change” would score a Pearson correlation of "
            f"{np.mean(pooled_scores):.2f}; here every context has its own."
        )
    for one in caught:
        said.append(
            f"Controls differ by {one.column}: “no change” scores a Pearson correlation of {one.pearson:.2f} against pooled "
            f"controls, so these changes are largely not the perturbations': give --context {one.column} too."
        )
    return said


def target_sentences(studies: list[PerturbedCells], refusals: dict[str, list[str]], checkable: bool) -> list[str]:
    """Which targets ridge can use."""
    said = [
        f"Targets that ridge refuses, {reason} ({len(names)}): {_some(names)}; their perturbations are left out."
        for reason, names in refusals.items()
    ]
    if not checkable:
        said.append("The model does not say how it was initialised: whether it saw the targets in training cannot be checked.")
    asked = {target for cells in studies for one in cells.perturbations for target in one}
    measured = {target for target in asked if studies[0].target_columns.get(target)}
    said.append(f"{len(measured)} of {len(asked)} targets are among the file's genes: others have no PCA loadings (0).")
    return said


def _some(names: list[str]) -> str:
    more = len(names) - NAMED
    return ", ".join(names[:NAMED]) + (f" and {more} more (results.json)" if more > 0 else "")


def _compare(difference: dict, metric: str, label: str) -> str:
    value, low, high = (difference[name] for name in (metric, f"{metric}_low", f"{metric}_high"))
    if low is None:
        return f"is {value:+.3g} apart from {label}, without an interval"
    sign = -1 if metric in LOWER_IS_BETTER else 1
    ahead, behind = (low > 0, high < 0) if sign > 0 else (high < 0, low > 0)
    verdict = "beats" if ahead else "loses to" if behind else "is not clearly apart from"
    return f"{verdict} {label} ({value:+.3g}, 95 % interval {low:+.3g} to {high:+.3g})"


def protocol(predictor: str, split: str, folds: int, seeds: int) -> str:
    """What was done, in words."""
    what = "ridge regression on summed gene embeddings" if predictor == RIDGE else "contexts weighted by likeness of controls"
    return (
        f"{split}, {folds} folds, {seeds} repetitions; {what}; changes of log1p(10⁴ · count / total) per context against that "
        "context's own controls, of which one half serves fitting and one half scoring; genes: at most 2,000 most variable of "
        "controls and training cells, own targets left out; one half of each held-out pair is scored, the other the ceiling; "
        "strengths are chosen on validation groups of the training cells, from one grid for all features"
    )
