"""The cells of a perturbation benchmark: perturbed ones and the controls of their own context."""

from collections.abc import Container
from typing import NamedTuple

import numpy as np
import pandas as pd
import scipy.sparse

from scbench.data.cells import content_hash
from scbench.data.sources.anndata import AnnDataSource
from scbench.errors import UserError
from scbench.evaluation.labelled_cells import take_counts
from scbench.evaluation.labels import read_labels
from scbench.evaluation.perturbation.names import targets_of

STUDY_COLUMNS = ("dataset", "study", "perturbation_type")  # where a file has them and nobody says otherwise
SMALLEST = 20  # cells of a perturbation in a context, and controls of a context; smaller ones are left out
PANEL = 2000  # genes: a file with fewer may be a cut of a profile
UNIT = 1e4  # counts that every cell is scaled to
NAMED = 10  # names in a message


class PerturbedCells(NamedTuple):
    """Cells of one study. A *pair* is a perturbation in a context; every context has controls of its own."""

    values: scipy.sparse.csr_matrix  # float32 [cells, genes of the file], log1p(10⁴ · count / total)
    hashes: np.ndarray  # uint64 [cells], of their content
    pair: np.ndarray  # int64 [cells], −1: a control
    context: np.ndarray  # int64 [cells]
    rows: np.ndarray  # int64 [cells], rows of the file
    perturbations: list[tuple[str, ...]]  # the targets of each
    contexts: list[str]
    pair_perturbation: np.ndarray  # int64 [pairs]
    pair_context: np.ndarray  # int64 [pairs]
    target_columns: dict[str, list[int]]  # of the file, by target
    study: str  # '' if the file has one only

    @property
    def controls(self) -> np.ndarray:
        """bool [cells]."""
        return self.pair < 0

    def own_columns(self, perturbation: int) -> list[int]:
        """The columns of a perturbation's targets."""
        return [column for target in self.perturbations[perturbation] for column in self.target_columns.get(target, [])]


class Reading(NamedTuple):
    """All studies of a file, and what was left out."""

    studies: list[PerturbedCells]
    left_out: dict[str, list[str]]  # reason → names
    counted: dict[str, int]  # cells used, and removed for which reason
    totals: str  # where the totals come from


def read_perturbed_cells(
    source: AnnDataSource, column: str, control: str, *, context: tuple[str, ...] = (), study: tuple[str, ...] | None = None,
    total_counts_column: str | None = None, genes: Container[str] = frozenset(), refused: Container[str] = frozenset(),
    seen: np.ndarray | None = None,
) -> Reading:
    """Read perturbed cells and controls.

    Parameters
    ----------
    source
        Raw counts.
    column, control
        The column of obs that names the perturbations, and what it calls controls.
    context, study
        Columns of obs: controls are matched by the former; the latter are never mixed (by default the STUDY_COLUMNS there).
    total_counts_column
        Column of obs with each cell's total over its whole profile; by default the sum over the file's genes.
    genes
        Names that are genes (see `targets_of`).
    refused
        Targets whose perturbations are left out.
    seen
        bool [cells of the source], cells to leave out because the model has seen them.

    Raises
    ------
    UserError
        If a column is missing or useless, there are no controls, or too few cells remain.
    """
    names = labels_of(source, column, "--perturbation-column")
    parsed = {name: targets_of(name, control, genes) for name in set(names) - {None}}
    study = tuple(name for name in STUDY_COLUMNS if name in source.obs.columns) if study is None else study
    contexts = _joined(source, context, "--context")
    studies = _joined(source, study, "--study")
    if not any(targets == () for targets in parsed.values()):
        known = ", ".join(sorted(parsed)[:NAMED])
        raise UserError(f"{source.name}: no cell is called {control!r} in {column!r}: choose --control among {known} …")
    totals = _totals(source, total_counts_column)
    have = {
        "without a perturbation's name": np.array([name is None for name in names]),
        "without a context or study": np.array([a is None or b is None for a, b in zip(contexts, studies, strict=True)]),
        "without counts": np.zeros(len(names), dtype=bool) if totals is None else totals <= 0,
        "seen by the model": np.zeros(len(names), dtype=bool) if seen is None else seen,
        "of refused targets": np.array([any(target in refused for target in parsed.get(name) or ()) for name in names]),
    }
    keep, counted = np.ones(len(names), dtype=bool), {"total": len(names)}
    for reason, gone in have.items():
        counted[reason] = int((keep & gone).sum())
        keep &= ~gone
    rows = np.flatnonzero(keep)
    if not len(rows):
        raise UserError(f"{source.name}: no cell is left of {len(names):,}: {_reasons(counted)}.")
    counts = take_counts(source, rows)
    sums = np.asarray(counts.sum(axis=1), dtype=np.float64).ravel()
    totals = sums if totals is None else totals[rows]
    if (totals < sums - 0.5).any():
        raise UserError(
            f"{source.name}: column {total_counts_column!r} holds totals under the sum of a cell's counts: give the total "
            "counts of the whole profile as --total-counts-column."
        )
    values = _scaled(counts, totals)
    hashes = content_hash(counts.indices, counts.data, counts.indptr)
    target_columns = _target_columns(source, {target for targets in parsed.values() for target in targets})
    left_out: dict[str, list[str]] = {"small": [], "no controls": []}
    found = []
    for name in sorted(set(studies[rows])):
        inside = np.flatnonzero(studies[rows] == name)
        targets = [parsed[names[row]] for row in rows[inside]]
        one = _one_study(values[inside], hashes[inside], targets, contexts[rows[inside]], rows[inside], target_columns, name,
                         left_out)
        found += [one] if one is not None else []
    if not found:
        raise UserError(
            f"{source.name}: no perturbation with {SMALLEST} cells in a context with {SMALLEST} controls is left "
            f"({_reasons(counted)}; {'; '.join(_listed(left_out))}): change --context or --study, or give more cells."
        )
    counted["in small groups"] = len(rows) - sum(len(one.pair) for one in found)
    counted["perturbed"] = int(sum((one.pair >= 0).sum() for one in found))
    counted["controls"] = int(sum((one.pair < 0).sum() for one in found))
    where = f"column {total_counts_column}" if total_counts_column else f"the file's {values.shape[1]:,} genes"
    return Reading(found, {reason: sorted(set(names)) for reason, names in left_out.items() if names}, counted, where)


def labels_of(source: AnnDataSource, column: str, option: str) -> np.ndarray:
    """The words of a column of obs, object [cells], None where one is missing."""
    if column not in source.obs.columns:
        known = ", ".join(map(str, source.obs.columns)) or "none"
        raise UserError(f"{source.name} has no column {column!r} in obs: choose {option} among {known}.")
    return read_labels(source.obs, column, source.name)


def _joined(source: AnnDataSource, columns: tuple[str, ...], option: str) -> np.ndarray:
    """The words of several columns as one, object [cells]; '' without columns, None where one is missing."""
    words = [labels_of(source, column, option) for column in columns]
    joined = np.empty(source.n_cells, dtype=object)
    joined[:] = [None if None in one else " / ".join(one) for one in zip(*words, strict=True)] if words else ""
    return joined


def _totals(source: AnnDataSource, column: str | None) -> np.ndarray | None:
    if column is None:
        return None
    if column not in source.obs.columns:
        known = ", ".join(map(str, source.obs.columns)) or "none"
        raise UserError(f"{source.name} has no column {column!r} in obs: choose --total-counts-column among {known}.")
    totals = pd.to_numeric(source.obs[column], errors="coerce").to_numpy(dtype=np.float64, na_value=np.nan)
    if not np.isfinite(totals).all():
        raise UserError(f"column {column!r} of {source.name} holds values that are no totals: give one with numbers.")
    return totals


def _scaled(counts: scipy.sparse.csr_matrix, totals: np.ndarray) -> scipy.sparse.csr_matrix:
    """log1p(10⁴ · count / total), float32."""
    scale = np.repeat(UNIT / np.maximum(totals, 1), np.diff(counts.indptr))
    values = np.log1p(counts.data * scale).astype(np.float32)
    return scipy.sparse.csr_matrix((values, counts.indices, counts.indptr), counts.shape)


def _target_columns(source: AnnDataSource, targets: set[str]) -> dict[str, list[int]]:
    """The file's columns of each target, by id or symbol."""
    found: dict[str, list[int]] = {}
    for place, names in enumerate(zip(source.identity.ids, source.identity.symbols, strict=True)):
        for name in set(names) & targets:
            found.setdefault(name, []).append(place)
    return found


def _one_study(
    values: scipy.sparse.csr_matrix, hashes: np.ndarray, targets: list[tuple[str, ...]], contexts: np.ndarray,
    rows: np.ndarray, target_columns: dict[str, list[int]], study: str, left_out: dict[str, list[str]],
) -> PerturbedCells | None:
    """Cells of groups that are large enough; None if no pair is."""
    frame = pd.DataFrame({"targets": targets, "context": contexts})
    sizes = frame.value_counts(sort=False)
    with_controls = {
        context for context in set(contexts) if sizes.get(((), context), 0) >= SMALLEST
    }
    left_out["no controls"] += [context or study or "the file" for context in set(contexts) - with_controls]
    pairs = sorted(pair for pair, size in sizes.items() if pair[0] and pair[1] in with_controls and size >= SMALLEST)
    left_out["small"] += [
        _called(*pair) for pair, size in sizes.items() if pair[0] and pair[1] in with_controls and size < SMALLEST
    ]
    if not pairs:
        return None
    perturbations, used = sorted({pair[0] for pair in pairs}), sorted({pair[1] for pair in pairs})
    number = {pair: place for place, pair in enumerate(pairs)} | {((), context): -1 for context in used}
    place = np.array([number.get(pair, -2) for pair in zip(targets, contexts, strict=True)])
    keep = np.flatnonzero(place >= -1)
    order = {context: place for place, context in enumerate(used)}
    return PerturbedCells(
        values=values[keep], hashes=hashes[keep], pair=place[keep],
        context=np.array([order[context] for context in contexts[keep]]), rows=rows[keep], perturbations=perturbations,
        contexts=used, pair_perturbation=np.array([perturbations.index(pair[0]) for pair in pairs]),
        pair_context=np.array([order[pair[1]] for pair in pairs]), target_columns=target_columns, study=study,
    )


def _called(targets: tuple[str, ...], context: str) -> str:
    return "+".join(targets) + (f" in {context}" if context else "")


def _reasons(counted: dict[str, int]) -> str:
    reasons = [f"{number:,} {reason}" for reason, number in counted.items() if number and reason != "total"]
    return ", ".join(reasons) or "none left out before"


def _listed(left_out: dict[str, list[str]]) -> list[str]:
    return [f"{reason}: {', '.join(sorted(set(names))[:NAMED])}" for reason, names in left_out.items() if names]
