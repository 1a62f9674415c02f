"""AnnData as a source of cells: an h5ad file read by rows without loading it, or an AnnData in memory, backed or a view."""

from collections.abc import Callable, Iterator
from functools import cached_property
from pathlib import Path
from typing import NamedTuple

import anndata
import h5py
import numpy as np
import pandas as pd
from anndata import AnnData

from scbench.data.cells import MAX_COUNT, Counts
from scbench.data.counts import INEXACT_DISTANCE, INEXACT_SHARE, find_problem, recover
from scbench.data.gene_identity import GeneIdentity, identify
from scbench.data.sources.matrix import Matrix, Rows, ViewMatrix, open_matrix
from scbench.errors import UserError

SAMPLE_WINDOWS, WINDOW_ROWS = 32, 8  # rows on which a candidate for the counts is tested
PASS_ROWS = 1024  # rows at once in a pass over the whole source


class _Candidate(NamedTuple):
    """A place where the counts may be."""

    place: str  # X, raw, or the name of a layer: what --layer takes
    open: Callable[[], Matrix]
    var: Callable[[], pd.DataFrame]


class AnnDataSource:
    """The cells of one h5ad file or AnnData object: raw counts by ranges of rows, genes, annotation.

    The counts are the first of layers["counts"], raw and X that holds nothing but non-negative integers on rows spread
    over the source; every range that is read is tested again.

    Parameters
    ----------
    source
        Path of an h5ad file, or an AnnData (in memory, backed or a view; it is never changed).
    layer
        Where the counts are: "X", "raw" or the name of a layer.
    genes_column
        The column of var that names the genes.
    recover_counts
        If nothing holds integers, bring counts back from log1p(count × unit) with an unknown unit a cell.

    Raises
    ------
    UserError
        If the source cannot be read, is empty, or holds no counts.
    """

    exact_up_to = MAX_COUNT  # larger counts are a guess

    def __init__(
        self,
        source: Path | str | AnnData,
        *,
        layer: str | None = None,
        genes_column: str | None = None,
        recover_counts: bool = False,
    ):
        self._file: h5py.File | None = None
        if isinstance(source, AnnData):
            self.name = "AnnData"
            self.n_cells = source.n_obs
            self._adata, candidates = source, _object_candidates(source)
        else:
            self.name = Path(source).name
            self._file = _open_file(Path(source))
            self._adata, candidates = None, _file_candidates(self._file)
        try:
            with self._reading():
                if self._file is not None:
                    self.n_cells = _length(self._file["obs"])
                if self.n_cells == 0:
                    raise UserError(f"{self.name} has no cells.")
                candidate, self._matrix, self._recovering = self._choose(candidates, layer, recover_counts)
                var = candidate.var()
                if self._matrix.shape != (self.n_cells, len(var)):
                    raise UserError(
                        f"{self.name} is broken: {_called(candidate.place)} is {self._matrix.shape[0]} × "
                        f"{self._matrix.shape[1]}, but there are {self.n_cells} cells and {len(var)} genes."
                    )
                self.layer: str = candidate.place
                self.identity: GeneIdentity = identify(var.index, var, genes_column, self.name)
        except BaseException:
            self.close()
            raise

    def __enter__(self) -> "AnnDataSource":
        return self

    def __exit__(self, *_) -> None:
        self.close()

    def close(self) -> None:
        """Close the file, if it is one that the source opened."""
        if self._file is not None:
            self._file.close()

    def _reading(self) -> "_Reading":
        return _Reading(self.name)

    @cached_property
    def obs_names(self) -> np.ndarray:
        """The ids of the cells, str objects [cells]."""
        if self._adata is not None:
            return self._adata.obs_names.to_numpy(dtype=object)
        with self._reading():
            obs = self._file["obs"]
            return np.array([str(name) for name in anndata.io.read_elem(obs[obs.attrs["_index"]])], dtype=object)

    @cached_property
    def obs(self) -> pd.DataFrame:
        """The annotation of the cells, read when first asked for."""
        if self._adata is not None:
            return self._adata.obs
        with self._reading():
            return anndata.io.read_elem(self._file["obs"])

    def read(self, start: int, stop: int) -> Counts:
        """The counts of cells `start` … `stop`−1; UserError names the cell if a value is no count."""
        with self._reading():
            rows = self._matrix.read(start, stop)
        if len(rows.columns) and not 0 <= rows.columns.min() <= rows.columns.max() < self._matrix.shape[1]:
            raise UserError(f"{self.name} is broken: {_called(self.layer)} names a gene that does not exist.")
        values = rows.values
        if self._recovering:
            self._check_recoverable(rows, start)
            values = recover(values, rows.offsets).counts
        problem = find_problem(values)
        if problem:
            cell = self._cell(rows, start, problem.position)
            raise UserError(
                f"{_called(self.layer)} of {self.name} holds {problem.reason} ({problem.value:g} in cell {cell!r}) where raw "
                "counts are expected; if they are elsewhere, say where with --layer."
            )
        return Counts(rows.columns, values.astype(np.uint32), rows.offsets)

    @cached_property
    def recovered(self) -> dict | None:
        """What was recovered, over all cells; None if the source holds counts. The first use reads the whole source.

        Raises
        ------
        UserError
            If more than half a percent of the values are not counts times a unit.
        """
        if not self._recovering:
            return None
        values = inexact = 0
        units = []
        for start in range(0, self.n_cells, PASS_ROWS):
            with self._reading():
                rows = self._matrix.read(start, min(start + PASS_ROWS, self.n_cells))
            self._check_recoverable(rows, start)
            recovery = recover(rows.values, rows.offsets)
            values += int(np.count_nonzero(recovery.counts))
            inexact += int(recovery.inexact.sum())
            units.append(recovery.units)
        share = inexact / values
        if share >= INEXACT_SHARE:
            raise UserError(f"the counts of {self.name} cannot be recovered from {_called(self.layer)}: {_inexact(share)}.")
        known = np.concatenate(units)
        return {
            "layer": self.layer,
            "cells": self.n_cells,
            "values": values,
            "inexact_values": inexact,
            "inexact_share": share,
            "median_unit": float(np.median(known[~np.isnan(known)])),
        }

    def _cell(self, rows: Rows, start: int, position: int) -> str:
        """The id of the cell of one value."""
        return self.obs_names[start + int(np.searchsorted(rows.offsets, position, side="right")) - 1]

    def _check_recoverable(self, rows: Rows, start: int) -> None:
        problem = _not_logarithms(rows.values)
        if problem:
            cell = self._cell(rows, start, problem[1])
            raise UserError(
                f"{_called(self.layer)} of {self.name} holds {problem[0]} (in cell {cell!r}), "
                "which log-normalised counts never are."
            )

    def _sample(self, matrix: Matrix) -> Iterator[tuple[int, Rows]]:
        """Windows of rows spread over the matrix; all of it as long as nothing but zeros has turned up."""
        reach = min(matrix.cheap_rows, self.n_cells)
        windows = np.unique(np.linspace(0, max(0, reach - WINDOW_ROWS), SAMPLE_WINDOWS).astype(int))
        seen = False
        for start in windows:
            rows = matrix.read(int(start), min(int(start) + WINDOW_ROWS, reach))
            seen |= bool(rows.values.any())
            yield int(start), rows
        start = 0
        while not seen and start < self.n_cells:
            rows = matrix.read(start, min(start + PASS_ROWS, self.n_cells))
            seen = bool(rows.values.any())
            yield start, rows
            start += PASS_ROWS

    def _why_not_counts(self, matrix: Matrix) -> str | None:
        """None if a sample of the matrix holds counts; else what it holds instead."""
        empty = True
        for start, rows in self._sample(matrix):
            problem = find_problem(rows.values)
            if problem:
                return f"{problem.reason} such as {problem.value:g} in cell {self._cell(rows, start, problem.position)!r}"
            empty &= not rows.values.any()
        return "nothing but zeros" if empty else None

    def _why_not_recoverable(self, matrix: Matrix) -> str | None:
        """None if counts can be recovered from a sample of the matrix; else what it holds instead."""
        values = inexact = 0
        for start, rows in self._sample(matrix):
            problem = _not_logarithms(rows.values)
            if problem:
                return f"{problem[0]} in cell {self._cell(rows, start, problem[1])!r}"
            recovery = recover(rows.values, rows.offsets)
            values += int(np.count_nonzero(recovery.counts))
            inexact += int(recovery.inexact.sum())
        if values == 0:
            return "nothing but zeros"
        share = inexact / values
        return f"values that are no multiples of a unit ({_inexact(share)})" if share >= INEXACT_SHARE else None

    def _choose(
        self, candidates: dict[str, _Candidate], layer: str | None, recover_counts: bool
    ) -> tuple[_Candidate, Matrix, bool]:
        """The first candidate that holds counts (or, if asked for, recoverable ones), opened; whether to recover."""
        if layer is not None and layer not in candidates:
            there = ", ".join(candidates) or "nothing"
            raise UserError(f"{self.name} has no layer {layer!r} (there are: {there}): give another --layer.")
        tried = [layer] if layer is not None else [place for place in ("counts", "raw", "X") if place in candidates]
        matrices = {place: self._open(candidates[place]) for place in tried}
        found = {}
        for place, matrix in matrices.items():
            found[place] = self._why_not_counts(matrix)
            if found[place] is None:
                return candidates[place], matrix, False
        if recover_counts:
            for place, matrix in matrices.items():
                found[place] = self._why_not_recoverable(matrix)
                if found[place] is None:
                    return candidates[place], matrix, True
        if matrices and all(matrix.shape[1] == 0 for matrix in matrices.values()):
            raise UserError(f"{self.name} has no genes.")
        reasons = "; ".join(f"{_called(place)} holds {reason}" for place, reason in found.items()) or "it has no matrix"
        if recover_counts:
            raise UserError(f"no counts can be recovered from {self.name}: {reasons}.")
        others = [place for place in candidates if place not in tried and self._holds_counts(candidates[place])]
        if others:
            advice = f"there are integers in {' and '.join(map(_called, others))}: give --layer {others[0]}"
        else:
            advice = "use a file with raw counts, or --recover-counts if the values are log-normalised counts"
        raise UserError(f"no raw counts were found in {self.name}: {reasons}; {advice}.")

    def _open(self, candidate: _Candidate) -> Matrix:
        try:
            return candidate.open()
        except (ValueError, KeyError, TypeError) as error:
            raise UserError(f"{_called(candidate.place)} of {self.name} is no matrix that can be read: {error}.") from None

    def _holds_counts(self, candidate: _Candidate) -> bool:
        try:
            return self._why_not_counts(self._open(candidate)) is None
        except UserError:
            return False


class _Reading:
    """Turns what HDF5 and AnnData raise on a damaged file into one sentence."""

    def __init__(self, name: str):
        self._name = name

    def __enter__(self) -> None:
        pass

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _) -> None:
        if isinstance(error, (OSError, KeyError, RuntimeError)):
            raise UserError(f"{self._name} is damaged or not an h5ad file: {str(error).splitlines()[0]}.") from error


def _called(place: str) -> str:
    return place if place in ("X", "raw") else f"layer {place!r}"


def _inexact(share: float) -> str:
    return f"{share:.1%} of the values lie over {INEXACT_DISTANCE} from an integer when a cell's smallest value is one count"


def _not_logarithms(values: np.ndarray) -> tuple[str, int] | None:
    """What makes values impossible as log1p of scaled counts, and where; None if nothing does."""
    if values.dtype.kind not in "buif":
        return f"values of type {values.dtype}", 0
    for reason, bad in (
        ("NaN", np.isnan(values)),
        ("negative values", values < 0),
        ("infinite or huge values", values > np.log1p(float(MAX_COUNT)) + 50),
    ):
        if bad.any():
            return reason, int(np.argmax(bad))
    return None


def _open_file(path: Path) -> h5py.File:
    if not path.exists():
        raise UserError(f"there is no file {path}.")
    if path.is_dir():
        raise UserError(f"{path} is a directory, not an h5ad file.")
    if path.stat().st_size == 0:
        raise UserError(f"{path} is empty (0 bytes).")
    try:
        file = h5py.File(path, "r", locking="best-effort")
    except OSError as error:
        if "truncated" in str(error):
            raise UserError(f"{path} is truncated: copy or download it again.") from None
        raise UserError(f"{path} cannot be read as an h5ad (HDF5) file: {str(error).splitlines()[0]}.") from None
    missing = [name for name in ("obs", "var") if name not in file]
    old = [name for name in ("obs", "var") if name in file and "_index" not in file[name].attrs]
    if missing or old:
        file.close()
        if missing:
            raise UserError(f"{path} is an HDF5 file but not an h5ad file: it has no {' and no '.join(missing)}.")
        raise UserError(f"{path} is an h5ad file of a layout from before 2020: read and write it once with a current anndata.")
    return file


def _length(frame: h5py.Group) -> int:
    index = frame[frame.attrs["_index"]]
    return index.shape[0] if isinstance(index, h5py.Dataset) else len(anndata.io.read_elem(index))


def _file_candidates(file: h5py.File) -> dict[str, _Candidate]:
    def candidate(place: str, item: str, var: str) -> _Candidate:
        return _Candidate(place, lambda: open_matrix(file[item]), lambda: anndata.io.read_elem(file[var]))

    candidates = {name: candidate(name, f"layers/{name}", "var") for name in file.get("layers", ())}
    if "raw" in file and "X" in file["raw"]:
        candidates["raw"] = candidate("raw", "raw/X", "raw/var")
    if "X" in file and not _is_null(file["X"]):
        candidates["X"] = candidate("X", "X", "var")
    return candidates


def _is_null(item: h5py.Group | h5py.Dataset) -> bool:
    return item.attrs.get("encoding-type") == "null"


def _object_candidates(adata: AnnData) -> dict[str, _Candidate]:
    def candidate(place: str, get: Callable[[AnnData], object], var: Callable[[], pd.DataFrame]) -> _Candidate:
        def open_() -> Matrix:
            if not adata.is_view:
                return open_matrix(get(adata))
            # asking a view for its matrix copies all of it, and a backed view cannot be sliced: read from the viewed object
            viewed = adata._adata_ref
            rows = np.arange(viewed.n_obs)[adata._oidx]
            columns = None if place == "raw" else np.arange(viewed.n_vars)[adata._vidx]  # a view has all genes of raw
            return ViewMatrix(open_matrix(get(viewed)), rows, columns)

        return _Candidate(place, open_, var)

    candidates = {name: candidate(name, lambda a, name=name: a.layers[name], lambda: adata.var) for name in adata.layers}
    if adata.raw is not None:
        candidates["raw"] = candidate("raw", lambda a: a.raw.X, lambda: adata.raw.var)
    if adata.isbacked or (adata._adata_ref if adata.is_view else adata).X is not None:
        candidates["X"] = candidate("X", lambda a: a.X, lambda: adata.var)
    return candidates
