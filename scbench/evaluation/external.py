"""What a benchmark judges beside our own models: embeddings from elsewhere, by cell id, and predictions."""

import hashlib
import json
from collections.abc import Iterable
from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow
import pyarrow.parquet
import scipy.sparse

from scbench.data.sources.anndata import AnnDataSource
from scbench.errors import UserError
from scbench.evaluation import embed, embedding_files
from scbench.evaluation.predictions_files import ExternalPredictions
from scbench.evaluation.split_files import unique_ids
from scbench.models.model import ExpressionModel

OBSM = "obsm:"
ACCEPTED = "a model directory, obsm:KEY, an .npz or .parquet of embeddings by cell id, or an .h5ad of predictions"
CELL = "cell"  # the array or column of cell ids that scbench embed writes


class ExternalEmbedding:
    """An embedding that something else made: in obsm of the benchmark's own file, or in a file by cell id (or gene name).

    Parameters
    ----------
    spec
        `obsm:KEY`; or the path of what `scbench embed --only-embedding` writes (.npz, .parquet), or of a .parquet with one
        column (or index) of cell ids and nothing else but columns of floats.

    Attributes
    ----------
    name : str
        What tables call it: the key, or the file's name without its suffix.
    provenance : dict
        JSON-able. After `values_of` it has the number of cells and dimensions and the SHA-256 of the values (float32,
        little-endian, row by row) given last.

    Raises
    ------
    UserError
        If the file holds no such embedding.
    """

    def __init__(self, spec: str | Path):
        self._key = str(spec).removeprefix(OBSM) if str(spec).startswith(OBSM) else None
        self.name = Path(spec).stem if self._key is None else self._key
        self.provenance: dict = {"embedding": Path(spec).name if self._key is None else str(spec)}
        if self._key is None:
            read = _read_npz if Path(spec).suffix.lower() == ".npz" else _read_parquet
            self._file = Path(spec).name
            self._ids, self._values, origin = read(Path(spec))
            self.provenance["origin"] = origin
        elif not self._key:
            raise UserError("obsm: names no embedding: give obsm:KEY, with a key of obsm.")

    def values_of(self, source: AnnDataSource) -> np.ndarray:
        """The embedding of a source's cells, float32 [cells, D], in its order; UserError if a cell has none."""
        values = self._from_file(source) if self._key is None else self._from_obsm(source)
        with np.errstate(over="ignore"):
            values = np.ascontiguousarray(values, dtype=np.float32)
        bad = ~np.isfinite(values).all(axis=1)
        if bad.any():
            cell = source.obs_names[int(np.argmax(bad))]
            raise UserError(f"the embedding {self.name} of {source.name} holds NaN or infinite numbers for {bad.sum():,} "
                            f"cells ({cell!r}, say): give one with a number in every place.")
        digest = hashlib.sha256(values.astype("<f4", copy=False).tobytes()).hexdigest()
        self.provenance |= {"cells": values.shape[0], "width": values.shape[1], "sha256": digest}
        return values

    def vectors_of(self, names: Iterable[str]) -> dict[str, np.ndarray]:
        """The rows of a file by the ids it gives, for files whose ids are genes: float64 [D] of each of `names` it has.

        UserError if the embedding is one of cells in obsm, or if a name's row is there twice or holds what is no number.
        """
        if self._key is not None:
            raise UserError(f"obsm:{self._key} is an embedding of cells, and one of genes is needed: give an .npz or .parquet "
                            "whose ids are genes, or --predictor context.")
        places: dict[str, list[int]] = {name: [] for name in names}
        for place, name in enumerate(self._ids):
            if name in places:
                places[name].append(place)
        found = {}
        for name, rows in places.items():
            if len(rows) > 1 or (rows and not np.isfinite(self._values[rows[0]]).all()):
                reason = "more than one embedding" if len(rows) > 1 else "NaN or infinite numbers in the embedding"
                raise UserError(f"{self._file} holds {reason} of {name!r}: write it with one a gene, of numbers.")
            if rows:
                found[name] = self._values[rows[0]].astype(np.float64)
        return found

    def _from_obsm(self, source: AnnDataSource) -> np.ndarray:
        if self._key not in source.obsm_keys:
            there = ", ".join(source.obsm_keys) or "nothing"
            raise UserError(f"{source.name} has no {self._key!r} in obsm (there are: {there}): give one of them as obsm:KEY.")
        values = source.obsm(self._key)
        if isinstance(values, pd.DataFrame):
            values = values.to_numpy()
        elif scipy.sparse.issparse(values):
            values = values.toarray()
        return _matrix(values, source.n_cells, f"obsm[{self._key!r}] of {source.name}")

    def _from_file(self, source: AnnDataSource) -> np.ndarray:
        names = pd.Index(source.obs_names)
        if self._ids.has_duplicates:  # right only where the source has as many cells of that name
            times = self._ids.value_counts()
            doubled = times.index[times > names.value_counts().reindex(times.index)]
            if len(doubled):
                raise UserError(f"{self._file} holds more than one embedding of cell {doubled[0]!r} of {source.name}: "
                                "write it with one a cell.")
        rows = pd.Index(unique_ids(self._ids)).get_indexer(unique_ids(names))
        lacking = np.flatnonzero(rows < 0)
        if len(lacking):
            raise UserError(f"{self._file} has no embedding of {len(lacking):,} of the {len(rows):,} cells of {source.name} "
                            f"({names[lacking[0]]!r}, say): give the embedding of this file's cells, by their names in obs.")
        return self._values[rows]


def open_model(spec: str | Path) -> ExpressionModel | ExternalEmbedding | ExternalPredictions:
    """What a benchmark's MODEL names; UserError if it is nothing that a benchmark takes."""
    path = Path(spec)
    if path.is_dir():
        return embed.load_model(path)
    if str(spec).startswith(OBSM) or path.suffix.lower() in (".npz", ".parquet"):
        return ExternalEmbedding(spec)
    if path.suffix.lower() == ".h5ad":
        return ExternalPredictions(path)
    raise UserError(f"{spec} is no model that is there: give {ACCEPTED}.")


def _read_npz(path: Path) -> tuple[pd.Index, np.ndarray, dict | None]:
    """Cell ids, values [cells, D] and the provenance written beside them."""
    try:
        with np.load(path, allow_pickle=False) as file:
            if lacking := [name for name in (CELL, embedding_files.KEY) if name not in file]:
                raise UserError(f"{path} has no array {' and no '.join(lacking)} (there are: {', '.join(file) or 'none'}): "
                                "write it as scbench embed --only-embedding does.")
            ids, values = file[CELL], file[embedding_files.KEY]
            provenance = str(file["provenance"]) if "provenance" in file else None
    except UserError:
        raise
    except OSError as error:
        raise UserError(f"the embedding {path} cannot be read: {error.strerror or error}.") from None
    except Exception as error:  # damaged zip files raise whatever their parser stumbles over
        raise UserError(f"{path} is damaged, or no .npz of numbers and names: write it again without objects.") from error
    if ids.ndim != 1 or ids.dtype.kind != "U":
        raise UserError(f"array {CELL} of {path} is no list of cell ids: write it as text, one a cell.")
    return pd.Index(ids.astype(object)), _matrix(values, len(ids), f"array {embedding_files.KEY} of {path}"), _json(provenance)


def _read_parquet(path: Path) -> tuple[pd.Index, np.ndarray, dict | None]:
    """As `_read_npz`."""
    try:
        table = pyarrow.parquet.read_table(path, partitioning=None)
    except OSError as error:
        raise UserError(f"the embedding {path} cannot be read: {error.strerror or error}.") from None
    except pyarrow.ArrowException:
        raise UserError(f"{path} is no .parquet file, or it is damaged: write it again.") from None
    others = [field.name for field in table.schema if not pyarrow.types.is_floating(field.type)]
    if len(others) != 1:
        found = f"{len(others)} that are none ({', '.join(others[:5])})" if others else "no other"
        raise UserError(f"{path} must hold columns of floats and one other, of cell ids, but has {found}: write it so.")
    ids = table.column(others[0])
    if ids.null_count:
        raise UserError(f"column {others[0]} of {path} holds a cell id that is missing: write it with one a row.")
    columns = [table.column(place).to_numpy() for place, name in enumerate(table.column_names) if name != others[0]]
    values = np.column_stack(columns) if columns else np.zeros((len(ids), 0))
    provenance = (table.schema.metadata or {}).get(b"scbench")
    names = pd.Index([str(one) for one in ids.to_pylist()], dtype=object)
    return names, _matrix(values, len(ids), str(path)), _json(provenance)


def _matrix(values: object, cells: int, where: str) -> np.ndarray:
    """UserError unless `values` are numbers [cells, D], D ≥ 1."""
    values = np.asarray(values)
    if values.dtype.kind not in "fiub" or values.ndim != 2:
        raise UserError(f"{where} is no table of numbers with a row a cell: give one.")
    if len(values) != cells:
        raise UserError(f"{where} has {len(values):,} rows for {cells:,} cells: give one a cell.")
    if values.shape[1] < 1:
        raise UserError(f"{where} has no dimension: give an embedding of at least one.")
    return values


def _json(text: str | bytes | None) -> dict | None:
    """The provenance that scbench embed wrote; None if there is none that can be read."""
    try:
        held = None if text is None else json.loads(text)
    except ValueError:
        return None
    return held if isinstance(held, dict) else None
