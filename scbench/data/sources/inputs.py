"""What the inputs of prepare are, and what reads each: AnnData (h5ad, zarr), 10x Genomics HDF5, parquet, or a census."""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from scbench.config import Fractional
from scbench.data.obs import Obs, ParquetObs
from scbench.data.sources.anndata import AnnDataSource
from scbench.data.sources.census import CensusObs, CensusSource
from scbench.data.sources.census_client import VERSION
from scbench.data.sources.census_query import DEFAULT_VERSION
from scbench.data.sources.parquet import ParquetSource
from scbench.data.sources.stored import close, open_root
from scbench.data.sources.tenx import TenxObs, is_tenx
from scbench.data.vocabulary import Vocabulary
from scbench.errors import UserError

CENSUS = "census:"  # how such an input starts
FILES = (".h5ad", ".h5", ".parquet")  # that are taken of a directory, beside stores (directories) called *.zarr
MATRIX_MARKET = ("matrix.mtx", "matrix.mtx.gz")  # of a directory that Cell Ranger writes


@dataclass(frozen=True, kw_only=True)
class SourceOptions:
    """What it takes to open an input the same way in every process."""

    path: Path  # of the file or zarr store; for a census, of the file that lists the chosen cells
    layer: str | None
    genes_column: str | None
    recover_counts: bool
    fractional: Fractional
    vocabulary: Vocabulary | None  # that the ids of a parquet file are of; None for others
    census: str | None = None  # version or URI of the census that the cells are of
    rows: Path | None = None  # directory with the cells in the order of rows, if the file has them by columns


def split_inputs(inputs: Sequence[str | Path]) -> tuple[tuple[Path, ...], str | None]:
    """The files among the inputs (`list_files`), and the version or URI of the census, if one is among them."""
    locations = [str(given).removeprefix(CENSUS) for given in inputs if str(given).startswith(CENSUS)]
    files = list_files([Path(given) for given in inputs if not str(given).startswith(CENSUS)])
    if len(locations) > 1:
        raise UserError("two inputs are a census, and versions of it share most cells: leave one out.")
    if not locations:
        return files, None
    location = locations[0] or DEFAULT_VERSION
    local = not VERSION.fullmatch(location) and "://" not in location
    return files, str(Path(location).absolute()) if local else location


def list_files(inputs: Sequence[Path]) -> tuple[Path, ...]:
    """The inputs with the files and zarr stores in a directory in its place, file_2 before file_10; UserError if it has none.

    A directory is a zarr store itself if it is called *.zarr or holds the metadata of one.
    """
    files = []
    for path in inputs:
        if not path.is_dir() or _is_zarr(path):
            files.append(path)
            continue
        inside = [file for file in path.glob("[!.]*") if _is_zarr(file) or (file.suffix.lower() in FILES and file.is_file())]
        if not inside and any((path / name).exists() for name in MATRIX_MARKET):
            raise UserError(
                f"{path} holds a matrix in text form (matrix.mtx), which is not read: give the .h5 file that Cell Ranger "
                "writes beside that directory, or write the matrix as h5ad (scanpy.read_10x_mtx)."
            )
        if not inside:
            raise UserError(f"there is no .h5ad, .h5 or .parquet file and no .zarr store in the directory {path}.")
        files += sorted(inside, key=_natural)
    return tuple(files)


def _is_zarr(path: Path) -> bool:
    return path.is_dir() and (path.suffix == ".zarr" or (path / "zarr.json").exists() or (path / ".zgroup").exists())


def _natural(path: Path) -> tuple:
    """Numbers in a name by their size; the name itself decides between 1 and 01."""
    parts = re.split("([0-9]+)", path.name)
    return parts[::2], [int(digits) for digits in parts[1::2]], path.name


def is_parquet(path: Path) -> bool:
    """Whether a file is read as parquet; by its name, so that nothing need be read."""
    return path.suffix.lower() == ".parquet"


def open_source(options: SourceOptions) -> AnnDataSource | ParquetSource | CensusSource:
    """The cells of an input."""
    if options.census is not None:
        return CensusSource(options.census, options.path, options.fractional)
    if is_parquet(options.path):
        return ParquetSource(options.path, options.vocabulary, options.fractional)
    return AnnDataSource(
        options.path, layer=options.layer, genes_column=options.genes_column, recover_counts=options.recover_counts,
        fractional=options.fractional, rows=options.rows,
    )


def open_obs(options: SourceOptions) -> Obs:
    """The obs of an input."""
    if options.census is not None:
        return CensusObs(options.census, options.path)
    if is_parquet(options.path):
        return ParquetObs(options.path)
    root = open_root(options.path)
    try:
        tenx = is_tenx(root)
    finally:
        close(root)
    return TenxObs(options.path) if tenx else Obs(options.path)
