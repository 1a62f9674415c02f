"""Which files the inputs of prepare are, and what reads each: an h5ad file, or one of the reference's parquet files."""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from scbench.data.obs import Obs, ParquetObs
from scbench.data.sources.anndata import AnnDataSource
from scbench.data.sources.parquet import ParquetSource
from scbench.data.vocabulary import Vocabulary
from scbench.errors import UserError


@dataclass(frozen=True, kw_only=True)
class SourceOptions:
    """What it takes to open an input the same way in every process."""

    path: Path
    layer: str | None
    genes_column: str | None
    recover_counts: bool
    vocabulary: Vocabulary | None  # that the ids of a parquet file are of; None for h5ad


def list_files(inputs: Sequence[Path]) -> tuple[Path, ...]:
    """The inputs with the *.parquet files of a directory in its place, file_2 before file_10; UserError if it has none."""
    files = []
    for path in inputs:
        inside = [file for file in path.glob("[!.]*") if is_parquet(file) and file.is_file()] if path.is_dir() else [path]
        if not inside:
            raise UserError(f"there is no .parquet file in the directory {path}.")
        files += sorted(inside, key=_natural)
    return tuple(files)


def _natural(path: Path) -> tuple:
    """Numbers in a name by their size; the name itself decides between 1 and 01."""
    parts = re.split("([0-9]+)", path.name)
    return parts[::2], [int(digits) for digits in parts[1::2]], path.name


def is_parquet(path: Path) -> bool:
    """Whether a file is read as parquet; by its name, so that nothing need be read."""
    return path.suffix.lower() == ".parquet"


def open_source(options: SourceOptions) -> AnnDataSource | ParquetSource:
    """The cells of an input."""
    if is_parquet(options.path):
        return ParquetSource(options.path, options.vocabulary)
    return AnnDataSource(
        options.path, layer=options.layer, genes_column=options.genes_column, recover_counts=options.recover_counts
    )


def open_obs(path: Path) -> Obs:
    """The obs of an input."""
    return ParquetObs(path) if is_parquet(path) else Obs(path)
