"""Options of the verbs that make a classifier of a model, and use it."""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from tyro.conf import Positional

from scbench.config.common import Common, Output
from scbench.errors import UserError


@dataclass(frozen=True, kw_only=True)
class FinetuneConfig(Common):
    """Train a classifier of cells on a model: the whole model, or only the classifier's layer (the head)."""

    model: Positional[Path]
    """Model directory (a run's model/)."""
    input: Positional[Path]
    """h5ad file with raw counts and labels."""
    label: str
    """Column of obs to learn."""
    output: Output
    """Model directory to write: the model, and its classifier."""
    train: Literal["all", "head"] = "all"
    """What is trained: the whole model and the head, or the head on frozen embeddings."""
    layer: str | None = None
    """Where the raw counts are: X, raw, or the name of a layer."""
    genes_column: str | None = None
    """Column of var that names the genes."""
    epochs: int | None = None
    """Most passes over the training cells (50; the head alone: 200); it stops when the validation loss no longer falls."""
    batch_cells: int = 64
    """Cells of an optimizer step."""
    lr: float | None = None
    """Peak learning rate of the head (0.005, alone 0.02); the rest of the model learns at a tenth of it."""
    coverage: float = 0.95
    """Share of the validation cells that the threshold for "unassigned" leaves assigned."""

    def __post_init__(self) -> None:
        for name, value in [("--epochs", self.epochs), ("--batch-cells", self.batch_cells)]:
            if value is not None and value < 1:
                raise UserError(f"{name} is {value}: it must be at least 1.")
        if self.lr is not None and not 0 < self.lr < 1:
            raise UserError(f"--lr is {self.lr}: it must be between 0 and 1.")
        if not 0 < self.coverage <= 1:
            raise UserError(f"--coverage is {self.coverage}: it must be above 0 and at most 1.")


@dataclass(frozen=True, kw_only=True)
class PredictConfig(Common):
    """Label the cells of an h5ad file by a finetuned model: obs["scbench_label"], obs["scbench_probability"] in a copy."""

    model: Positional[Path]
    """Model directory that `scbench finetune` wrote."""
    input: Positional[Path]
    """h5ad file with raw counts."""
    output: Positional[Path]
    """h5ad to write."""
    layer: str | None = None
    """Where the raw counts are: X, raw, or the name of a layer."""
    genes_column: str | None = None
    """Column of var that names the genes."""
    batch_cells: int = 64
    """Cells at once."""

    def __post_init__(self) -> None:
        if self.batch_cells < 1:
            raise UserError(f"--batch-cells is {self.batch_cells}: it must be at least 1.")
