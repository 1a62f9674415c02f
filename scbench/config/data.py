"""Options of the verbs that make and check stores."""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from tyro.conf import Positional

from scbench.config.common import Common, Output
from scbench.errors import UserError

Fractional = Literal["refuse", "round", "keep"]
Preset = Literal["heart", "blood", "brain", "lung", "kidney", "intestine", "pancreas", "others", "pan-cancer"]


@dataclass(frozen=True, kw_only=True)
class PrepareConfig(Common):
    """Turn files of cells or a census into a shard store: raw counts on one vocabulary, deduplicated, split and shuffled."""

    inputs: Positional[tuple[str, ...]]
    """h5ad files, zarr stores or 10x Genomics HDF5 files with raw counts, the reference's parquet files, directories of these,
    or the CELLxGENE Census: census: (the release of 2025-01-30), census:VERSION or census:URI."""
    output: Output
    """The store to make (a directory that does not exist yet)."""
    vocabulary: Path | None = None
    """JSON file {token: id}; by default one is built from the genes of the inputs."""
    genes_column: str | None = None
    """Column of var that names the genes; by default Ensembl ids are looked for, then symbols."""
    layer: str | None = None
    """Where the raw counts are: X, raw, or the name of a layer; by default layers["counts"], raw and X are tried."""
    recover_counts: bool = False
    """Bring counts back from log-normalised values."""
    fractional: Fractional = "refuse"
    """What becomes of counts that are not whole: an error, the nearest whole number (half to even), or kept as they are."""
    skip_bad_sources: bool = False
    """Leave an input, or a dataset of a census, out, and say so, if it cannot be read, holds no raw counts, or matches too
    little."""
    licence: str | None = None
    """The licence of all inputs that name none themselves, for the store's manifest."""
    split: str = ".9,.05,.05"
    """Shares of cells for training, validation and test."""
    split_by: tuple[str, ...] = ()
    """Columns of obs: whole groups (donors, datasets) go to one split. Of a census: collection_id by default; donor, too."""
    keep_obs: tuple[str, ...] = ()
    """Columns of obs to keep in the store. Of a census by default: cell type, tissue, assay, disease, donor and origin."""
    filter: str | None = None
    """Of a census: which cells, as a SOMA value filter on obs, like "cell_type == 'B cell' and sex == 'female'"."""
    preset: tuple[Preset, ...] = ()
    """Of a census: the reference's queries, which share no cell; together with --filter, both must hold."""
    include_duplicate_cells: bool = False
    """Of a census: also take cells that are copies of cells of other datasets; a copy can be in another split."""
    include_read_counts: bool = False
    """Of a census: also take cells of assays that are not known to count molecules (UMIs); some count reads."""
    min_genes: int = 1
    """Drop cells with fewer expressed genes (in the vocabulary)."""
    workers: int | None = None
    """Processes; by default one per core."""
    part: str | None = None
    """i/n, like 3/8: prepare the i-th of n shares of the cells, for one of n jobs; `scbench merge` joins what they make."""

    def split_shares(self) -> tuple[float, float, float]:
        """The three shares; UserError unless they are non-negative, sum to 1 and leave something to train on."""
        try:
            shares = tuple(float(share) for share in self.split.split(","))
        except ValueError:
            shares = ()
        if len(shares) != 3 or min(shares) < 0 or abs(sum(shares) - 1) > 1e-6 or shares[0] == 0:
            raise UserError(f"--split {self.split!r} is not three shares that sum to 1, like .9,.05,.05.")
        return shares


@dataclass(frozen=True, kw_only=True)
class MergeConfig(Common):
    """Join the stores that `scbench prepare --part 1/n` … `--part n/n` made into one, without copying them."""

    parts: Positional[tuple[Path, ...]]
    """The stores of all n parts."""
    output: Output
    """The store to make (a directory that does not exist yet), on the same file system."""


@dataclass(frozen=True, kw_only=True)
class InfoConfig(Common):
    """Say what a store holds."""

    store: Positional[Path]
    """The store."""


@dataclass(frozen=True, kw_only=True)
class VerifyConfig(Common):
    """Check every byte of a store against its manifest."""

    store: Positional[Path]
    """The store."""
