"""The cells of a perturbation benchmark: perturbed ones and the controls of their own context."""

from collections.abc import Container, Sequence
from typing import NamedTuple

import numpy as np
import pandas as pd
import scipy.sparse

from scbench.data.cells import content_hash
from scbench.data.sources.anndata import AnnDataSource
from scbench.errors import UserError
from scbench.evaluation.labelled_cells import take_counts
from scbench.evaluation.labels import read_labels
from scbench.evaluation.perturbation.names import is_control, targets_of
from scbench.evaluation.split_files import unique_ids

STUDY_COLUMNS = ("dataset", "study", "perturbation_type")  # where a file has them and nobody says otherwise
SMALLEST = 20  # cells of a perturbation in a context, and controls of a context; smaller ones are left out
SMALL_PANEL, PANEL = 2000, "panel"  # genes: the sum over fewer is no cell's total, unless a user says this word
WHOLE_PROFILE = "whole profile"
UNIT = 1e4  # counts that every cell is scaled to
NAMED = 10  # names in a message


class NamedCells(NamedTuple):
    """What obs says of each cell of a file, before any is left out: object arrays [cells], None where something is missing."""

    targets: np.ndarray  # tuples of str; () for a control
    contexts: np.ndarray  # str, '' where nobody names one
    studies: np.ndarray  # str, '' if the file has one only
    ids: np.ndarray  # str, distinct

    def all_targets(self) -> list[str]:
        """Every target, ascending."""
        return sorted({target for one in set(self.targets) - {None} for target in one})


class PerturbedCells(NamedTuple):
    """Cells of one study. A *pair* is a perturbation in a context; every context has controls of its own."""

    values: scipy.sparse.csr_matrix  # float32 [cells, genes of the file], log1p(10⁴ · count / total)
    hashes: np.ndarray  # uint64 [cells], of their content
    pair: np.ndarray  # int64 [cells], −1: a control
    context: np.ndarray  # int64 [cells]
    rows: np.ndarray  # int64 [cells], rows of the file
    ids: np.ndarray  # object [cells], distinct names of the cells
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
    totals: str  # where the totals come from: WHOLE_PROFILE, PANEL or a column
    copies: int  # cells with all the counts of another one of their study


def name_cells(
    source: AnnDataSource, column: str, control: str, *, context: tuple[str, ...] = (), study: tuple[str, ...] | None = None,
    genes: Container[str] = frozenset(),
) -> NamedCells:
    """Read the names of perturbations, contexts and studies.

    Parameters
    ----------
    source
        Raw counts.
    column, control
        The column of obs that names the perturbations, and what it calls controls.
    context, study
        Columns of obs: controls are matched by the former; the latter are never mixed (by default the STUDY_COLUMNS there).
    genes
        Names that are genes (see `targets_of`).

    Raises
    ------
    UserError
        If a column is missing or useless, or there are no controls.
    """
    names = labels_of(source, column, "--perturbation-column")
    parsed = {name: targets_of(name, control, genes) for name in set(names) - {None}}
    study = tuple(name for name in STUDY_COLUMNS if name in source.obs.columns) if study is None else study
    if not any(is_control(name, control) for name in parsed):  # none of another name instead, such as "ctrl"
        known = ", ".join(sorted(parsed, key=lambda name: (parsed[name] != (), name))[:NAMED])  # likely ones first
        raise UserError(f"{source.name}: no cell is called {control!r} in {column!r}: choose --control among {known} …")
    targets = np.empty(len(names), dtype=object)
    targets[:] = [parsed.get(name) for name in names]
    contexts, studies = _joined(source, context, "--context"), _joined(source, study, "--study")
    return NamedCells(targets, contexts, studies, unique_ids(source.obs_names))


def read_perturbed_cells(
    source: AnnDataSource, named: NamedCells, *, total_counts_column: str | None = None,
    refused: Container[str] = frozenset(), seen: np.ndarray | None = None,
) -> Reading:
    """Read perturbed cells and controls.

    Parameters
    ----------
    source
        Raw counts.
    named
        What its cells are.
    total_counts_column
        Column of obs with each cell's total over its whole profile; by default the sum over the file's genes, which a file of
        less than SMALL_PANEL genes must be given as PANEL.
    refused
        Targets whose perturbations are left out.
    seen
        bool [cells of the source], cells to leave out because a model has seen them.

    Raises
    ------
    UserError
        If the totals are missing or wrong, or too few cells remain.
    """
    totals, where = _totals(source, total_counts_column)
    targets, contexts, studies = named.targets, named.contexts, named.studies
    have = {
        "without a perturbation's name": np.array([one is None for one in targets]),
        "without a context or study": np.array([a is None or b is None for a, b in zip(contexts, studies, strict=True)]),
        "without counts": np.zeros(len(targets), dtype=bool) if totals is None else totals <= 0,
        "seen by the model": np.zeros(len(targets), dtype=bool) if seen is None else seen,
        "of refused targets": np.array([any(target in refused for target in one or ()) for one in targets]),
    }
    keep, counted = np.ones(len(targets), dtype=bool), {"total": len(targets)}
    for reason, gone in have.items():
        counted[reason] = int((keep & gone).sum())
        keep &= ~gone
    rows = np.flatnonzero(keep)
    if not len(rows):
        raise UserError(f"{source.name}: no cell is left of {len(targets):,}: {_reasons(counted)}.")
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
    target_columns = _target_columns(source, set(named.all_targets()))
    left_out: dict[str, list[str]] = {"small": [], "no controls": []}
    found = []
    for name in sorted(set(studies[rows])):
        inside = np.flatnonzero(studies[rows] == name)
        one = _one_study(values[inside], hashes[inside], named, rows[inside], target_columns, name, left_out)
        found += [one] if one is not None else []
    if not found:
        raise UserError(
            f"{source.name}: no perturbation with {SMALLEST} cells in a context with {SMALLEST} controls is left "
            f"({_reasons(counted)}; {'; '.join(_listed(left_out))}): change --context or --study, or give more cells."
        )
    counted["in small groups"] = len(rows) - sum(len(one.pair) for one in found)
    counted["perturbed"] = int(sum((one.pair >= 0).sum() for one in found))
    counted["controls"] = int(sum((one.pair < 0).sum() for one in found))
    copies = sum(len(one.hashes) - len(np.unique(one.hashes)) for one in found)
    left_out = {reason: sorted(set(names)) for reason, names in left_out.items() if names}
    return Reading(found, left_out, counted, where, copies)


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


def _totals(source: AnnDataSource, column: str | None) -> tuple[np.ndarray | None, str]:
    """Each cell's total, float64 [cells], or None for the sum over the file's genes; and where they come from."""
    genes = len(source.identity.ids)
    if column is None or (column == PANEL and column not in source.obs.columns):
        if column is None and genes < SMALL_PANEL:
            raise UserError(
                f"{source.name} has {genes:,} genes only, whose sum is no cell's total: name the column of obs with totals of "
                f"whole profiles as --total-counts-column, or, if there is none, give --total-counts-column {PANEL}."
            )
        return None, WHOLE_PROFILE if genes >= SMALL_PANEL else PANEL
    if column not in source.obs.columns:
        known = ", ".join(map(str, source.obs.columns)) or "none"
        raise UserError(f"{source.name} has no column {column!r} in obs: choose --total-counts-column among {known}.")
    totals = pd.to_numeric(source.obs[column], errors="coerce").to_numpy(dtype=np.float64, na_value=np.nan)
    if not np.isfinite(totals).all():
        raise UserError(f"column {column!r} of {source.name} holds values that are no totals: give one with numbers.")
    return totals, f"column {column}"


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
    values: scipy.sparse.csr_matrix, hashes: np.ndarray, named: NamedCells, rows: np.ndarray,
    target_columns: dict[str, list[int]], study: str, left_out: dict[str, list[str]],
) -> PerturbedCells | None:
    """Cells of groups that are large enough; None if no pair is."""
    targets, contexts = named.targets[rows], named.contexts[rows]
    pairs, small, without_controls = large_pairs(targets, contexts)
    left_out["no controls"] += [context or study or "the file" for context in without_controls]
    left_out["small"] += [_called(*pair) for pair in small]
    if not pairs:
        return None
    perturbations, used = sorted({pair[0] for pair in pairs}), sorted({pair[1] for pair in pairs})
    number = {pair: place for place, pair in enumerate(pairs)} | {((), context): -1 for context in used}
    place = np.array([number.get(pair, -2) for pair in zip(targets, contexts, strict=True)])
    keep = np.flatnonzero(place >= -1)
    order = {context: place for place, context in enumerate(used)}
    return PerturbedCells(
        values=values[keep], hashes=hashes[keep], pair=place[keep],
        context=np.array([order[context] for context in contexts[keep]]), rows=rows[keep], ids=named.ids[rows[keep]],
        perturbations=perturbations, contexts=used,
        pair_perturbation=np.array([perturbations.index(pair[0]) for pair in pairs]),
        pair_context=np.array([order[pair[1]] for pair in pairs]), target_columns=target_columns, study=study,
    )


Pair = tuple[tuple[str, ...], str]  # targets and context


def large_pairs(targets: Sequence[tuple[str, ...]], contexts: Sequence[str]) -> tuple[list[Pair], list[Pair], list[str]]:
    """Pairs of a study with SMALLEST cells in contexts with SMALLEST controls, ascending; smaller ones; other contexts."""
    sizes = pd.DataFrame({"targets": targets, "context": contexts}).value_counts(sort=False)
    with_controls = {context for context in set(contexts) if sizes.get(((), context), 0) >= SMALLEST}
    found = {pair: size for pair, size in sizes.items() if pair[0] and pair[1] in with_controls}
    return (
        sorted(pair for pair, size in found.items() if size >= SMALLEST),
        sorted(pair for pair, size in found.items() if size < SMALLEST),
        sorted(set(contexts) - with_controls),
    )


def _called(targets: tuple[str, ...], context: str) -> str:
    return "+".join(targets) + (f" in {context}" if context else "")


def _reasons(counted: dict[str, int]) -> str:
    reasons = [f"{number:,} {reason}" for reason, number in counted.items() if number and reason != "total"]
    return ", ".join(reasons) or "none left out before"


def _listed(left_out: dict[str, list[str]]) -> list[str]:
    return [f"{reason}: {', '.join(sorted(set(names))[:NAMED])}" for reason, names in left_out.items() if names]
