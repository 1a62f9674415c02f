"""Predictions that something else made out of fold, in an h5ad file: labels of cells, or profiles of perturbed cells."""

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import anndata
import numpy as np
import pandas as pd
import scipy.sparse

from scbench.data.sources.stored import Reading, check_anndata, close, open_root
from scbench.errors import UserError
from scbench.evaluation.labels import read_labels
from scbench.evaluation.split_files import Split, unique_ids
from scbench.files import sha256

DIGEST = "split_sha256"  # key of uns: the digest of the split that the predictions were made on
REFUSED = "refused_targets"  # key of uns: targets whose perturbations were left out of the split's, and have no prediction
PREDICTION = "prediction_"  # columns of obs, with the number of the repetition
STUDY = "study"  # column of obs that profiles may have beside those of KEY
KEY = ("repetition", "fold", "perturbation", "context")  # columns of obs that say what a profile is of


class Profiles(NamedTuple):
    """Predicted mean profiles of held-out pairs, log1p(10⁴ · count / total)."""

    source: str
    row: dict[tuple[int, int, str, str, str], int]  # KEY and the study ("" if the file has no such column) → row of `values`
    gene: dict[str, int]  # → column of `values`
    values: np.ndarray  # float64 [rows, genes]
    by_study: bool  # whether the file has a column of studies

    def of(
        self, repetition: int, fold: int, perturbation: str, context: str, genes: Sequence[str], study: str = ""
    ) -> np.ndarray:
        """The profile of one held-out pair over `genes`, float64 [genes]; UserError if the file lacks it."""
        wanted = (repetition, fold, perturbation, context, study if self.by_study else "")
        if wanted not in self.row:
            words = ", ".join(f"{name} {value!r}" for name, value in zip((*KEY, STUDY), wanted, strict=True) if value != "")
            raise UserError(f"{self.source} has no prediction of {words}: give one of everything that the split holds out.")
        lacking = [gene for gene in genes if gene not in self.gene]
        if lacking:
            raise UserError(f"{self.source} predicts nothing for {len(lacking):,} of the {len(genes):,} genes to score "
                            f"({lacking[0]}, say): name its var as the benchmark's file does, and give all its genes.")
        return self.values[self.row[wanted], [self.gene[gene] for gene in genes]]


class ExternalPredictions:
    """An h5ad file of predictions made on a split that a benchmark wrote.

    uns["split_sha256"] is the split's digest. For classification, obs["prediction_0"], "prediction_1", … are the labels
    predicted of each cell out of fold, a column a repetition; X is not read. For perturbations, a row is the predicted mean
    profile of a held-out (repetition, fold, perturbation, context), columns of obs, in log1p(10⁴ · count / total);
    uns["refused_targets"] may list targets whose perturbations nothing was fitted on and nothing is predicted of.

    Raises
    ------
    UserError
        If the file cannot be read or holds no digest.
    """

    def __init__(self, path: Path | str):
        self._path = Path(path)
        self.name = self._path.stem
        self._root = open_root(self._path)
        try:
            check_anndata(self._root, self._path)
            self.obs: pd.DataFrame = self._element("obs")
            uns = self._root.get("uns", {})
            digest = self._element(f"uns/{DIGEST}") if DIGEST in uns else None
            self.refused = [str(one) for one in np.atleast_1d(self._element(f"uns/{REFUSED}"))] if REFUSED in uns else []
        finally:
            close(self._root)
        if not isinstance(digest, str):
            raise UserError(f'{self._path} has no text uns["{DIGEST}"]: write there the sha256 of the split.json that the '
                            "predictions were made on, or, of an embedding in obsm, give obsm:KEY.")
        self._digest = digest
        self.provenance = {"predictions": self._path.name, "sha256": sha256(self._path), DIGEST: digest}

    def check(self, split: Split) -> None:
        """UserError unless the predictions were made on this split."""
        if self._digest != split.digest:
            raise UserError(f"{self._path} was predicted on the split {self._digest[:12]}…, not on this one "
                            f"({split.digest[:12]}…): give its own split file, or predict again on this one.")

    def read_labels(self, split: Split, cell_ids: Sequence[str], classes: Sequence[str]) -> np.ndarray:
        """Labels predicted out of fold, str objects [repetitions, cells].

        Parameters
        ----------
        split
            What they must have been made on.
        cell_ids
            The cells to score, as `unique_ids` of their file names them.
        classes
            The labels that there are.

        Raises
        ------
        UserError
            If the split is another, or a repetition, cell or label is missing, or no label of the benchmark's.
        """
        self.check(split)
        wanted = [f"{PREDICTION}{repetition}" for repetition in range(split.repetitions)]
        if lacking := [column for column in wanted if column not in self.obs.columns]:
            raise UserError(f"{self._path} has no column {lacking[0]} in obs: give a column of labels for each of the split's "
                            f"{split.repetitions} repetitions.")
        rows = pd.Index(unique_ids(self.obs.index)).get_indexer(pd.Index(cell_ids, dtype=object))
        if (rows < 0).any():
            raise UserError(f"{self._path} has no prediction for {(rows < 0).sum():,} of {len(rows):,} cells "
                            f"({cell_ids[int(np.argmax(rows < 0))]!r}, say): predict all cells of the benchmark's file.")
        labels = np.stack([read_labels(self.obs, column, self._path.name)[rows] for column in wanted])
        known = set(classes)
        for column, predicted in zip(wanted, labels, strict=True):
            wrong = next((place for place, label in enumerate(predicted) if label not in known), None)
            if wrong is not None:
                what = "no label" if predicted[wrong] is None else f"{predicted[wrong]!r}, which is no class of the benchmark,"
                raise UserError(f"{self._path} predicts {what} for cell {cell_ids[wrong]!r} in {column}: give one of "
                                f"{', '.join(sorted(known)[:5])}{' …' if len(known) > 5 else ''}.")
        return labels

    def read_profiles(self, split: Split) -> Profiles:
        """The predicted profiles; UserError if the split is another, or the file doesn't say what its rows are."""
        self.check(split)
        if lacking := [column for column in KEY if column not in self.obs.columns]:
            raise UserError(f"{self._path} has no column {' and no '.join(lacking)} in obs: say of each row what it predicts.")
        by_study = STUDY in self.obs.columns
        numbers = [self._whole(column) for column in KEY[:2]]
        words = [["" if pd.isna(value) else str(value) for value in self.obs[column]] for column in KEY[2:]]
        words.append([str(value) for value in self.obs[STUDY]] if by_study else [""] * len(self.obs))
        keys = list(zip(*numbers, *words, strict=True))
        row = {key: place for place, key in enumerate(keys)}
        if len(row) != len(keys):
            raise UserError(f"{self._path} predicts something twice: give one row for each {', '.join(KEY)}.")
        self._root = open_root(self._path)
        try:
            values, names = self._element("X"), self._element("var").index
        finally:
            close(self._root)
        values = np.asarray(values.toarray() if scipy.sparse.issparse(values) else values)
        if values.dtype.kind not in "fiu" or not np.isfinite(values).all():
            raise UserError(f"X of {self._path} holds NaN or what is no number: give profiles of numbers.")
        if names.has_duplicates:
            raise UserError(f"{self._path} has the gene {names[names.duplicated()][0]} twice: give each gene once.")
        gene = {str(name): place for place, name in enumerate(names)}
        return Profiles(self._path.name, row, gene, values.astype(np.float64), by_study)

    def _whole(self, column: str) -> list[int]:
        numbers = pd.to_numeric(self.obs[column], errors="coerce").to_numpy(dtype=np.float64)
        if not (numbers == np.rint(numbers)).all():  # NaN is not equal to itself
            raise UserError(f"column {column} of {self._path} holds what is no whole number: number them from 0.")
        return numbers.astype(int).tolist()

    def _element(self, place: str) -> object:
        with Reading(self._path.name, "an h5ad file"):
            return anndata.io.read_elem(self._root[place])
