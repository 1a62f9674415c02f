"""Predicted profiles in an h5ad file: those of models that were asked elsewhere, and a benchmark's own.

A row is the predicted mean profile of a held-out pair, log1p(10⁴ · count / total); columns of obs say of which repetition,
fold, perturbation and context (and study, if the file has several). What is written holds the controls too, so that tools
that ask for a perturbation column and the name of its controls can read it.
"""

from collections.abc import Container, Iterable
from pathlib import Path

import anndata
import numpy as np
import pandas as pd

from scbench.errors import UserError
from scbench.evaluation.perturbation.names import targets_of
from scbench.evaluation.perturbation.scoring import Held
from scbench.evaluation.predictions_files import DIGEST, KEY, REFUSED, STUDY, ExternalPredictions, Profiles
from scbench.evaluation.split_files import Split


def read_profiles(model: ExternalPredictions, split: Split, control: str, genes: Container[str]) -> Profiles:
    """The profiles by the perturbations' targets, joined by +, however the file writes them; UserError if they are of another
    split. `genes`: names that are genes."""
    profiles = model.read_profiles(split)
    row: dict[tuple[int, int, str, str, str], int] = {}
    for (repetition, fold, name, context, study), place in profiles.row.items():
        key = repetition, fold, "+".join(targets_of(name, control, genes)), context, study
        if key[2] and key in row:
            raise UserError(f"{profiles.source} predicts {key[2]} twice in repetition {repetition}: give one row a fold.")
        row[key] = place
    return profiles._replace(row=row)


def changes_of(profiles: Profiles, held: Held, repetition: int, genes: np.ndarray) -> np.ndarray:
    """Predicted changes of a fold's held-out pairs against the controls that are not scored, float64 [pairs, genes].

    `genes`: the names of the file's genes. UserError if a pair or a gene has no prediction.
    """
    cells = held.cells
    return np.stack([
        profiles.of(
            repetition, held.fold.number, "+".join(cells.perturbations[cells.pair_perturbation[pair]]),
            cells.contexts[cells.pair_context[pair]], genes[held.genes], cells.study,
        ) - held.controls[cells.pair_context[pair]]
        for pair in held.fold.pairs
    ])


class SavedProfiles:
    """Gathers a model's predicted profiles, fold by fold, and writes them.

    Parameters
    ----------
    name
        What the table calls the model.
    split
        What it was fitted on.
    control
        What controls are called.
    genes
        The names of the file's genes.
    refused
        Targets whose perturbations were left out.
    """

    def __init__(self, name: str, split: Split, control: str, genes: np.ndarray, refused: Iterable[str]):
        self._name, self._split, self._control, self._genes = name, split, control, genes
        self._refused = np.array(sorted(refused), dtype=object)
        self._obs: list[tuple] = []
        self._parts: list[tuple[np.ndarray, np.ndarray, np.ndarray]] = []  # columns, profiles over these, and over all genes

    def add(self, held: Held, repetition: int, changes: np.ndarray, everywhere: np.ndarray) -> None:
        """Changes of a fold's held-out pairs, [pairs, genes of the fold]; `everywhere`: the mean of the controls that are not
        scored over all genes of the file, [contexts, genes]."""
        cells, number = held.cells, held.fold.number
        where = cells.pair_context[held.fold.pairs]
        for pair, context in zip(held.fold.pairs, where, strict=True):
            name = "+".join(cells.perturbations[cells.pair_perturbation[pair]])
            self._obs.append((repetition, number, name, cells.contexts[context], cells.study))
        self._parts.append((held.genes, held.controls[where] + changes, everywhere[where]))
        for context in np.unique(where):
            self._obs.append((repetition, number, self._control, cells.contexts[context], cells.study))
        self._parts.append((held.genes, held.controls[np.unique(where)], everywhere[np.unique(where)]))

    def write(self, path: Path) -> None:
        """Write the h5ad file. Of a gene that a fold did not predict, the controls' mean stands in."""
        columns = np.unique(np.concatenate([genes for genes, _, _ in self._parts]))
        values = np.concatenate([everywhere[:, columns] for _, _, everywhere in self._parts])
        start = 0
        for genes, profiles, _ in self._parts:
            values[start : start + len(profiles), np.searchsorted(columns, genes)] = profiles
            start += len(profiles)
        obs = pd.DataFrame(self._obs, columns=[*KEY, STUDY])
        if not obs[STUDY].any():
            obs = obs.drop(columns=STUDY)
        obs.index = ["/".join(map(str, one)) for one in obs.itertuples(index=False)]
        file = anndata.AnnData(values, obs=obs, var=pd.DataFrame(index=self._genes[columns]))
        file.uns = {DIGEST: self._split.digest, "model": self._name, "control": self._control}
        if len(self._refused):
            file.uns[REFUSED] = self._refused
        file.write_h5ad(path)
