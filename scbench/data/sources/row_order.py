"""Counts stored by columns brought into the order of rows: one pass over the file, and files that can be read by rows.

Entries are scattered, as they come, over files that hold a range of rows each; each of those is then sorted in memory.
The directory holds `columns` (int32) and `values`, both raw, `offsets.npy` (where each row starts) and `about.json`.
"""

import json
from pathlib import Path

import numpy as np

from scbench.data.sources.matrix import CSCMatrix, Rows

RANGE_BYTES = 1 << 26  # of the entries of a range of rows, on average; sorting them takes about four times that


class RowFiles:
    """Rows `first_row` … of a matrix, as `write_rows` wrote them into `directory`."""

    def __init__(self, directory: Path):
        about = json.loads((directory / "about.json").read_text(encoding="utf-8"))
        self.shape: tuple[int, int] = tuple(about["shape"])
        self.cheap_rows = self.shape[0]
        self.recovering: bool = about["recovering"]
        self._first = about["first_row"]
        self._dtype = np.dtype(about["dtype"])
        self._offsets = np.load(directory / "offsets.npy", allow_pickle=False)
        self._columns, self._values = directory / "columns", directory / "values"

    def read(self, start: int, stop: int) -> Rows:
        """Rows `start` … `stop`−1."""
        offsets = self._offsets[start - self._first : stop - self._first + 1]
        low, count = int(offsets[0]), int(offsets[-1] - offsets[0])
        columns = np.fromfile(self._columns, "<i4", count, offset=4 * low)
        values = np.fromfile(self._values, self._dtype, count, offset=self._dtype.itemsize * low)
        return Rows(columns.astype(np.int64), values, offsets - low)


def write_rows(matrix: CSCMatrix, start: int, stop: int, directory: Path, *, recovering: bool) -> None:
    """Write rows `start` … `stop`−1 into `directory`, in memory for about RANGE_BYTES × 4, whatever the matrix.

    Inside a row, entries come in the order of the file. `recovering`: whether the values are counts yet to be recovered.
    Raises ValueError if an entry is of no row of the matrix.
    """
    dtype = matrix.dtype
    entry = np.dtype([("row", "<i4"), ("column", "<i4"), ("value", dtype)])
    expected = max(1, matrix.nnz * (stop - start) // matrix.shape[0])
    per_range = max(1, (stop - start) * RANGE_BYTES // (expected * entry.itemsize))
    ranges = [directory / f"range-{i}" for i in range(-(-(stop - start) // per_range))]
    for rows, columns, values in matrix.stream():
        if rows.min() < 0 or rows.max() >= matrix.shape[0]:
            raise ValueError("an entry is of a row that does not exist")
        inside = np.flatnonzero((rows >= start) & (rows < stop))
        entries = np.empty(len(inside), dtype=entry)
        entries["row"], entries["column"], entries["value"] = rows[inside] - start, columns[inside], values[inside]
        number = (entries["row"] // per_range).astype(np.uint16)  # the stable sort of short integers is a radix sort
        entries = entries[np.argsort(number, kind="stable")]
        ends = np.cumsum(np.bincount(number, minlength=len(ranges)))
        for file, first, last in zip(ranges, [0, *ends[:-1]], ends, strict=True):
            if last > first:
                with open(file, "ab") as out:
                    out.write(entries[first:last])
    lengths = []
    with open(directory / "columns", "wb") as columns, open(directory / "values", "wb") as values:
        for i, file in enumerate(ranges):
            first = i * per_range
            rows = min(per_range, stop - start - first)
            entries = np.fromfile(file, entry) if file.exists() else np.zeros(0, entry)
            keys = (entries["row"].astype(np.int64) - first << 32) | np.arange(len(entries))
            keys.sort()  # by row, then as they came
            entries = entries[keys & 0xFFFFFFFF]
            columns.write(entries["column"].tobytes())
            values.write(entries["value"].tobytes())
            lengths.append(np.bincount(entries["row"] - first, minlength=rows))
            file.unlink(missing_ok=True)
    np.save(directory / "offsets.npy", np.concatenate([[0], np.cumsum(np.concatenate(lengths))]))
    about = {"shape": matrix.shape, "first_row": start, "dtype": dtype.str, "recovering": recovering}
    (directory / "about.json").write_text(json.dumps(about) + "\n", encoding="utf-8")
