"""10x Genomics HDF5 files (filtered_feature_bc_matrix.h5): the matrix `matrix` of Cell Ranger 3 and later, or that of one
genome of Cell Ranger 2. Cells are called by their barcodes; only features of the type Gene Expression are genes.
"""

from pathlib import Path

import h5py
import numpy as np
import pandas as pd
import pyarrow as pa
import zarr

from scbench.data.gene_identity import organism_of, unversioned
from scbench.data.obs import Obs
from scbench.data.sources.matrix import CSRMatrix, Matrix, Rows
from scbench.data.sources.stored import Candidate, Reading, open_root
from scbench.errors import UserError

GENES = "Gene Expression"  # the feature type of genes


def is_tenx(root: h5py.File | zarr.Group) -> bool:
    """Whether an opened file has the layout of a 10x Genomics HDF5 file."""
    return isinstance(root, h5py.File) and "obs" not in root and ("matrix" in root or bool(_genomes(root)))


def _genomes(file: h5py.File) -> list[str]:
    """The groups of a file of Cell Ranger 2: one a genome."""
    return [name for name, item in file.items() if isinstance(item, h5py.Group) and "barcodes" in item and "genes" in item]


class TenxFile:
    """The parts of an opened 10x Genomics HDF5 file."""

    kind = "10x_h5"

    def __init__(self, file: h5py.File, name: str):
        self._file, self._name = file, name
        genomes = [] if "matrix" in file else _genomes(file)
        if len(genomes) > 1:
            raise _several_genomes(name, genomes)
        self._group = file[genomes[0] if genomes else "matrix"]
        self._barcodes = self._group["barcodes"]
        self.n_cells = int(self._barcodes.shape[0])

    def obs_names(self) -> np.ndarray:
        """The barcodes, str objects [cells]."""
        return self._barcodes.asstr()[:]

    def obs(self) -> pd.DataFrame:
        """No columns: such a file says nothing of its cells."""
        return pd.DataFrame(index=self.obs_names())

    def obsm_keys(self) -> list[str]:
        """Such a file has no obsm."""
        return []

    def licence(self) -> None:
        """Such a file names none."""

    def candidates(self) -> dict[str, Candidate]:
        """The one matrix, called X as scanpy calls it."""
        var, is_gene = self._features()
        return {"X": Candidate("X", lambda: self._open(is_gene), lambda: var[is_gene])}

    def close(self) -> None:
        """Close the file."""
        self._file.close()

    def _open(self, is_gene: np.ndarray) -> Matrix:
        features, cells = (int(length) for length in self._group["shape"][:])
        indptr = self._group["indptr"][:]
        if features != len(is_gene) or len(indptr) != cells + 1 or (np.diff(indptr.astype(np.int64)) < 0).any():
            raise ValueError("shape, features and indptr do not fit")
        # columns are cells in these files, so what they call CSC is cells as compressed rows
        matrix = CSRMatrix((cells, features), indptr, self._group["indices"], self._group["data"])
        return matrix if is_gene.all() else _Genes(matrix, is_gene)

    def _features(self) -> tuple[pd.DataFrame, np.ndarray]:
        """Names and ids of all features, and which are genes, bool; UserError if none is, or not of one organism."""
        if "features" not in self._group:  # Cell Ranger 2
            names, ids = (self._group[key].asstr()[:] for key in ("gene_names", "genes"))
            return pd.DataFrame({"gene_ids": ids}, index=names), np.ones(len(ids), dtype=bool)
        features = self._group["features"]
        names, ids, types = (features[key].asstr()[:] for key in ("name", "id", "feature_type"))
        is_gene = types == GENES
        if len(types) and not is_gene.any():
            raise UserError(f"{self._name} has no features of the type {GENES}, only {', '.join(sorted(set(types)))}.")
        genomes = features["genome"].asstr()[:] if "genome" in features else np.full(len(ids), "", dtype=object)
        found = sorted(set(genomes[is_gene]))
        if len(found) > 1:  # Cell Ranger then puts the genome before names and ids
            names, ids = (np.array([text.removeprefix(f"{genome}_") for text, genome in zip(column, genomes, strict=True)],
                                   dtype=object) for column in (names, ids))
            of_genome = [is_gene & (genomes == genome) for genome in found]
            organisms = {organism_of(map(unversioned, ids[rows]), names[rows]) for rows in of_genome} - {"unknown"}
            if len(organisms) > 1:
                raise _several_genomes(self._name, found)
        return pd.DataFrame({"gene_ids": ids}, index=names), is_gene


class _Genes:
    """The columns of another matrix that are genes."""

    def __init__(self, parent: Matrix, is_gene: np.ndarray):
        self._parent, self._is_gene = parent, is_gene
        self._number = np.cumsum(is_gene) - 1
        self.shape = (parent.shape[0], int(is_gene.sum()))
        self.cheap_rows = parent.cheap_rows

    def read(self, start: int, stop: int) -> Rows:
        """Rows `start` … `stop`−1."""
        rows = self._parent.read(start, stop)
        if len(rows.columns) and not 0 <= rows.columns.min() <= rows.columns.max() < len(self._is_gene):
            raise ValueError("it names a feature that does not exist")
        keep = self._is_gene[rows.columns]
        offsets = np.concatenate([[0], np.cumsum(keep)])[rows.offsets]
        return Rows(self._number[rows.columns[keep]], rows.values[keep], offsets)


class TenxObs(Obs):
    """obs of a 10x Genomics HDF5 file: names, and no columns."""

    def __init__(self, path: Path):
        self._file = open_root(path)
        self._reading = Reading(path.name, "a 10x Genomics file")
        self._barcodes = TenxFile(self._file, path.name)._barcodes

    @property
    def columns(self) -> list[str]:
        """None."""
        return []

    def names(self, start: int, stop: int) -> pa.Array:
        """The barcodes of cells `start` … `stop`−1."""
        with self._reading:
            return pa.array(self._barcodes.asstr()[start:stop], pa.string())


def _several_genomes(name: str, genomes: list[str]) -> UserError:
    return UserError(
        f"{name} holds counts of several genomes ({', '.join(genomes)}): write the cells of one of them, with its genes only, "
        "as h5ad."
    )
