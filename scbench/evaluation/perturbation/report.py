"""The table of a perturbation benchmark: rows, columns, and what they say in words."""

import numpy as np

from scbench.evaluation.comparisons import Comparison, sentences_of
from scbench.evaluation.entrants import MODEL, Entrant
from scbench.evaluation.guard import NOT_CHECKABLE, TRANSDUCTIVE
from scbench.evaluation.perturbation.cells import NAMED, PANEL, SMALLEST, PerturbedCells, Reading
from scbench.evaluation.perturbation.entrants import PREDICTIONS, Vectors
from scbench.evaluation.perturbation.fold import (
    ADDITIVE,
    MATCHING_MEAN,
    NO_CHANGE,
    OWN_MEAN,
    RIDGE,
    TRAIN_MEAN,
)
from scbench.evaluation.perturbation.pooled import Pooled
from scbench.evaluation.perturbation.scoring import CEILING, METRICS, Board, Key
from scbench.evaluation.perturbation.splits import ALL, CELLS, COMBINATION, CONTEXT
from scbench.evaluation.report import Column, IntervalColumn
from scbench.evaluation.scores import LOWER_IS_BETTER, interval
from scbench.evaluation.split_files import Split

MAIN = "pearson_control"  # the metric of pictures
ROUGH = 10  # units under which an interval is called rough
BASELINES = (NO_CHANGE, TRAIN_MEAN, OWN_MEAN, MATCHING_MEAN, ADDITIVE)
TITLES = {
    "mse": "MSE", "pearson_control": "Pearson, against control", "pearson_mean": "Pearson, against mean of perturbed",
    "mse_top": "top-20 MSE", "pearson_control_top": "top-20 Pearson, against control",
    "pearson_mean_top": "top-20 Pearson, against mean of perturbed", "discrimination": "discrimination",
    "energy": "energy distance",
}
SPOKEN = {
    "mse": "the MSE of the change", "pearson_control": "the Pearson correlation of the change against control",
    "pearson_mean": "the Pearson correlation of the change against the mean of the perturbed",
    "discrimination": "the discrimination score", "energy": "the energy distance",
}


COLUMNS = [
    Column("model", ("model",)),
    Column("probe", ("probe",)),
    Column("held out", ("stratum",)),
    *(IntervalColumn(TITLES[name], (name,), "{:.3f}") for name in METRICS),
    Column("pairs", ("pairs",)),
    Column("overlap", ("overlap",)),
]

Rivals = dict[str, tuple[str, ...]]  # by the model's name: what predicts as it does, without what it knows


def rows(
    board: Board, entrants: list[Entrant], rivals: Rivals, predictor: str, common: dict, overlap: dict[str, str],
    overlap_of_others: str,
) -> list[dict]:
    """All rows: models, what they have to beat, models minus rivals, baselines and the ceiling, in every stratum."""
    by_name = {entrant.name: entrant for entrant in entrants}
    probe = {name: PREDICTIONS if entrant.predicts else predictor for name, entrant in by_name.items()}
    beside = list(dict.fromkeys(one for entrant in entrants for one in rivals[entrant.name]))
    keys: list[tuple[Key, str, str]] = [
        *((name, "model", probe[name]) for name in by_name),
        *((name, "baseline", predictor) for name in beside),
        *(((name, one), "difference", probe[name]) for name in by_name for one in rivals[name]),
        *((name, "baseline", "none") for name in BASELINES), (CEILING, "ceiling", "none"),
    ]
    found = []
    for stratum in board.strata:
        for key, kind, fitted in keys:
            if not board.pairs(key, stratum):
                continue
            entrant = by_name.get(key[0] if kind == "difference" else key)
            found.append({
                "task": "perturbation", "model": " − ".join(key) if kind == "difference" else key, "kind": kind,
                "probe": fitted, "stratum": stratum, **fields(board, key, stratum), **spread(board, key, entrant, stratum),
                "pairs": board.pairs(key, stratum), "units": board.units(key, stratum),
                "overlap": overlap[entrant.name] if entrant else overlap_of_others,
                "pretraining_seeds": len(entrant.members) if entrant else None, **common,
            })
    return found


def spread(board: Board, key: Key, entrant: Entrant | None, stratum: str) -> dict[str, float | None]:
    """The standard deviation of every metric over pretraining seeds; None if there is no second one."""
    found: dict[str, float | None] = dict.fromkeys((f"{name}_pretraining_sd" for name in METRICS), None)
    if isinstance(key, str) and entrant is not None and len(entrant.members) > 1:
        values = [board.samples(name, stratum) for name, _ in entrant.members]
        for name in METRICS:
            deviation = float(np.std([one[name][0] for one in values], ddof=1))
            found[f"{name}_pretraining_sd"] = None if np.isnan(deviation) else deviation
    return found


def values_of(board: Board, name: str) -> dict:
    """The metrics of one pretraining seed, over everything held out."""
    return {metric: value for metric, value in fields(board, name, ALL).items() if metric in METRICS}


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


def differences(board: Board, entrants: list[Entrant], rivals: Rivals) -> list[dict]:
    """Each model minus every other method, on the pairs that both predict; paired in every resample."""
    found = []
    for entrant in entrants:
        others = [*rivals[entrant.name], *BASELINES, CEILING, *(one.name for one in entrants if one is not entrant)]
        found += [
            {"model": entrant.name, "baseline": other, "pairs": board.pairs((entrant.name, other), ALL),
             **fields(board, (entrant.name, other), ALL)}
            for other in others if board.pairs((entrant.name, other), ALL)
        ]
    return found


def comparisons(board: Board, entrants: list[Entrant], rivals: Rivals, predictor: str) -> list[dict]:
    """Each model against the best baseline of each metric, of those that predict all its pairs."""
    found = []
    for entrant in entrants:
        candidates = _candidates(board, entrant, rivals)
        for metric in METRICS:
            sign = 1 if metric in LOWER_IS_BETTER else -1
            values = {name: board.samples(name, ALL)[metric][0] for name in candidates}
            values = {name: value for name, value in values.items() if not np.isnan(value)}
            if values:
                best = min(values, key=lambda name, values=values, sign=sign: sign * values[name])
                compared = _compared(board, entrant, best, metric, predictor)
                others = [_compared(board, entrant, name, metric, predictor) for name in rivals[entrant.name] if name != best]
                found.append(compared.record(_say(compared, others) if metric in SPOKEN else None))
    return found


def _candidates(board: Board, entrant: Entrant, rivals: Rivals) -> list[str]:
    """Baselines, rivals among them, that predict all pairs of a model."""
    return [name for name in (*BASELINES, *rivals[entrant.name]) if board.pairs(name, ALL) == board.pairs(entrant.name, ALL)]


def _compared(board: Board, entrant: Entrant, other: str, metric: str, predictor: str) -> Comparison:
    """A model against another method in one metric."""
    difference = fields(board, (entrant.name, other), ALL)
    probe, other_probe = PREDICTIONS if entrant.predicts else predictor, "none" if other in BASELINES else predictor
    numbers = (difference[name] for name in (metric, f"{metric}_low", f"{metric}_high"))
    return Comparison(entrant.name, probe, other, other_probe, metric, *numbers)


def _say(best: Comparison, others: list[Comparison]) -> str:
    """How a model stands to the best baseline, and to what its features have to beat."""
    parts = [best.words(f"the best baseline, {best.baseline}", "+.3g"), *(one.words(one.baseline, "+.3g") for one in others)]
    called = f"the {MODEL}" if best.model == MODEL else best.model
    return f"In {SPOKEN[best.metric]} {called} {'; '.join(parts)}."


def sentences(board: Board, entrants: list[Entrant], rivals: Rivals, compared: list[dict]) -> list[str]:
    """How the models stand to the best baseline and to what their features have to beat, and what intervals cover."""
    said = sentences_of(compared)
    said += _seed_sentences(board, entrants)
    some = entrants[0]
    all_pairs, best_of = board.pairs(some.name, ALL), [name for name in BASELINES if name in _candidates(board, some, rivals)]
    if board.pairs(ADDITIVE, ALL) and ADDITIVE not in best_of:
        said.append(f"The additive baseline is defined for {board.pairs(ADDITIVE, ALL)} of {all_pairs} pairs, its row's.")
    said.append("Discrimination is the share of the context's other perturbations whose real change is farther from the "
                "prediction than the right one's: 1 is perfect, a guess scores ½ (of strong perturbations less). MSE and "
                "energy distance are better where smaller.")
    said.append("Against the mean of the perturbed, “no change” is the opposite of the train mean and shares its error, so it "
                "may score above 0.")
    ceiling = board.samples(CEILING, ALL)["mse"][0]
    if any(board.samples(name, ALL)["mse"][0] < ceiling for name in best_of):
        said.append("The other half of a pair's cells has a larger error than a baseline: these changes are about as small as "
                    "the noise of half the cells, and their errors say little.")
    units, name = board.units(some.name, ALL), "contexts" if board.split == CONTEXT else "perturbations"
    if board.split == CELLS:
        said.append("Intervals weight the scored cells at random; they don't cover the choice of perturbations or controls.")
    elif units == 1:
        said.append(f"Only one of the {name} is held out: there is no interval.")
    else:
        rough = ": with so few they are rough and rather too short" if units < ROUGH else ""
        said.append(f"Intervals resample the {units} held-out {name}{rough}.")
    if board.split == COMBINATION and len(board.strata) > 1:
        counted = "; ".join(f"{board.pairs(some.name, stratum)} with {stratum}" for stratum in board.strata[1:])
        said.append(f"Held-out pairs by what was trained, over all repetitions: {counted}.")
    return said


def _seed_sentences(board: Board, entrants: list[Entrant]) -> list[str]:
    """What is known of the variance of pretraining."""
    several = [entrant for entrant in entrants if len(entrant.members) > 1]
    said = []
    for entrant in several:
        deviation = spread(board, entrant.name, entrant, ALL)[f"{MAIN}_pretraining_sd"]
        said.append(f"{entrant.name} is the mean of {len(entrant.members)} pretraining seeds, whose SD in {SPOKEN[MAIN]} is "
                    f"{deviation:.3f}; no interval covers it.")
    if alone := [entrant.name for entrant in entrants if len(entrant.members) == 1 and not entrant.predicts]:
        said.append(f"One pretraining seed of {', '.join(alone)}: no interval covers the variance of pretraining.")
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
    if reading.copies:
        said.append(f"{reading.copies:,} of these cells are exact copies of others: where copies are trained on and held out, "
                    "scores are too good.")
    if "small" in reading.left_out:
        said.append(f"Under {SMALLEST} cells, left out everywhere: {_some(reading.left_out['small'])}.")
    if "no controls" in reading.left_out:
        said.append(f"Contexts under {SMALLEST} controls, left out: {_some(reading.left_out['no controls'])}.")
    if unsplit:
        said.append(f"Studies that cannot be split so, left out: {'; '.join(unsplit)}.")
    if reading.totals == PANEL:
        said.append(
            f"A cell's total is the sum over a panel of {studies[0].values.shape[1]:,} genes: a gene that goes up makes all "
            "others go down, and these changes are not those of whole profiles."
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


def target_sentences(studies: list[PerturbedCells], vectors: Vectors) -> list[str]:
    """Which targets ridge can use."""
    said = [
        f"Targets that ridge refuses, {reason} ({len(names)}): {_some(names)}; their perturbations are left out."
        for reason, names in vectors.refusals.items()
    ]
    if not vectors.checkable:
        said.append("A model does not say how it was initialised: whether it saw the targets in training cannot be checked.")
    asked = {target for cells in studies for one in cells.perturbations for target in one}
    measured = {target for target in asked if studies[0].target_columns.get(target)}
    said.append(f"{len(measured)} of {len(asked)} targets are among the file's genes: others have no PCA loadings (0).")
    return said


def overlap_sentences(overlap: dict[str, str]) -> list[str]:
    """Which models may have seen the cells. `overlap`: by the model's name."""
    named = {status: [name for name, one in overlap.items() if one == status] for status in (TRANSDUCTIVE, NOT_CHECKABLE)}
    said = ["Transductive: cells that a model may have been trained on were kept."] if named[TRANSDUCTIVE] else []
    if named[NOT_CHECKABLE]:
        said.append(f"Nothing says which cells {', '.join(named[NOT_CHECKABLE])} saw in training: whether these are new to it "
                    "cannot be checked.")
    return said


def _some(names: list[str]) -> str:
    more = len(names) - NAMED
    return ", ".join(names[:NAMED]) + (f" and {more} more (results.json)" if more > 0 else "")


def protocol(predictor: str, split: str, divided: Split) -> str:
    """What was done, in words."""
    what = "ridge regression on summed gene embeddings" if predictor == RIDGE else "contexts weighted by likeness of controls"
    return (
        f"{split}, {divided.folds} folds, {divided.repetitions} repetitions; {what}; changes of log1p(10⁴ · count / total) "
        "per context against that context's own controls, of which one half serves fitting and one half scoring; genes: at "
        "most 2,000 most variable of controls and training cells, own targets left out; one half of each held-out pair is "
        "scored, the other the ceiling; strengths are chosen on validation groups of the training cells, from one grid for "
        "all features"
    )
