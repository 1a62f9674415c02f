"""AnnData as a source of cells: an h5ad file or zarr store read by rows without loading it, or an AnnData in memory, backed
or a view; and 10x Genomics HDF5 files, which hold less.
"""

from collections.abc import Callable, Iterator
from functools import cached_property
from pathlib import Path

import numpy as np
import pandas as pd
from anndata import AnnData

from scbench.config import Fractional, Values
from scbench.data.cells import MAX_COUNT, Counts
from scbench.data.counts import FRACTIONAL, INEXACT_DISTANCE, INEXACT_SHARE, TAKE_FRACTIONAL, recover
from scbench.data.fractional import accept_counts
from scbench.data.gene_identity import GeneIdentity, identify
from scbench.data.sources.matrix import CSCMatrix, Matrix, Rows, ViewMatrix, open_matrix
from scbench.data.sources.row_order import RowFiles, write_rows
from scbench.data.sources.stored import Candidate, Reading, StoredAnnData, check_anndata, close, named_licence, open_root
from scbench.data.sources.tenx import TenxFile, is_tenx
from scbench.errors import UserError

SAMPLE_WINDOWS, WINDOW_ROWS = 32, 8  # rows on which a candidate for the counts is tested
PASS_ROWS = 1024  # rows at once in a pass over the whole source
_KINDS = {"h5ad": "an h5ad file", "zarr": "a zarr store", TenxFile.kind: "a 10x Genomics file", "AnnData": "an AnnData"}


class AnnDataSource:
    """The cells of one file or AnnData object: raw counts by ranges of rows, genes, annotation.

    The counts are the first of layers["counts"], raw and X that holds nothing but non-negative integers on rows spread
    over the source; every range that is read is tested again. A 10x Genomics HDF5 file has one matrix, called X.

    Parameters
    ----------
    source
        Path of an h5ad file, of the directory of a zarr store, or of a 10x Genomics HDF5 file; or an AnnData (in memory,
        backed or a view; it is never changed).
    layer
        Where the counts are: "X", "raw" or the name of a layer. Of no meaning for a 10x file.
    genes_column
        The column of var that names the genes. Of no meaning for a 10x file.
    recover_counts
        If nothing holds integers, bring counts back from log1p(count × unit) with an unknown unit a cell.
    fractional
        If nothing holds integers, or where some values are not whole: refuse, round or keep them (`accept_counts`).
    rows
        Where the rows of the same file and `layer` are (`bring_into_rows`).

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
        fractional: Fractional = "refuse",
        rows: Path | None = None,
    ):
        self.name = "AnnData" if isinstance(source, AnnData) else Path(source).name
        self._fractional: Fractional = fractional
        self._parts = _AnnDataObject(source) if isinstance(source, AnnData) else _open_parts(Path(source))
        self.kind: str = self._parts.kind
        if self.kind == TenxFile.kind:
            layer = genes_column = None
        try:
            with self._reading():
                self.n_cells: int = self._parts.n_cells
                if self.n_cells == 0:
                    raise UserError(f"{self.name} has no cells.")
                candidates = self._parts.candidates()
                if rows is None:
                    candidate, self._matrix, self._recovering = self._choose(candidates, layer, recover_counts)
                else:
                    candidate, self._matrix = candidates[layer], RowFiles(rows)
                    self._recovering = self._matrix.recovering
                var = candidate.var()
                if self._matrix.shape != (self.n_cells, len(var)):
                    raise UserError(
                        f"{self.name} is broken: {called(candidate.place)} is {self._matrix.shape[0]} × "
                        f"{self._matrix.shape[1]}, but there are {self.n_cells} cells and {len(var)} genes."
                    )
                self.layer: str = candidate.place
                self._var, self._genes_column = var, genes_column
        except BaseException:
            self.close()
            raise

    def __enter__(self) -> "AnnDataSource":
        return self

    def __exit__(self, *_) -> None:
        self.close()

    def close(self) -> None:
        """Close the file, if it is one that the source opened."""
        self._parts.close()

    def _reading(self) -> Reading:
        return Reading(self.name, _KINDS[self.kind])

    @cached_property
    def obs_names(self) -> np.ndarray:
        """The ids of the cells, str objects [cells]."""
        with self._reading():
            return self._parts.obs_names()

    @cached_property
    def obs(self) -> pd.DataFrame:
        """The annotation of the cells, read when first asked for."""
        with self._reading():
            return self._parts.obs()

    @cached_property
    def obsm_keys(self) -> list[str]:
        """What obsm holds."""
        with self._reading():
            return self._parts.obsm_keys()

    def obsm(self, key: str) -> object:
        """One of `obsm_keys`: an array, a sparse matrix or a DataFrame, with a row a cell."""
        with self._reading():
            return self._parts.obsm(key)

    @property
    def licence(self) -> str | None:
        """The licence that uns names, if it does."""
        with self._reading():
            return self._parts.licence()

    @cached_property
    def identity(self) -> GeneIdentity:
        """What var says about the genes; UserError if the column that is to name them is not there."""
        return identify(self._var.index, self._var, self._genes_column, self.name)

    @property
    def gene_names(self) -> list[str]:
        """What var calls the genes: its index."""
        return [str(name) for name in self._var.index]

    @property
    def by_columns(self) -> bool:
        """Whether the counts are stored by columns, so that reading rows here and there takes passes over all of them."""
        return isinstance(self._matrix, CSCMatrix)

    @property
    def values(self) -> Values:
        """What the file holds."""
        return "lognorm" if self._recovering else "counts"

    def read(self, start: int, stop: int) -> Counts:
        """The counts of cells `start` … `stop`−1; UserError names the cell if a value is no count."""
        rows = self._rows(start, stop)
        values = rows.values
        if self._recovering:
            self._check_recoverable(rows, start)
            values = recover(values, rows.offsets).counts
        accepted, problem = accept_counts(values, rows.offsets, self._fractional)
        if accepted is None:
            cell = self._cell(rows, start, problem.position)
            raise UserError(
                f"{called(self.layer)} of {self.name} holds {problem.reason} ({problem.value:g} in cell {cell!r}) where raw "
                "counts are expected; if they are elsewhere, say where with --layer"
                f"{TAKE_FRACTIONAL if problem.reason == FRACTIONAL else ''}."
            )
        return Counts(rows.columns, accepted.counts, rows.offsets, accepted.fractional, accepted.distance)

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
            raise UserError(f"the counts of {self.name} cannot be recovered from {called(self.layer)}: {_inexact(share)}.")
        known = np.concatenate(units)
        return {
            "layer": self.layer,
            "cells": self.n_cells,
            "values": values,
            "inexact_values": inexact,
            "inexact_share": share,
            "median_unit": float(np.median(known[~np.isnan(known)])),
        }

    def _rows(self, start: int, stop: int) -> Rows:
        """The values of cells `start` … `stop`−1 as they are stored."""
        with self._reading():
            rows = self._matrix.read(start, stop)
        if len(rows.columns) and not 0 <= rows.columns.min() <= rows.columns.max() < self._matrix.shape[1]:
            raise UserError(f"{self.name} is broken: {called(self.layer)} names a gene that does not exist.")
        return rows

    def _cell(self, rows: Rows, start: int, position: int) -> str:
        """The id of the cell of one value."""
        return self.obs_names[start + int(np.searchsorted(rows.offsets, position, side="right")) - 1]

    def _check_recoverable(self, rows: Rows, start: int) -> None:
        problem = _not_logarithms(rows.values)
        if problem:
            cell = self._cell(rows, start, problem[1])
            raise UserError(
                f"{called(self.layer)} of {self.name} holds {problem[0]} (in cell {cell!r}), "
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

    def _why_not_counts(self, matrix: Matrix, fractional: Fractional = "refuse") -> str | None:
        """None if a sample of the matrix holds counts; else what it holds instead."""
        empty = True
        for start, rows in self._sample(matrix):
            problem = accept_counts(rows.values, rows.offsets, fractional)[1]
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
        self, candidates: dict[str, Candidate], layer: str | None, recover_counts: bool
    ) -> tuple[Candidate, Matrix, bool]:
        """The first candidate that holds counts (or, if asked for, recoverable ones), opened; whether to recover."""
        if layer is not None:
            self._check_layer(candidates, layer)
        tried = [layer] if layer is not None else [place for place in ("counts", "raw", "X") if place in candidates]
        matrices = {place: self._open(candidates[place]) for place in tried}
        found = {}
        for place, matrix in matrices.items():
            found[place] = self._why_not_counts(matrix)
            if found[place] is None:
                return candidates[place], matrix, False
        if self._fractional != "refuse":
            for place, matrix in matrices.items():
                found[place] = self._why_not_counts(matrix, self._fractional)
                if found[place] is None:
                    return candidates[place], matrix, False
        if recover_counts:
            for place, matrix in matrices.items():
                found[place] = self._why_not_recoverable(matrix)
                if found[place] is None:
                    return candidates[place], matrix, True
        if matrices and all(matrix.shape[1] == 0 for matrix in matrices.values()):
            raise UserError(f"{self.name} has no genes.")
        reasons = "; ".join(f"{called(place)} holds {reason}" for place, reason in found.items()) or "it has no matrix"
        if recover_counts:
            raise UserError(f"no counts can be recovered from {self.name}: {reasons}.")
        others = [place for place in candidates if place not in tried and self._holds_counts(candidates[place])]
        if others:
            advice = f"there are integers in {' and '.join(map(called, others))}: give --layer {others[0]}"
        else:
            advice = ("use a file with raw counts, or --recover-counts (of a benchmark: --values lognorm) if the values are "
                      "log-normalised counts")
            if self._fractional == "refuse" and any(reason.startswith(FRACTIONAL) for reason in found.values()):
                advice += TAKE_FRACTIONAL
        raise UserError(f"no raw counts were found in {self.name}: {reasons}; {advice}.")

    def _check_layer(self, candidates: dict[str, Candidate], layer: str) -> None:
        if layer not in candidates:
            there = ", ".join(candidates) or "nothing"
            raise UserError(f"{self.name} has no layer {layer!r} (there are: {there}): give another --layer.")

    def _open(self, candidate: Candidate) -> Matrix:
        try:
            return candidate.open()
        except (ValueError, KeyError, TypeError) as error:
            raise UserError(f"{called(candidate.place)} of {self.name} is no matrix that can be read: {error}.") from None

    def _holds_counts(self, candidate: Candidate) -> bool:
        try:
            return self._why_not_counts(self._open(candidate)) is None
        except UserError:
            return False


def called(place: str) -> str:
    """A place of counts, in words."""
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


class _AnnDataObject:
    """The parts of an AnnData object."""

    kind = "AnnData"

    def __init__(self, adata: AnnData):
        self._adata = adata
        self.n_cells = adata.n_obs

    def obs_names(self) -> np.ndarray:
        return self._adata.obs_names.to_numpy(dtype=object)

    def obs(self) -> pd.DataFrame:
        return self._adata.obs

    def obsm_keys(self) -> list[str]:
        return list(self._adata.obsm)

    def obsm(self, key: str) -> object:
        return self._adata.obsm[key]

    def licence(self) -> str | None:
        return named_licence(self._adata.uns)

    def candidates(self) -> dict[str, Candidate]:
        return _object_candidates(self._adata)

    def close(self) -> None:
        pass


def bring_into_rows(path: Path, layer: str, start: int, stop: int, directory: Path, *, recovering: bool) -> None:
    """Write cells `start` … `stop`−1 of a file that has them by columns into `directory`, to be read as `rows`.

    `recovering`: whether counts have to be recovered. UserError if the file is damaged.
    """
    parts = _open_parts(path)
    try:
        with Reading(path.name, _KINDS[parts.kind]):
            write_rows(parts.candidates()[layer].open(), start, stop, directory, recovering=recovering)
    finally:
        parts.close()


def _open_parts(path: Path) -> StoredAnnData | TenxFile:
    root = open_root(path)
    try:
        if is_tenx(root):
            return TenxFile(root, path.name)
        check_anndata(root, path)
        with Reading(path.name, "an AnnData"):
            return StoredAnnData(root)
    except BaseException:
        close(root)
        raise


def _object_candidates(adata: AnnData) -> dict[str, Candidate]:
    def candidate(place: str, get: Callable[[AnnData], object], var: Callable[[], pd.DataFrame]) -> Candidate:
        def open_() -> Matrix:
            if not adata.is_view:
                return open_matrix(get(adata))
            # asking a view for its matrix copies all of it, and a backed view cannot be sliced: read from the viewed object
            viewed = adata._adata_ref
            rows = np.arange(viewed.n_obs)[adata._oidx]
            columns = None if place == "raw" else np.arange(viewed.n_vars)[adata._vidx]  # a view has all genes of raw
            return ViewMatrix(open_matrix(get(viewed)), rows, columns)

        return Candidate(place, open_, var)

    candidates = {name: candidate(name, lambda a, name=name: a.layers[name], lambda: adata.var) for name in adata.layers}
    if adata.raw is not None:
        candidates["raw"] = candidate("raw", lambda a: a.raw.X, lambda: adata.raw.var)
    if adata.isbacked or (adata._adata_ref if adata.is_view else adata).X is not None:
        candidates["X"] = candidate("X", lambda a: a.X, lambda: adata.var)
    return candidates
