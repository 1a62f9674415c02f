"""AnnData on the disk, an h5ad file or a zarr store, opened without being loaded; and what is wrong if that fails."""

import errno
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import anndata
import h5py
import numpy as np
import pandas as pd
import zarr

from scbench.data.sources.matrix import Matrix, open_matrix
from scbench.errors import UserError

Group = h5py.Group | zarr.Group
Array = h5py.Dataset | zarr.Array
LICENCE_KEYS = ("licence", "license")  # of uns


class Candidate(NamedTuple):
    """A place where the counts may be."""

    place: str  # X, raw, or the name of a layer: what --layer takes
    open: Callable[[], Matrix]
    var: Callable[[], pd.DataFrame]


class Reading:
    """Turns what HDF5, zarr and AnnData raise on a damaged file into one sentence."""

    def __init__(self, name: str, kind: str):
        self._name, self._kind = name, kind

    def __enter__(self) -> None:
        pass

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _) -> None:
        if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
            return  # the file's rows are being written elsewhere
        if isinstance(error, (OSError, KeyError, RuntimeError, ValueError)):
            raise UserError(f"{self._name} is damaged or not {self._kind}: {str(error).splitlines()[0]}.") from error


class StoredAnnData:
    """The parts of an AnnData in an opened h5ad file or zarr store."""

    def __init__(self, root: h5py.File | zarr.Group):
        self._root = root
        self.kind = "h5ad" if isinstance(root, h5py.File) else "zarr"
        index = self._index
        self.n_cells = int(index.shape[0]) if isinstance(index, Array) else len(anndata.io.read_elem(index))

    @property
    def _index(self) -> Group | Array:
        obs = self._root["obs"]
        return obs[obs.attrs["_index"]]

    def obs_names(self) -> np.ndarray:
        """The ids of the cells, str objects [cells]."""
        return np.array([str(name) for name in anndata.io.read_elem(self._index)], dtype=object)

    def obs(self) -> pd.DataFrame:
        """The annotation of the cells."""
        return anndata.io.read_elem(self._root["obs"])

    @property
    def _obsm(self) -> Group | dict:
        obsm = self._root.get("obsm", {})
        return {} if isinstance(obsm, Array) else obsm  # an array in layouts from before 2020

    def obsm_keys(self) -> list[str]:
        """What obsm holds."""
        return list(self._obsm)

    def obsm(self, key: str) -> object:
        """One of it: an array, a sparse matrix or a DataFrame."""
        return anndata.io.read_elem(self._obsm[key])

    def licence(self) -> str | None:
        """What uns says of it."""
        uns = self._root.get("uns", {})
        return named_licence({key: anndata.io.read_elem(uns[key]) for key in LICENCE_KEYS if key in uns})

    def candidates(self) -> dict[str, Candidate]:
        """The places where the counts may be."""
        root = self._root

        def candidate(place: str, item: str, var: str) -> Candidate:
            return Candidate(place, lambda: open_matrix(root[item]), lambda: anndata.io.read_elem(root[var]))

        candidates = {name: candidate(name, f"layers/{name}", "var") for name in root.get("layers", ())}
        if "raw" in root and "X" in root["raw"]:
            candidates["raw"] = candidate("raw", "raw/X", "raw/var")
        if "X" in root and root["X"].attrs.get("encoding-type") != "null":
            candidates["X"] = candidate("X", "X", "var")
        return candidates

    def close(self) -> None:
        """Close the file."""
        close(self._root)


def named_licence(uns: dict) -> str | None:
    """The licence that uns names, if it does."""
    return next((str(uns[key]) for key in LICENCE_KEYS if isinstance(uns.get(key), str) and uns[key].strip()), None)


def open_root(path: Path) -> h5py.File | zarr.Group:
    """Open an HDF5 file or, of a directory, a zarr store; UserError if it is neither."""
    if not path.exists():
        raise UserError(f"there is no file {path}.")
    if path.is_dir():
        try:
            return zarr.open_group(path, mode="r")
        except (OSError, KeyError, ValueError, TypeError) as error:
            if path.suffix == ".zarr":
                raise UserError(f"{path} cannot be read as a zarr store: {str(error).splitlines()[0]}.") from None
            raise UserError(f"{path} is a directory, not an h5ad file.") from None
    if path.stat().st_size == 0:
        raise UserError(f"{path} is empty (0 bytes).")
    try:
        return h5py.File(path, "r", locking="best-effort")
    except OSError as error:
        if "truncated" in str(error):
            raise UserError(f"{path} is truncated: copy or download it again.") from None
        raise UserError(f"{path} cannot be read as an h5ad (HDF5) file: {str(error).splitlines()[0]}.") from None


def close(root: h5py.File | zarr.Group) -> None:
    """Close what `open_root` opened."""
    if isinstance(root, h5py.File):
        root.close()


def check_anndata(root: h5py.File | zarr.Group, path: Path) -> None:
    """UserError if an opened file holds no AnnData of today's layout."""
    is_file = isinstance(root, h5py.File)
    missing = [name for name in ("obs", "var") if name not in root]
    if missing:
        what = "an HDF5 file but not an h5ad file" if is_file else "a zarr store but not of an AnnData"
        raise UserError(f"{path} is {what}: it has no {' and no '.join(missing)}.")
    if any("_index" not in root[name].attrs for name in ("obs", "var")):
        kind = "an h5ad file" if is_file else "a zarr store"
        raise UserError(f"{path} is {kind} of a layout from before 2020: read and write it once with a current anndata.")
