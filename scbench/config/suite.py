"""Options of `scbench benchmark suite`."""

from dataclasses import dataclass
from pathlib import Path

from tyro.conf import Positional, UseAppendAction

from scbench.config.common import Common, Output
from scbench.errors import UserError

Specs = UseAppendAction[tuple[tuple[str, ...], ...]]  # --model A B and --model A --model B are the same


@dataclass(frozen=True, kw_only=True)
class SuiteConfig(Common):
    """Run every benchmark of a suite for every model, into one table; the same command goes on where it was stopped."""

    suite: Positional[str]
    """A TOML file that names data sets, or a suite that comes with scbench: aaai2025."""
    model: Specs = ()
    """Models, each [NAME=]SPEC: a model directory, obsm:KEY, an .npz or .parquet of embeddings by cell id, or an .h5ad of
    predictions; {dataset} in it stands for a data set's name. The same NAME again: another pretraining seed of it."""
    output: Output
    """Directory for the table over all data sets (JSON, CSV, Markdown, a forest plot) and a folder for each."""
    data: Path | None = None
    """Folder of the data sets' files; by default the suite file's, or the present one."""
    scvi: bool = False
    """Train scVI as a baseline of classification too (needs scvi-tools)."""
    max_overlap: float = 0.01
    """A data set fails if a model was trained on a larger share of its cells; 1: never. Those cells are left out."""
    allow_overlap: bool = False
    """Keep cells that a model was trained on; every row of the table is then marked "transductive"."""

    def __post_init__(self) -> None:
        if not any(self.model):
            raise UserError("--model is missing: name at least one model, as --model [NAME=]SPEC.")
        if not 0 <= self.max_overlap <= 1:
            raise UserError(f"--max-overlap is {self.max_overlap}: it must be between 0 and 1.")

    def specs(self) -> list[str]:
        """What --model names, in order."""
        return [spec for given in self.model for spec in given]
