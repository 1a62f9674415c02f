"""Options of `scbench benchmark counts` and `scbench benchmark thin`."""

from dataclasses import dataclass
from pathlib import Path

from tyro.conf import Positional

from scbench.config.common import Common, Output, Values
from scbench.errors import UserError


@dataclass(frozen=True, kw_only=True)
class CountsConfig(Common):
    """Predict one half of each cell's counts from the embedding of the other half, beside baselines; no labels needed."""

    model: Positional[str]
    """Model directory; or .npz or .parquet of embeddings by cell id of the file that `scbench benchmark thin` wrote."""
    input: Positional[Path]
    """h5ad file with raw counts."""
    output: Output
    """Directory for the tables (JSON, CSV, Markdown)."""
    group: str | None = None
    """Column of obs whose groups (donors, say) are held out whole."""
    split_file: Path | None = None
    """Folds that another run wrote (split.json), in place of drawing them."""
    values: Values = "counts"
    """What the file holds, if not counts: log1p_counts or lognorm, of which counts are recovered."""
    layer: str | None = None
    """Where the raw counts are: X, raw, or the name of a layer."""
    genes_column: str | None = None
    """Column of var that names the genes."""
    seeds: int = 3
    """Repetitions of the whole cross-validation."""
    folds: int = 5
    """Folds of the cross-validation."""
    max_overlap: float = 0.01
    """Refuse if the model was trained on a larger share of the cells; 1: never. Those cells are left out."""
    allow_overlap: bool = False
    """Keep cells that the model was trained on; every row of the table is then marked "transductive"."""

    def __post_init__(self) -> None:
        _check_values(self.values)
        for name, value, least in [("--seeds", self.seeds, 1), ("--folds", self.folds, 3)]:
            if value < least:
                raise UserError(f"{name} is {value}: it must be at least {least}.")
        if not 0 <= self.max_overlap <= 1:
            raise UserError(f"--max-overlap is {self.max_overlap}: it must be between 0 and 1.")
        if self.split_file is not None and (self.seeds, self.folds) != (3, 5):
            raise UserError("--split-file says how many --seeds and --folds there are: leave these out.")


@dataclass(frozen=True, kw_only=True)
class ThinConfig(Common):
    """Write the half of each cell's counts that `benchmark counts` embeds, so that other models can embed it."""

    input: Positional[Path]
    """h5ad file with raw counts."""
    output: Output
    """h5ad to write; its cells are named after the half that they are."""
    values: Values = "counts"
    """What the file holds, if not counts: log1p_counts or lognorm, of which counts are recovered."""
    layer: str | None = None
    """Where the raw counts are: X, raw, or the name of a layer."""
    genes_column: str | None = None
    """Column of var that names the genes."""

    def __post_init__(self) -> None:
        _check_values(self.values)
        if self.output.suffix != ".h5ad":
            raise UserError(f"the output {str(self.output)!r} is no .h5ad file: rename it.")


def _check_values(values: Values) -> None:
    if values == "as_is":
        raise UserError("--values as_is are no counts, which alone can be split: give a file of counts.")
