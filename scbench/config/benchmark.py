"""Options that every benchmark on a file of cells understands."""

from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

from scbench.config.common import Common, Values
from scbench.errors import UserError

SEEDS, FOLDS = 3, 5


@dataclass(frozen=True, kw_only=True)
class BenchmarkConfig(Common):
    """What is read of the file, how it is split, and what becomes of cells that a model was trained on."""

    fewest_folds: ClassVar[int] = 3  # train, validate, test

    split_file: Path | None = None
    """Folds to use, a split.json that an earlier run wrote, instead of drawing them."""
    seeds: int = SEEDS
    """How often cells (or groups, perturbations, contexts) are dealt to folds."""
    folds: int = FOLDS
    """Folds: each tests once."""
    values: Values = "counts"
    """What the file holds; other than counts is marked in the table."""
    layer: str | None = None
    """Where the raw counts are: X, raw, or the name of a layer."""
    genes_column: str | None = None
    """Column of var that names the genes."""
    max_overlap: float = 0.01
    """Refuse if the model was trained on a larger share of the cells; 1: never. Those cells are left out."""
    allow_overlap: bool = False
    """Keep cells that the model was trained on; its rows are then marked "transductive"."""

    @property
    def folds_given(self) -> bool:
        """Whether --seeds or --folds are not the usual ones."""
        return (self.seeds, self.folds) != (SEEDS, FOLDS)

    def __post_init__(self) -> None:
        for name, value, least in [("--seeds", self.seeds, 1), ("--folds", self.folds, self.fewest_folds)]:
            if value < least:
                raise UserError(f"{name} is {value}: it must be at least {least}.")
        if self.split_file is not None and self.folds_given:
            raise UserError("--seeds and --folds are those of --split-file: leave them out.")
        if not 0 <= self.max_overlap <= 1:
            raise UserError(f"--max-overlap is {self.max_overlap}: it must be between 0 and 1.")
