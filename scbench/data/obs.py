"""Columns of an input's obs by ranges of rows: prepare never holds the obs of all cells."""

from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import h5py
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from scbench.data.sources.stored import Array, Group, Reading, close, open_root
from scbench.errors import UserError

READ_ROWS = 1 << 16  # rows of one column in memory while groups are listed
CELL_LISTS = ("genes", "expressions")  # columns of the reference's parquet files that are the cell itself, not obs


class ObsColumn(NamedTuple):
    """A column as the store keeps it."""

    name: str
    kind: str  # int64 or float64 if it is a number in every input (float64 if it is one in any), else string


class Obs:
    """obs of the h5ad file or zarr store `path`, kept open until `close`."""

    def __init__(self, path: Path):
        self._file = open_root(path)
        self._reading = Reading(path.name, "an AnnData")
        self._obs = self._file["obs"]

    def close(self) -> None:
        """Close the file."""
        close(self._file)

    @property
    def columns(self) -> list[str]:
        """Names of the columns, without the index."""
        return [str(name) for name in self._obs.attrs["column-order"]]

    def kind(self, column: str) -> str:
        """int64, float64 or string."""
        return str(self.read(column, 0, 0).type).replace("double", "float64")

    def names(self, start: int, stop: int) -> pa.Array:
        """The names of cells `start` … `stop`−1."""
        with self._reading:
            return _array(self._obs[self._obs.attrs["_index"]], start, stop).cast(pa.string())

    def read(self, column: str, start: int, stop: int) -> pa.Array:
        """The values of cells `start` … `stop`−1 as int64, float64 or string; null where there is none."""
        with self._reading:
            return _array(self._obs[column], start, stop)


class ParquetObs(Obs):
    """The same of the parquet file `path`: every column but the cell's lists. A cell without a name is called by its row."""

    def __init__(self, path: Path):
        self._file = pq.ParquetFile(path)
        self._reading = Reading(path.name, "a parquet file")
        groups = self._file.metadata
        self.starts = np.cumsum([0, *(groups.row_group(i).num_rows for i in range(groups.num_row_groups))])  # [row groups+1]
        self._index = _index_column(self._file.schema_arrow)
        self._held: dict[str, tuple[int, pa.Array]] = {}  # the row group of each column that was read last

    @property
    def columns(self) -> list[str]:
        """Names of the columns, without the index."""
        return [name for name in self._file.schema_arrow.names if name not in (*CELL_LISTS, self._index)]

    def names(self, start: int, stop: int) -> pa.Array:
        """The names of cells `start` … `stop`−1."""
        if self._index is None:
            return pa.array(map(str, range(start, stop)), pa.string())
        return self.read(self._index, start, stop).cast(pa.string())

    def read(self, column: str, start: int, stop: int) -> pa.Array:
        """The values of cells `start` … `stop`−1 as int64, float64 or string; null where there is none."""
        pieces = [plain_column(pa.chunked_array([], self._file.schema_arrow.field(column).type))]
        first = int(np.searchsorted(self.starts, start, side="right")) - 1
        for group in range(first, int(np.searchsorted(self.starts, stop))):
            first_row, end = (int(row) for row in self.starts[group : group + 2])
            low = max(start, first_row)
            pieces.append(self._group(column, group).slice(low - first_row, min(stop, end) - low))
        return pa.concat_arrays(pieces)

    def _group(self, column: str, group: int) -> pa.Array:
        if self._held.get(column, (None,))[0] != group:
            with self._reading:
                values = self._file.read_row_group(group, columns=[column])[column]
            self._held[column] = group, plain_column(values)
        return self._held[column][1]


def _index_column(schema: pa.Schema) -> str | None:
    """The column that pandas wrote its index to; None if the index was row numbers or there was none."""
    index = (schema.pandas_metadata or {}).get("index_columns", ["__index_level_0__"])
    return index[0] if len(index) == 1 and index[0] in schema.names else None


def plain_column(values: pa.ChunkedArray) -> pa.Array:
    """A column of a parquet file or of a census as int64, float64 or string: categories by name, NaN as null."""
    if pa.types.is_dictionary(values.type):
        values = values.cast(values.type.value_type)
    array = values.combine_chunks()
    if pa.types.is_floating(array.type):
        array = pa.array(array.to_numpy(zero_copy_only=False), from_pandas=True)
    return _plain(array)


def _array(element: Group | Array, start: int, stop: int) -> pa.Array:
    """Rows of one column: an array, a categorical (of today or of anndata 0.7), or an array with a mask."""
    if isinstance(element, Array):
        if "categories" in element.attrs:
            return _categorical(element[start:stop], element.file[element.attrs["categories"]])
        if isinstance(element, h5py.Dataset) and h5py.check_string_dtype(element.dtype):
            return pa.array(element.asstr()[start:stop], pa.string())
        values = element[start:stop]
        if values.dtype.kind in "OTU":  # the texts of a zarr store
            return pa.array(values.astype(object), pa.string())
        return _plain(pa.array(values, from_pandas=True))
    if "categories" in element:
        return _categorical(element["codes"][start:stop], element["categories"])
    values = _array(element["values"], start, stop)
    mask = element["mask"][start:stop]
    return values.take(pa.array(np.arange(len(mask)), mask=mask))


def _categorical(codes: np.ndarray, categories: Group | Array) -> pa.Array:
    length = (categories if isinstance(categories, Array) else categories["values"]).shape[0]
    return _array(categories, 0, length).take(pa.array(codes.astype(np.int64), mask=codes < 0))


def _plain(values: pa.Array) -> pa.Array:
    if pa.types.is_integer(values.type):
        return values.cast(pa.int64())
    if pa.types.is_floating(values.type):
        return values.cast(pa.float64())
    if pa.types.is_string(values.type):
        return values
    if pa.types.is_large_string(values.type):
        return values.cast(pa.string())
    return pa.array([None if value is None else str(value) for value in values.to_pylist()], pa.string())


def obs_columns(sources: Sequence[tuple[str, Obs, int]], names: Sequence[str], option: str) -> tuple[ObsColumn, ...]:
    """How the store keeps the columns `names`.

    `sources`: name, obs and number of cells of each input.

    Raises
    ------
    UserError
        Naming `option`, if an input lacks a column, or if it holds numbers in one input and text in another.
    """
    columns = []
    for name in names:
        kinds: dict[str, list[tuple[str, Obs, int]]] = {}
        for source in sources:
            if name not in source[1].columns:
                there = ", ".join(source[1].columns) or "none"
                raise UserError(f"{option} {name}: obs of {source[0]} has no such column; it has {there}.")
            kinds.setdefault(source[1].kind(name), []).append(source)
        if "string" in kinds and len(kinds) > 1:  # a column of which an input has no value is no text and no number there
            kinds = {kind: filled for kind, all_ in kinds.items()
                     if (filled := [source for source in all_ if _has_values(*source[1:], name)])}
        if "string" in kinds and len(kinds) > 1:
            number = next(filled[0][0] for kind, filled in kinds.items() if kind != "string")
            raise UserError(
                f"{option} {name}: this column of obs holds numbers in {number} and text in {kinds['string'][0][0]}: give it "
                "one type in all inputs, or leave it out."
            )
        columns.append(ObsColumn(name, next((kind for kind in ("string", "float64", "int64") if kind in kinds), "string")))
    return tuple(columns)


def _is_missing(value: object) -> bool:
    return value is None or (isinstance(value, str) and value.strip() in ("", "nan"))


def _has_values(obs: Obs, n_cells: int, column: str) -> bool:
    return not all(
        _is_missing(value)
        for start in range(0, n_cells, READ_ROWS)
        for value in obs.read(column, start, min(start + READ_ROWS, n_cells)).unique().to_pylist()
    )


def obs_table(obs: Obs, start: int, stop: int, columns: Sequence[ObsColumn]) -> pa.Table:
    """original_id and `columns` of cells `start` … `stop`−1."""
    arrays = {"original_id": obs.names(start, stop)}
    for column in columns:
        values = obs.read(column.name, start, stop)
        if pa.types.is_string(values.type) and column.kind != "string":  # an input without a value (obs_columns)
            values = pa.nulls(len(values))
        arrays[column.name] = values.cast(column.kind)
    return pa.table(arrays)


def list_groups(sources: Sequence[tuple[str, Obs, int]], columns: Sequence[ObsColumn]) -> Counter[tuple[str, ...]]:
    """The cells of each value of the --split-by columns in all inputs; UserError if there is one only, or a cell has none.

    A missing value is an error because its cells could belong to any group, also to one of another split.

    Parameters
    ----------
    sources
        Name, obs and number of cells of each input.
    """
    groups: Counter[tuple[str, ...]] = Counter()
    names = [column.name for column in columns]
    for name, obs, n_cells in sources:
        for start in range(0, n_cells, READ_ROWS):
            table = obs_table(obs, start, min(start + READ_ROWS, n_cells), columns)
            for column in columns:
                values = table[column.name].cast(pa.string()).to_pylist()
                missing = next((i for i, value in enumerate(values) if _is_missing(value)), None)
                if missing is not None:
                    raise UserError(
                        f"--split-by {column.name}: cell {table['original_id'][missing].as_py()!r} of {name} has no value "
                        "there: fill such values in, remove the cells, or choose another column."
                    )
            rows = table.group_by(names).aggregate([([], "count_all")])
            values = zip(*(rows[column].cast(pa.string()).to_pylist() for column in names), strict=True)
            groups.update(dict(zip(values, rows["count_all"].to_pylist(), strict=True)))
    if len(groups) < 2:
        raise UserError(f"--split-by {' '.join(names)}: all cells have the same value there, so there is nothing to split by.")
    return groups
