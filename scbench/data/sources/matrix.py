"""Cells × genes matrices read by ranges of rows in bounded memory: CSR, CSC and dense, in an h5ad file or in memory."""

from collections.abc import Iterator
from functools import cached_property
from typing import NamedTuple, Protocol

import h5py
import numpy as np
import zarr
from scipy import sparse

DENSE_BLOCK = 1 << 23  # values of a dense matrix held at once
CSC_STREAM = 1 << 20  # entries of a CSC file looked at at once
CSC_BUFFER_BYTES = 1 << 28  # a range of rows of a CSC file, held as CSR


class Rows(NamedTuple):
    """Some rows of a matrix as the source holds them; entries that are stored may be zero."""

    columns: np.ndarray  # int64 [nnz]
    values: np.ndarray  # [nnz], the source's dtype
    offsets: np.ndarray  # int64 [rows+1], starts at 0


class Matrix(Protocol):
    """Rows by number."""

    shape: tuple[int, int]

    @property
    def cheap_rows(self) -> int:
        """The first rows up to this one can be read anywhere without much ado (all of them, but for CSC files)."""

    def read(self, start: int, stop: int) -> Rows:
        """Rows `start` … `stop`−1."""


class CSRMatrix:
    """Compressed rows: a group of an h5ad file, or the arrays of a SciPy matrix."""

    def __init__(self, shape: tuple[int, int], indptr: np.ndarray, indices, data):
        self.shape = shape
        self.cheap_rows = shape[0]
        self._indptr, self._indices, self._data = indptr, indices, data

    def read(self, start: int, stop: int) -> Rows:
        """Rows `start` … `stop`−1."""
        offsets = self._indptr[start : stop + 1].astype(np.int64)
        low, high = int(offsets[0]), int(offsets[-1])
        return Rows(np.asarray(self._indices[low:high], dtype=np.int64), np.asarray(self._data[low:high]), offsets - low)


class CSCMatrix:
    """Compressed columns in an h5ad file, read by streaming the whole file once for each range of rows.

    A range holds as many rows as fit CSC_BUFFER_BYTES and is kept until a row outside it is asked for, so reading all
    rows in order costs one pass over the indices and one pass over the file a range. (`prepare` streams a file once, and
    reads rows of what row_order.py writes.)
    """

    def __init__(self, shape: tuple[int, int], indptr: np.ndarray, indices: h5py.Dataset, data: h5py.Dataset):
        self.shape = shape
        self._indptr, self._indices, self._data = indptr.astype(np.int64), indices, data
        self._start = self._stop = 0
        self._buffer: CSRMatrix | None = None

    @property
    def nnz(self) -> int:
        """Stored entries."""
        return int(self._indptr[-1])

    @property
    def dtype(self) -> np.dtype:
        """Of the values."""
        return self._data.dtype

    def stream(self) -> Iterator[tuple[np.ndarray, np.ndarray, np.ndarray]]:
        """Rows, columns and values of CSC_STREAM entries at a time, in the order of the file."""
        for low in range(0, self.nnz, CSC_STREAM):
            rows = self._indices[low : low + CSC_STREAM]
            yield rows, self._columns(low, low + len(rows)), self._data[low : low + CSC_STREAM]

    def _columns(self, low: int, high: int) -> np.ndarray:
        """The columns of entries `low` … `high`−1, int32."""
        first, last = np.searchsorted(self._indptr, (low, high - 1), side="right")
        lengths = np.diff(np.clip(self._indptr[first - 1 : last + 1], low, high))
        return np.repeat(np.arange(first - 1, last, dtype=np.int32), lengths)

    @cached_property
    def _row_offsets(self) -> np.ndarray:
        lengths = np.zeros(self.shape[0], dtype=np.int64)
        for low in range(0, int(self._indptr[-1]), CSC_STREAM):
            lengths += np.bincount(self._indices[low : low + CSC_STREAM], minlength=self.shape[0])
        return np.concatenate([[0], np.cumsum(lengths)])

    def _range_end(self, start: int) -> int:
        entries = CSC_BUFFER_BYTES // (4 + self._data.dtype.itemsize)
        stop = int(np.searchsorted(self._row_offsets, self._row_offsets[start] + entries, side="right")) - 1
        return min(max(stop, start + 1), self.shape[0])

    @property
    def cheap_rows(self) -> int:
        """The rows of the first range."""
        return self._range_end(0)

    def _load(self, start: int) -> None:
        """Fill the buffer with the range of rows that begins at `start`."""
        self._buffer = None  # the old buffer goes before the new one comes
        stop = self._range_end(start)
        offsets = self._row_offsets[start : stop + 1] - self._row_offsets[start]
        columns = np.empty(int(offsets[-1]), dtype=np.int32)
        values = np.empty(int(offsets[-1]), dtype=self._data.dtype)
        fill = offsets[:-1].copy()  # where the next entry of each row goes
        for low in range(0, int(self._indptr[-1]), CSC_STREAM):
            rows = self._indices[low : low + CSC_STREAM]
            size = len(rows)
            inside = np.flatnonzero((rows >= start) & (rows < stop))
            if len(inside) == 0:
                continue
            rows = rows[inside].astype(np.int64) - start
            order = np.argsort(rows, kind="stable")
            rows, inside = rows[order], inside[order]
            lengths = np.bincount(rows, minlength=stop - start)
            rank = np.arange(len(rows)) - np.repeat(np.cumsum(lengths) - lengths, lengths)
            target = fill[rows] + rank
            columns[target] = self._columns(low, low + size)[inside]
            values[target] = self._data[low : low + CSC_STREAM][inside]
            fill += lengths
        self._start, self._stop = start, stop
        self._buffer = CSRMatrix((stop - start, self.shape[1]), offsets, columns, values)

    def read(self, start: int, stop: int) -> Rows:
        """Rows `start` … `stop`−1."""
        parts = []
        while start < stop or not parts:
            if self._buffer is None or not self._start <= start < self._stop:
                self._load(min(start, self.shape[0] - 1))
            end = min(stop, self._stop)
            parts.append(self._buffer.read(start - self._start, end - self._start))
            start = end
        return join_rows(parts)


class DenseMatrix:
    """An array in memory or a dataset of an h5ad file."""

    def __init__(self, array: np.ndarray | h5py.Dataset):
        self.shape = array.shape
        self.cheap_rows = array.shape[0]
        self._array = array
        self._block = max(1, DENSE_BLOCK // max(1, self.shape[1]))
        chunks = getattr(array, "chunks", None)
        if chunks and chunks[0] <= self._block:
            self._block -= self._block % chunks[0]  # so that a compressed chunk is seldom read twice

    def read(self, start: int, stop: int) -> Rows:
        """Rows `start` … `stop`−1."""
        parts = []
        while start < stop or not parts:
            end = min(stop, start - start % self._block + self._block)
            block = np.asarray(self._array[start:end])
            rows, columns = np.nonzero(block)  # NaN is not zero
            offsets = np.searchsorted(rows, np.arange(end - start + 1))
            parts.append(Rows(columns.astype(np.int64), block[rows, columns], offsets.astype(np.int64)))
            start = end
        return join_rows(parts)


class ViewMatrix:
    """Some rows and columns of another matrix, in any order: a view of an AnnData.

    Parameters
    ----------
    parent
        The matrix that is viewed.
    rows, columns
        int64, the parent's rows and columns; `columns` None means all.
    """

    def __init__(self, parent: Matrix, rows: np.ndarray, columns: np.ndarray | None):
        self.shape = (len(rows), parent.shape[1] if columns is None else len(columns))
        self.cheap_rows = len(rows)
        self._parent, self._rows, self._columns = parent, rows, columns

    def read(self, start: int, stop: int) -> Rows:
        """Rows `start` … `stop`−1."""
        rows, order = np.unique(self._rows[start:stop], return_inverse=True)
        runs = np.split(rows, np.flatnonzero(np.diff(rows) != 1) + 1) if len(rows) else []
        read = join_rows([self._parent.read(int(run[0]), int(run[-1]) + 1) for run in runs] or [self._parent.read(0, 0)])
        shape = (len(rows), self._parent.shape[1])
        gathered = sparse.csr_matrix((read.values, read.columns, read.offsets), shape)[order]
        if self._columns is not None:
            gathered = gathered[:, self._columns]
        return Rows(gathered.indices.astype(np.int64), gathered.data, gathered.indptr.astype(np.int64))


def join_rows(parts: list[Rows]) -> Rows:
    """Consecutive ranges of rows as one."""
    if len(parts) == 1:
        return parts[0]
    starts = np.cumsum([0, *(part.offsets[-1] for part in parts)])
    offsets = [part.offsets[1:] + start for part, start in zip(parts, starts, strict=False)]
    return Rows(
        np.concatenate([part.columns for part in parts]),
        np.concatenate([part.values for part in parts]),
        np.concatenate([np.zeros(1, dtype=np.int64), *offsets]),
    )


def _sparse_group(group: h5py.Group) -> CSRMatrix | CSCMatrix:
    kind = group.attrs.get("encoding-type", group.attrs.get("h5sparse_format", b""))
    kind = kind.decode() if isinstance(kind, bytes) else str(kind)
    shape = group.attrs["shape"] if "shape" in group.attrs else group.attrs["h5sparse_shape"]
    shape = (int(shape[0]), int(shape[1]))
    indptr = group["indptr"][:]
    compressed = shape[1] if kind.startswith("csc") else shape[0]
    if not kind.startswith(("csr", "csc")) or len(indptr) != compressed + 1 or (np.diff(indptr) < 0).any():
        raise ValueError("not a CSR or CSC matrix")
    if not group["indices"].shape == group["data"].shape == (indptr[-1],):
        raise ValueError("indices and data do not fit indptr")
    layout = CSCMatrix if kind.startswith("csc") else CSRMatrix
    return layout(shape, indptr, group["indices"], group["data"])


def open_matrix(matrix: object) -> Matrix:
    """The reader of a group or array of an HDF5 file or zarr store, of a matrix of a backed AnnData, SciPy or NumPy.

    Raises ValueError, KeyError or TypeError if it is no matrix.
    """
    if isinstance(matrix, h5py.Group | zarr.Group):
        return _sparse_group(matrix)
    if isinstance(getattr(matrix, "group", None), h5py.Group):  # AnnData's wrapper of a sparse matrix on disk
        return _sparse_group(matrix.group)
    if sparse.issparse(matrix):
        matrix = matrix.tocsr()
        return CSRMatrix(matrix.shape, matrix.indptr, matrix.indices, matrix.data)
    if not isinstance(matrix, h5py.Dataset | zarr.Array):
        matrix = np.asarray(matrix)
    if len(matrix.shape) != 2:
        raise ValueError("not a matrix")
    return DenseMatrix(matrix)
