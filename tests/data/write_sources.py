"""Writes cells as zarr stores and as 10x Genomics HDF5 files."""

import warnings
from pathlib import Path

import anndata
import h5py
import numpy as np
import scipy.sparse as sp


def write_zarr(path: Path, adata: anndata.AnnData, version: int) -> Path:
    """A zarr store in format 2 or 3."""
    with warnings.catch_warnings(), anndata.settings.override(zarr_write_format=version):
        warnings.simplefilter("ignore")  # about formats to come
        adata.write_zarr(path)
    return path


def write_tenx(path: Path, counts: np.ndarray, *, barcodes, ids, names, types=None, genomes=None) -> Path:
    """filtered_feature_bc_matrix.h5 as Cell Ranger 3 and later write it; `counts`: [cells, features], dense or sparse."""
    features = len(ids)
    with h5py.File(path, "w") as file:
        group = _write_matrix(file.create_group("matrix"), counts, barcodes)
        table = group.create_group("features")
        table["id"], table["name"] = np.array(ids, dtype="S"), np.array(names, dtype="S")
        table["feature_type"] = np.array(types or ["Gene Expression"] * features, dtype="S")
        table["genome"] = np.array(genomes or ["GRCh38"] * features, dtype="S")
        table["_all_tag_keys"] = np.array(["genome"], dtype="S")
    return path


def write_old_tenx(path: Path, counts: np.ndarray, *, barcodes, ids, names, genomes=("hg19",)) -> Path:
    """The same as Cell Ranger 2 writes it: a group a genome."""
    with h5py.File(path, "w") as file:
        for genome in genomes:
            group = _write_matrix(file.create_group(genome), counts, barcodes)
            group["genes"], group["gene_names"] = np.array(ids, dtype="S"), np.array(names, dtype="S")
    return path


def _write_matrix(group: h5py.Group, counts: np.ndarray, barcodes) -> h5py.Group:
    matrix = sp.csr_matrix(counts)
    group["barcodes"] = np.array(barcodes, dtype="S")
    group["shape"] = np.array(matrix.shape[::-1], dtype=np.int32)
    group["indptr"] = matrix.indptr.astype(np.int64)
    group.create_dataset("indices", data=matrix.indices.astype(np.int64), compression="gzip", chunks=True)
    data = matrix.data.astype(np.int32) if (matrix.data == np.rint(matrix.data)).all() else matrix.data
    group.create_dataset("data", data=data, compression="gzip", chunks=True)
    return group
