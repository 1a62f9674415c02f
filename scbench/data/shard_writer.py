"""Writing one shard as its cells stream by: memory stays at a few chunks, whatever the shard's size."""

import errno
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import tensorstore as ts

from scbench.data.shard_format import BLOCK_CELLS, CELLS_FILE, ShardInfo, block_checksums, new_array_spec


class ShardWriter:
    """Writes the arrays of one shard into `directory`.

    Parameters
    ----------
    directory
        Where to write.
    info
        Cells, tokens and dtypes that will come, exactly (`ShardInfo.plan`).
    """

    def __init__(self, directory: Path, info: ShardInfo):
        directory.mkdir(parents=True, exist_ok=True)
        self._directory = directory
        self._info = info
        self._writers = {name: _ArrayWriter(directory / name, *array) for name, array in info.arrays.items()}
        self._writers["offsets"].append(np.zeros(1, dtype=np.int64))
        self._tokens = 0
        # cells of a block that is not complete yet
        self._genes = np.zeros(0, dtype=info.genes)
        self._counts = np.zeros(0, dtype=info.counts)
        self._lengths = np.zeros(0, dtype=np.int64)

    def append(self, genes: np.ndarray, counts: np.ndarray, lengths: np.ndarray) -> None:
        """Add cells: integers `genes` and `counts` [nnz], cell by cell, and the tokens of each cell, `lengths` [cells]."""
        self._genes = np.concatenate([self._genes, genes.astype(self._info.genes, copy=False)])
        self._counts = np.concatenate([self._counts, counts.astype(self._info.counts, copy=False)])
        self._lengths = np.concatenate([self._lengths, lengths.astype(np.int64, copy=False)])
        self._write(len(self._lengths) // BLOCK_CELLS * BLOCK_CELLS)

    def finish(self, cells: pa.Table) -> None:
        """Write what is left and `cells`, the table of the shard's cells in order."""
        self._write(len(self._lengths))
        for writer in self._writers.values():
            writer.finish()
        # one row group and fixed settings: the bytes depend on the cells and on pyarrow's version only
        pq.write_table(
            cells.replace_schema_metadata(None), self._directory / CELLS_FILE,
            compression="zstd", compression_level=3, row_group_size=max(1, len(cells)), store_schema=False,
        )

    def _write(self, cells: int) -> None:
        if cells == 0:
            return
        offsets = np.concatenate([[0], np.cumsum(self._lengths[:cells])]).astype(np.int64)
        tokens = int(offsets[-1])
        self._writers["genes"].append(self._genes[:tokens])
        self._writers["counts"].append(self._counts[:tokens])
        self._writers["offsets"].append(offsets[1:] + self._tokens)
        self._writers["block_crc"].append(block_checksums(self._genes[:tokens], self._counts[:tokens], offsets))
        self._tokens += tokens
        self._genes, self._counts, self._lengths = self._genes[tokens:], self._counts[tokens:], self._lengths[cells:]


class _ArrayWriter:
    """Writes a zarr3 array from front to back, whole chunks at a time: a part of a chunk would be read and written again."""

    def __init__(self, path: Path, dtype: str, length: int):
        spec = new_array_spec(path, dtype, length)
        self._chunk = spec["metadata"]["chunk_grid"]["configuration"]["chunk_shape"][0]
        spec["context"] = {"file_io_sync": False}  # a part is synced as a whole
        self._array = _resolved(ts.open(spec, create=True))
        self._pending: list[np.ndarray] = []
        self._pending_length = 0
        self._written = 0

    def append(self, values: np.ndarray) -> None:
        self._pending.append(values)
        self._pending_length += len(values)
        if self._pending_length >= self._chunk:
            self._flush(self._pending_length // self._chunk * self._chunk)

    def finish(self) -> None:
        self._flush(self._pending_length)
        if self._written != self._array.shape[0]:
            raise ValueError(f"{self._written} values written to an array of {self._array.shape[0]}")

    def _flush(self, length: int) -> None:
        if length == 0:
            return
        values = np.concatenate(self._pending)
        _resolved(self._array[self._written : self._written + length].write(values[:length]))
        self._pending = [values[length:].copy()]  # a view would keep all of `values` alive
        self._pending_length -= length
        self._written += length


def _resolved(future: ts.Future):
    """The future's result. A full disk, which TensorStore reports as a ValueError, is an OSError as everywhere else."""
    try:
        return future.result()
    except ValueError as error:
        if "No space left" in str(error):
            raise OSError(errno.ENOSPC, str(error)) from error
        raise
