"""Embeddings in files: beside everything else in a copy of an h5ad file, or alone as .npz or .parquet."""

import json
import shutil
from pathlib import Path

import anndata
import h5py
import numpy as np
import pyarrow
import pyarrow.parquet

from scbench.errors import UserError
from scbench.files import published_file

KEY = "X_scbench"  # in obsm; the provenance is in uns["scbench"]
_PROVENANCE = "scbench"


def check_suffix(path: Path, only_embedding: bool) -> None:
    """UserError unless `path` has a suffix that can be written."""
    if only_embedding and path.suffix not in (".npz", ".parquet"):
        raise UserError(f"--only-embedding writes .npz or .parquet, not {path.name!r}: rename the output.")
    if not only_embedding and path.suffix != ".h5ad":
        raise UserError(f"the output {path.name!r} is no .h5ad file: rename it, or give --only-embedding for .npz, .parquet.")


def write_copy(original: Path, path: Path, values: np.ndarray, provenance: dict) -> None:
    """Copy an h5ad file byte by byte and add obsm["X_scbench"] and uns["scbench"] (JSON); nothing else in it changes.

    Parameters
    ----------
    original, path
        The file, and the copy to publish.
    values
        float32 [cells, D]. An older obsm["X_scbench"] is replaced.
    provenance
        JSON-able.
    """
    with published_file(path) as partial:
        shutil.copyfile(original, partial)
        with h5py.File(partial, "r+") as file:
            put(file, "obsm", KEY, values, original)
            put(file, "uns", _PROVENANCE, json.dumps(provenance), original)


def put(file: h5py.File, group: str, key: str, value: object, original: Path) -> None:
    """Write `value` as `key` of a group of an open h5ad file, in place of an older one; `original` is what an error names."""
    if group not in file:
        anndata.io.write_elem(file, group, {})
    if not isinstance(file[group], h5py.Group):
        raise UserError(f"{original} is in an old h5ad format ({group} is no group): rewrite it with anndata.")
    if key in file[group]:
        del file[group][key]
    anndata.io.write_elem(file[group], key, value)


def write_alone(path: Path, cell_ids: np.ndarray, values: np.ndarray, provenance: dict) -> None:
    """Write cell ids and embeddings, as the suffix says.

    .npz: arrays `cell` (str), `X_scbench` (float32 [cells, D]) and `provenance` (JSON). .parquet: a column `cell` and
    one column a dimension, `X_scbench_0` …; the provenance is in the schema's metadata under `scbench`.
    """
    cell_ids = np.asarray(cell_ids, dtype=np.str_)
    with published_file(path) as partial:
        if path.suffix == ".npz":
            np.savez(partial, cell=cell_ids, **{KEY: values}, provenance=np.array(json.dumps(provenance)))
        else:
            columns = {"cell": pyarrow.array(cell_ids.tolist(), pyarrow.string())}
            columns |= {f"{KEY}_{i}": values[:, i] for i in range(values.shape[1])}
            table = pyarrow.table(columns)
            pyarrow.parquet.write_table(table.replace_schema_metadata({_PROVENANCE: json.dumps(provenance)}), partial)
