"""Options of `scbench benchmark counts` and `scbench benchmark thin`."""

from dataclasses import dataclass
from pathlib import Path

from tyro.conf import Positional

from scbench.config.benchmark import BenchmarkConfig
from scbench.config.common import Common, Output, Values
from scbench.errors import UserError


@dataclass(frozen=True, kw_only=True)
class CountsConfig(BenchmarkConfig):
    """Predict one half of each cell's counts from the embedding of the other half, beside baselines; no labels needed."""

    model: Positional[str]
    """Model directory; or .npz or .parquet of embeddings by cell id of the file that `scbench benchmark thin` wrote."""
    input: Positional[Path]
    """h5ad file with raw counts."""
    output: Output
    """Directory for the tables (JSON, CSV, Markdown)."""
    group: str | None = None
    """Column of obs whose groups (donors, say) are held out whole."""

    def __post_init__(self) -> None:
        super().__post_init__()
        _check_values(self.values)


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
