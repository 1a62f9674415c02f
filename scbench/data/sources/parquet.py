"""Parquet files as the reference implementation writes them: a row a cell, with the lists `genes` and `expressions`."""

import contextlib
from collections.abc import Iterator
from functools import cached_property
from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from scbench.config import Fractional
from scbench.data.cells import Counts
from scbench.data.counts import EXACT_COUNT, undo_log1p
from scbench.data.fractional import accept_counts
from scbench.data.gene_identity import GeneIdentity, own_tokens, vocabulary_identity
from scbench.data.obs import CELL_LISTS, ParquetObs
from scbench.data.vocabulary import Vocabulary
from scbench.errors import UserError

BATCH_ROWS = 256  # rows decoded at once, also of a row group that holds the whole file
BUFFER_BYTES = 1 << 20  # read ahead in each column; without, pyarrow reads a column of a row group whole


class ParquetSource:
    """The cells of one parquet file: `genes` are token ids of a vocabulary, `expressions` log1p of the raw counts.

    Rows come as a stream. A read that goes on after the last one decodes what lies between; one that goes back, or skips a
    row group, starts at the row group that holds its first row.

    Parameters
    ----------
    path
        The parquet file. The lists may be of any integer or floating type; other columns are obs.
    vocabulary
        The vocabulary that the token ids are of.
    fractional
        What becomes of counts that are not whole (`accept_counts`).

    Raises
    ------
    UserError
        If the file cannot be read, is empty, or its first cells do not fit the vocabulary or hold no log1p of counts.
    """

    kind = "parquet"
    licence = None  # such a file names none
    exact_up_to = EXACT_COUNT  # larger counts are a guess
    layer = CELL_LISTS[1]
    recovered = None  # log1p of the counts themselves is undone without an assumption

    def __init__(self, path: Path | str, vocabulary: Vocabulary, fractional: Fractional = "refuse"):
        self.name = Path(path).name
        self._fractional: Fractional = fractional
        self._vocabulary = vocabulary
        self._is_gene = own_tokens(vocabulary) >= 0
        self._file = _open_file(Path(path))
        self._obs = ParquetObs(Path(path))
        try:
            self.n_cells: int = self._file.metadata.num_rows
            if self.n_cells == 0:
                raise UserError(f"{self.name} has no cells.")
            self._batches: Iterator[pa.RecordBatch] = iter(())
            self._low = self._high = 0  # the rows of self._batch
            self.read(0, min(BATCH_ROWS, self.n_cells))
        except BaseException:
            self.close()
            raise

    def __enter__(self) -> "ParquetSource":
        return self

    def __exit__(self, *_) -> None:
        self.close()

    def close(self) -> None:
        """Close the file."""
        self._file.close()
        self._obs.close()

    @property
    def identity(self) -> GeneIdentity:
        """What the vocabulary says about its genes: a column of this source is an id of the vocabulary."""
        return vocabulary_identity(self._vocabulary)

    @cached_property
    def obs_names(self) -> np.ndarray:
        """The ids of the cells, str objects [cells]: the index that pandas wrote, or row numbers."""
        with self._reading():
            return self._obs.names(0, self.n_cells).to_numpy(zero_copy_only=False)

    @cached_property
    def obs(self) -> pd.DataFrame:
        """The annotation of the cells, read when first asked for."""
        with self._reading():
            columns = {column: self._obs.read(column, 0, self.n_cells).to_pandas() for column in self._obs.columns}
        return pd.DataFrame(columns, index=range(self.n_cells)).set_index(self.obs_names)

    def read(self, start: int, stop: int) -> Counts:
        """The counts of cells `start` … `stop`−1; UserError names the cell if a value or a gene is none."""
        with self._reading():
            pieces = self._pieces(start, stop)
            (lengths, ids), (value_lengths, values) = (_lists(pieces, column) for column in CELL_LISTS)
        uneven = np.flatnonzero(lengths != value_lengths)
        if len(uneven):
            row = int(uneven[0])
            raise UserError(
                f"cell {self._cell(start + row)!r} of {self.name} has {lengths[row]} genes but {value_lengths[row]} "
                "expressions: write the file again with lists of one length."
            )
        offsets = np.concatenate([[0], np.cumsum(lengths)])

        def cell(position: int) -> str:
            return self._cell(start + int(np.searchsorted(offsets, position, side="right")) - 1)

        columns = np.where((ids >= 0) & (ids < len(self._is_gene)), ids, 0).astype(np.int64)  # NaN is not in the range
        wrong = (columns != ids) | ~self._is_gene[columns]
        if wrong.any():
            position = int(np.argmax(wrong))
            id_ = float(ids[position])
            raise UserError(
                f"cell {cell(position)!r} of {self.name} has the gene id {id_:.9g}, {self._why_no_gene(id_)}: "
                "give the vocabulary that the file was written with as --vocabulary."
            )
        counts, problem = undo_log1p(values, fractional=self._fractional != "refuse")
        accepted = None
        if problem is None:
            accepted, problem = accept_counts(counts, offsets, self._fractional)
        if accepted is None:
            raise UserError(
                f"the expressions of {self.name} are not log1p of raw counts, but hold {problem.reason} ({problem.value:g} "
                f"in cell {cell(problem.position)!r}): write the file again from raw counts, or use these as h5ad."
            )
        return Counts(columns, accepted.counts, offsets, accepted.fractional, accepted.distance)

    def _pieces(self, start: int, stop: int) -> list[pa.RecordBatch]:
        """Rows `start` … `stop`−1, in one piece or more."""
        pieces = []
        while start < stop or not pieces:
            self._go_to(min(start, self.n_cells - 1))
            end = min(stop, self._high)
            pieces.append(self._batch.slice(start - self._low, end - start))
            start = end
        return pieces

    def _go_to(self, row: int) -> None:
        """Read on, or anew from the row group of `row`, until the batch that holds `row`."""
        group = int(np.searchsorted(self._obs.starts, row, side="right")) - 1
        if row < self._low or self._obs.starts[group] > self._high or self._high == 0:
            groups = range(group, self._file.num_row_groups)
            self._batches = self._file.iter_batches(BATCH_ROWS, row_groups=groups, columns=list(CELL_LISTS), use_threads=False)
            self._low = self._high = int(self._obs.starts[group])
        while row >= self._high:
            self._batch = next(self._batches)
            self._low, self._high = self._high, self._high + len(self._batch)

    def _cell(self, row: int) -> str:
        with self._reading():
            return self._obs.names(row, row + 1)[0].as_py()

    def _why_no_gene(self, id_: float) -> str:
        if id_ != np.rint(id_):
            return "which is no whole number"
        if not 0 <= id_ < self._vocabulary.size:
            return f"but the ids of the vocabulary are 0 … {self._vocabulary.size - 1}"
        name = self._vocabulary.names[int(id_)]
        return f"which is {name} in the vocabulary" if name else "which the vocabulary gives to no gene"

    @contextlib.contextmanager
    def _reading(self) -> Iterator[None]:
        """Turn what Arrow raises on a damaged file into one sentence."""
        try:
            yield
        except (pa.ArrowException, OSError) as error:
            raise UserError(f"{self.name} is damaged: {str(error).splitlines()[0]}.") from error


def _lists(pieces: list[pa.RecordBatch], column: str) -> tuple[np.ndarray, np.ndarray]:
    """Lengths of the lists, int64 [cells], and their values side by side; a missing list is empty, a missing value NaN."""
    arrays = [piece.column(column) for piece in pieces]
    lengths = [pc.list_value_length(array).fill_null(0).to_numpy(zero_copy_only=False) for array in arrays]
    values = [array.flatten().to_numpy(zero_copy_only=False) for array in arrays]
    return np.concatenate(lengths).astype(np.int64), np.concatenate(values)


def _open_file(path: Path) -> pq.ParquetFile:
    if not path.exists():
        raise UserError(f"there is no file {path}.")
    try:
        file = pq.ParquetFile(path, buffer_size=BUFFER_BYTES, pre_buffer=False)
    except (pa.ArrowException, OSError) as error:
        raise UserError(f"{path} cannot be read as a parquet file: {str(error).splitlines()[0]}.") from None
    schema = file.schema_arrow
    for column in CELL_LISTS:
        if column not in schema.names:
            there = ", ".join(schema.names) or "none"
            raise UserError(f"{path} has no column {column!r} (it has {there}): give parquet files with the lists genes and "
                            "expressions, or h5ad files.")
        kind = schema.field(column).type
        if not _holds_number_lists(kind):
            raise UserError(f"the column {column!r} of {path} holds {kind} values: it must hold a list of numbers a cell.")
    return file


def _holds_number_lists(kind: pa.DataType) -> bool:
    is_list = pa.types.is_list(kind) or pa.types.is_large_list(kind) or pa.types.is_fixed_size_list(kind)
    return is_list and (pa.types.is_integer(kind.value_type) or pa.types.is_floating(kind.value_type))
