"""The table of a count-splitting benchmark: rows, columns, and what they say in words."""

from collections.abc import Mapping
from typing import NamedTuple

import numpy as np

from scbench.evaluation import baselines, embed
from scbench.evaluation.comparisons import Comparison, sentences_of
from scbench.evaluation.counts import predictors
from scbench.evaluation.entrants import MODEL, Entrant, untrained_name
from scbench.evaluation.guard import NOT_CHECKABLE, TRANSDUCTIVE, UNSEEN
from scbench.evaluation.report import Column, IntervalColumn
from scbench.evaluation.scores import RESAMPLES, interval, interval_fields, resamples
from scbench.evaluation.split_files import Split

KNN, LOG_LINEAR, NO_PROBE = "k-NN", "log-linear", "none"
GENE_MEAN, SMOOTHED = "depth-scaled gene mean", "half A, smoothed"
WITH = {KNN: " with k-NN", LOG_LINEAR: " with a log-linear law", NO_PROBE: ""}
ROUGH = 10  # groups under which an interval is called rough

Method = tuple[str, str]  # who predicts, and the probe

COLUMNS = [
    Column("model", ("model",)),
    Column("probe", ("probe",)),
    IntervalColumn("Poisson deviance", ("poisson_deviance",), "{:.4f}"),
    IntervalColumn("deviance explained", ("deviance_explained",), "{:.4f}"),
    Column("overlap", ("overlap",)),
]


class Board(NamedTuple):
    """Mean deviances over cells: of all cells at index 0, then one a resample. float64 [1 + RESAMPLES] each."""

    members: dict[Method, list[np.ndarray]]  # of a row: one a pretraining seed
    models: list[str]  # rows that are no baselines
    untrained: dict[str, str]  # a model's untrained twin

    @classmethod
    def of(
        cls, deviances: Mapping[Method, np.ndarray], entrants: list[Entrant], widths: list[int], groups: np.ndarray | None,
        seed: int,
    ) -> "Board":
        """Of each cell's deviances, float64 [repetitions, cells]. `groups`, str objects [cells] (else cells) are resampled."""
        methods = list(deviances)
        by_cell = np.stack([deviances[method].mean(axis=0) for method in methods], axis=1)
        unit = np.arange(len(by_cell)) if groups is None else np.unique(groups.astype(str), return_inverse=True)[1]
        sizes = np.bincount(unit).astype(np.float64)
        sums = np.zeros((len(sizes), len(methods)))
        np.add.at(sums, unit, by_cell)
        means = np.concatenate([(w @ sums) / (w @ sizes)[:, None] for w in resamples(len(sizes), seed)])
        samples = dict(zip(methods, means.T, strict=True))
        untrained = {entrant.name: untrained_name(entrant.name) for entrant in entrants if entrant.network is not None}
        seeds = {entrant.name: [member.name for member in entrant.members] for entrant in entrants}
        seeds |= {name: [name] for name in (*untrained.values(), *map(pca_name, widths))}
        members = {
            (name, probe): [samples[member, probe] for member in names]
            for name, names in seeds.items() for probe in (LOG_LINEAR, KNN)
        }
        members |= {(name, NO_PROBE): [samples[name, NO_PROBE]] for name in (SMOOTHED, GENE_MEAN)}
        return cls(members, [entrant.name for entrant in entrants], untrained)

    def deviance(self, method: Method) -> np.ndarray:
        """The mean over pretraining seeds."""
        return np.mean(self.members[method], axis=0)

    def explained(self, method: Method) -> np.ndarray:
        """The part of the gene mean's deviance that is not left: 1 − deviance / deviance of the gene mean."""
        return 1 - self.deviance(method) / self.deviance((GENE_MEAN, NO_PROBE))

    def best(self, methods: list[Method]) -> Method:
        """The one with the least deviance."""
        return min(methods, key=lambda method: self.deviance(method)[0])

    @property
    def baselines(self) -> list[Method]:
        return [method for method in self.members if method[0] not in self.models]


def pca_name(components: int) -> str:
    """What a baseline on principal components is called."""
    return f"PCA ({components})"


def rows(board: Board, common: dict, overlap: dict[str, str]) -> list[dict]:
    """All rows. `overlap`: of the models."""
    found, others = [], TRANSDUCTIVE if TRANSDUCTIVE in overlap.values() else UNSEEN
    for method, members in board.members.items():
        explained = [1 - one[0] / board.deviance((GENE_MEAN, NO_PROBE))[0] for one in members]
        name, probe = method
        found.append({
            "task": "counts", "dataset": common["dataset"], "label": None, "model": name,
            "kind": "model" if name in board.models else "baseline", "probe": probe, "protocol": common["protocol"],
            "overlap": overlap.get(name, others), "values": common["values"],
            **interval_fields("poisson_deviance", board.deviance(method)),
            **interval_fields("deviance_explained", board.explained(method)),
            "pretraining_seeds": len(members) if name in board.models else None,
            "deviance_explained_pretraining_sd": float(np.std(explained, ddof=1)) if len(members) > 1 else None, **common,
        })
    return found


def differences(board: Board) -> list[dict]:
    """The deviance explained by each model less that of each baseline, paired over cells or groups."""
    return [
        {"model": name, "probe": probe, "baseline": other[0], "baseline_probe": other[1],
         **interval_fields("deviance_explained", board.explained((name, probe)) - board.explained(other))}
        for name in board.models for probe in (LOG_LINEAR, KNN) for other in board.baselines
    ]


def comparisons(board: Board) -> list[dict]:
    """Each model, by its better probe, against the baseline of the least deviance, paired over cells or groups."""
    best, found = board.best(board.baselines), []
    for name in board.models:
        mine = board.best([(name, LOG_LINEAR), (name, KNN)])
        compared = _compared(board, mine, best)
        parts = [compared.words(f"the best baseline, {best[0]}{WITH[best[1]]}", "+.1f", " points", 100)]
        if name in board.untrained:
            twin = _compared(board, mine, (board.untrained[name], mine[1]))
            parts.append(twin.words("an untrained model", "+.1f", " points", 100))
        subject = "The trained model" if name == MODEL else name
        found.append(compared.record(
            f"{subject}{WITH[mine[1]]} explains {board.explained(mine)[0]:.1%} of the gene mean's deviance; it "
            f"{'; it '.join(parts)}."
        ))
    return found


def _compared(board: Board, mine: Method, other: Method) -> Comparison:
    return Comparison(*mine, *other, "deviance_explained", *interval(board.explained(mine) - board.explained(other)))


def members(board: Board) -> list[dict]:
    """The deviance of each pretraining seed."""
    return [
        {"model": name, "probe": probe, "poisson_deviance": [float(one[0]) for one in board.members[name, probe]]}
        for name in board.models for probe in (LOG_LINEAR, KNN)
    ]


def sentences(compared: list[dict], counted: dict[str, int], common: dict, overlap: dict[str, str]) -> list[str]:
    """What the table says, in plain words."""
    said = sentences_of(compared)
    removed = [f"{number:,} {word}" for field, word in [
        ("empty", "without counts"), ("ungrouped", "without a group"), ("duplicates", "exact duplicates"),
        ("overlapping", "that a model was trained or validated on"),
    ] if (number := counted.get(field))]
    said.append(f"{common['cells']:,} of {counted['total']:,} cells, up to {common['genes']:,} genes; left out: "
                f"{', '.join(removed) or 'none'}.")
    said.append("How much could be explained at most is not known: part of the deviance is the noise of counting, so rows are "
                "to be compared with each other, not with 1.")
    if common["groups"] is not None:
        rough = ": with so few they are rough and rather too short" if common["groups"] < ROUGH else ""
        said.append(f"Intervals resample the {common['groups']} held-out groups{rough}.")
    else:
        said.append("Intervals resample cells; they don't cover the choice of donors or of training runs.")
    for name, known in overlap.items():
        if known == TRANSDUCTIVE:
            said.append(f"Transductive: cells that {_called(name)} may have been trained on were kept.")
        elif known == NOT_CHECKABLE:
            said.append(f"Which cells {_called(name)} was trained on is not known: whether these are new cannot be checked.")
    return said


def _called(name: str) -> str:
    return f"the {name}" if name == MODEL else name


def protocol(split: Split, group: str | None) -> str:
    """What was done, in words."""
    dealt = "cells" if group is None else f"whole groups ({group})"
    return (
        f"each count is split binomially (p = 1/2); half A is embedded, half B predicted; {split.folds} folds of {dealt}, "
        f"{split.repetitions} repetitions: one tests, the next one validates, the others train; {embed.SUBSETS}; "
        "genes: of those that at least "
        f"{predictors.EXPRESSED_IN} training cells express, the {baselines.VARIABLE_GENES:,} with the largest variance of "
        "log1p(10⁴ · count / total), zeros included; mean count = exposure × share; exposure: half A's total, moved to the "
        "mean of the training cells by what is Poisson noise of it; share: k-NN (mean of the k nearest training cells with a "
        "part of the gene mean), log-linear (Poisson regression with an L2 penalty on features divided by one number), half A "
        "smoothed (pseudo-counts of the gene mean) or the gene mean; "
        f"k of {predictors.NEIGHBOURS}, part of {predictors.MEAN_SHARES}, penalty of {predictors.PENALTIES}, pseudo-counts of "
        f"{predictors.PSEUDO_COUNTS}, all chosen by the deviance on validation cells; PCA: of log1p(10⁴ · count / total) of "
        "half A over the same genes; Poisson deviance: 2 · (y ln(y / μ) − y + μ), mean over genes and cells; explained: 1 − "
        f"deviance / deviance of the gene mean; intervals: 2.5 and 97.5 percentiles of {RESAMPLES:,} bootstrap resamples of "
        f"{'cells' if group is None else 'groups'}, the same for all methods"
    )
