"""The CELLxGENE Census as a source of cells: those that a selection lists, streamed in slices of soma_joinids."""

import re
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow as pa

from scbench.config import Fractional
from scbench.data.cells import MAX_COUNT, Counts
from scbench.data.counts import FRACTIONAL, TAKE_FRACTIONAL
from scbench.data.fractional import accept_counts
from scbench.data.gene_identity import GeneIdentity, identify
from scbench.data.obs import Obs, plain_column
from scbench.data.sources.census_client import census_name, experiment, open_census, reading
from scbench.data.sources.census_client import datasets as info_of_datasets
from scbench.data.sources.matrix import Rows, join_rows
from scbench.data.sources.stored import LICENCE_KEYS
from scbench.errors import UserError

SLICE_CELLS = 2048  # cells whose counts are asked for at once: a row of tiles of the Census
OBS_CELLS = 16_384  # cells whose value of one column of obs is asked for at once
NO_DONOR = re.compile(r"\s*(unknown|pooled|na)?\s*", re.IGNORECASE)  # not one person: such cells stay with their dataset


class _Selected:
    """The soma_joinids that a file lists."""

    def __init__(self, file: Path):
        self._file = file
        self.n_cells = file.stat().st_size // 8

    def read(self, start: int, stop: int) -> np.ndarray:
        return np.fromfile(self._file, dtype="<i8", count=stop - start, offset=8 * start)

    def coordinates(self, start: int, stop: int) -> tuple[np.ndarray, slice | pa.Array]:
        """The soma_joinids of cells `start` … `stop`−1, and how to ask the client for them."""
        joinids = self.read(start, stop)
        whole = joinids[-1] - joinids[0] == len(joinids) - 1
        return joinids, slice(int(joinids[0]), int(joinids[-1])) if whole else pa.array(joinids)


class CensusSource:
    """Chosen cells of a census: raw counts by ranges of rows, genes, annotation.

    Counts are asked for in slices of SLICE_CELLS cells, and the last slice is kept.

    Parameters
    ----------
    location
        A version (a date) or a URI.
    joinids
        The file that lists the cells' soma_joinids (int64, ascending).
    fractional
        What becomes of counts that are not whole (`accept_counts`).

    Raises
    ------
    UserError
        If the census cannot be opened, or has no counts or genes.
    """

    kind = "census"
    exact_up_to = MAX_COUNT
    layer = "raw"
    recovered = None

    def __init__(self, location: str, joinids: Path, fractional: Fractional = "refuse"):
        self.name = census_name(location)
        self._fractional: Fractional = fractional
        self._location = location
        self._selected = _Selected(joinids)
        self.n_cells = self._selected.n_cells
        self._obs = CensusObs(location, joinids)
        rna = experiment(open_census(location)).ms["RNA"]
        with reading(location):
            self._counts = rna.X["raw"]
            var = rna.var.read(column_names=["soma_joinid", "feature_id", "feature_name"]).concat().to_pandas()
        var = var.sort_values("soma_joinid")
        self._genes = var["soma_joinid"].to_numpy()
        self.identity: GeneIdentity = identify(var["feature_id"], var[["feature_name"]], None, self.name)
        self._held: tuple[int, Rows] | None = None  # the first cell of the slice that was read last, and the slice

    def __enter__(self) -> "CensusSource":
        return self

    def __exit__(self, *_) -> None:
        self.close()

    def close(self) -> None:
        """Forget the slice; the census itself stays open for the next source of this process."""
        self._held = None

    def present(self, datasets: Sequence[str]) -> np.ndarray:
        """Which genes each dataset measured, bool [datasets, genes]: all, if the census says nothing of it."""
        census = open_census(self._location)
        rna = experiment(census).ms["RNA"]
        present = np.ones((len(datasets), len(self._genes)), dtype=bool)
        if "feature_dataset_presence_matrix" not in rna:
            return present
        with reading(self._location):
            frame = info_of_datasets(census)
            row_of = dict(zip(frame["dataset_id"], frame["soma_joinid"], strict=True))
            said = np.array([row for row, dataset in enumerate(datasets) if dataset in row_of], dtype=np.int64)
            present[said] = False
            place = np.full(frame["soma_joinid"].max() + 1, -1)
            place[[row_of[datasets[row]] for row in said]] = said
            for table in rna["feature_dataset_presence_matrix"].read().tables():
                there = table["soma_data"].to_numpy().astype(bool)
                rows, genes = (table[name].to_numpy()[there] for name in ("soma_dim_0", "soma_dim_1"))
                asked = (rows < len(place)) & (place[np.minimum(rows, len(place) - 1)] >= 0)
                present[place[rows[asked]], np.searchsorted(self._genes, genes[asked])] = True
        return present

    @property
    def licence(self) -> str | None:
        """What the census says of its datasets; if it only has CELLxGENE Discover's citations: CC BY 4.0, as that has all."""
        frame = info_of_datasets(open_census(self._location))
        for column in LICENCE_KEYS:
            if column in frame:
                return ", ".join(sorted(set(frame[column].dropna().astype(str)))) or None
        cited = "citation" in frame and frame["citation"].astype(str).str.contains("CZ CELLxGENE Discover").all()
        return "CC BY 4.0" if cited else None

    @cached_property
    def obs_names(self) -> np.ndarray:
        """The soma_joinids, str objects [cells]."""
        return self._obs.names(0, self.n_cells).to_numpy(zero_copy_only=False)

    @cached_property
    def obs(self) -> pd.DataFrame:
        """The annotation of the cells, read when first asked for."""
        columns = {column: self._obs.read(column, 0, self.n_cells).to_pandas() for column in self._obs.columns}
        return pd.DataFrame(columns).set_index(self.obs_names)

    def read(self, start: int, stop: int) -> Counts:
        """The counts of cells `start` … `stop`−1; UserError names the cell if a value is no count."""
        first_cell = start
        pieces = [Rows(np.zeros(0, np.int64), np.zeros(0, np.uint8), np.zeros(1, np.int64))]
        while start < stop:
            first = start - start % SLICE_CELLS
            end = min(stop, first + SLICE_CELLS)
            rows = self._slice(first)
            offsets = rows.offsets[start - first : end - first + 1]
            tokens = slice(offsets[0], offsets[-1])
            pieces.append(Rows(rows.columns[tokens], rows.values[tokens], offsets - offsets[0]))
            start = end
        rows = join_rows(pieces)
        accepted, problem = accept_counts(rows.values, rows.offsets, self._fractional)
        if accepted is None:
            cell = first_cell + int(np.searchsorted(rows.offsets, problem.position, side="right")) - 1
            dataset = self._obs.read("dataset_id", cell, cell + 1)[0]
            raise UserError(
                f"cell {self._selected.read(cell, cell + 1)[0]} of {self.name} holds {problem.reason} ({problem.value:g}) "
                f"where raw counts are expected: leave its dataset out with --filter \"dataset_id != '{dataset}'\""
                f"{TAKE_FRACTIONAL if problem.reason == FRACTIONAL else ''}."
            )
        return Counts(rows.columns, accepted.counts, rows.offsets, accepted.fractional, accepted.distance)

    def _slice(self, first: int) -> Rows:
        """The cells of the slice that starts at cell `first`; genes ascend in a cell."""
        if self._held is None or self._held[0] != first:
            self._held = None  # before the next one is read: one slice in memory
            joinids, coordinates = self._selected.coordinates(first, min(first + SLICE_CELLS, self.n_cells))
            with reading(self._location):
                table = self._counts.read((coordinates,)).tables().concat()
            cells = np.searchsorted(joinids, table["soma_dim_0"].to_numpy())
            genes = np.searchsorted(self._genes, table["soma_dim_1"].to_numpy())
            values = table["soma_data"].to_numpy()
            order = np.argsort(cells << 32 | genes)
            offsets = np.searchsorted(cells[order], np.arange(len(joinids) + 1))
            self._held = first, Rows(genes[order], values[order], offsets)
        return self._held[1]


class CensusObs(Obs):
    """obs of chosen cells of a census, with two columns more: collection_id (of census_info), and donor.

    A donor's id is unique in its dataset only, so `donor` is "dataset_id/donor_id"; unknown and pooled donors have
    their dataset's id alone.
    """

    def __init__(self, location: str, joinids: Path):
        self._location = location
        self._selected = _Selected(joinids)
        census = open_census(location)
        with reading(location):
            self._obs = experiment(census).obs
            self._schema = self._obs.schema
            frame = info_of_datasets(census)
        self._collections = dict(zip(frame["dataset_id"], frame["collection_id"], strict=True))
        self._held: dict[str, tuple[int, pa.Array]] = {}  # the range of each column that was read last

    def close(self) -> None:
        """Forget what was read."""
        self._held = {}

    @property
    def columns(self) -> list[str]:
        """Names of the columns, without soma_joinid, which is the cell's name."""
        own = [name for name in self._schema.names if name not in ("soma_joinid", "collection_id", "donor")]
        return [*own, "collection_id", *(["donor"] if "donor_id" in own else [])]

    def kind(self, column: str) -> str:
        """int64, float64 or string."""
        if column in ("collection_id", "donor"):
            return "string"
        return str(plain_column(pa.chunked_array([], self._schema.field(column).type)).type).replace("double", "float64")

    def names(self, start: int, stop: int) -> pa.Array:
        """The soma_joinids of cells `start` … `stop`−1, as strings."""
        return pa.array(self._selected.read(start, stop)).cast(pa.string())

    def read(self, column: str, start: int, stop: int) -> pa.Array:
        """The values of cells `start` … `stop`−1 as int64, float64 or string; null where there is none."""
        if column == "collection_id":
            datasets_ = self.read("dataset_id", start, stop).to_pylist()
            return pa.array([self._collections.get(dataset) for dataset in datasets_], pa.string())
        if column == "donor":
            pairs = zip(*(self.read(name, start, stop).to_pylist() for name in ("dataset_id", "donor_id")), strict=True)
            donors = [set_ if NO_DONOR.fullmatch(donor or "") else f"{set_}/{donor}" for set_, donor in pairs]
            return pa.array(donors, pa.string())
        pieces = []
        for first in range(start - start % OBS_CELLS, stop, OBS_CELLS):
            low, high = max(start, first), min(stop, first + OBS_CELLS)
            pieces.append(self._range(column, first).slice(low - first, high - low))
        return pa.concat_arrays(pieces)

    def _range(self, column: str, first: int) -> pa.Array:
        if self._held.get(column, (None,))[0] != first:
            last = min(first + OBS_CELLS, self._selected.n_cells)
            _, coordinates = self._selected.coordinates(first, last)
            with reading(self._location):
                query = self._obs.read((coordinates,), column_names=["soma_joinid", column], result_order="row-major")
                self._held[column] = first, plain_column(query.concat()[column])
        return self._held[column][1]
