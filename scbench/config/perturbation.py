"""Options of `scbench benchmark perturbation`."""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from tyro.conf import Positional

from scbench.config.common import Common, Output
from scbench.errors import UserError

Split = Literal["unseen-cells", "unseen-perturbation", "unseen-combination", "unseen-context"]


@dataclass(frozen=True, kw_only=True)
class PerturbationConfig(Common):
    """Predict how perturbations change the mean expression of held-out cells, beside baselines and a ceiling."""

    model: Positional[Path]
    """Model directory."""
    input: Positional[Path]
    """h5ad file with raw counts."""
    perturbation_column: str
    """Column of obs that names each cell's perturbation: A, A+B, A_B or A,ctrl."""
    control: str
    """What that column calls control cells."""
    output: Output
    """Directory for the tables (JSON, CSV, Markdown)."""
    context: tuple[str, ...] = ()
    """Columns of obs (cell line, patient, …): changes are against the controls of the same context."""
    study: tuple[str, ...] | None = None
    """Columns of obs whose values are never mixed; by default dataset, study and perturbation_type where they are there."""
    total_counts_column: str | None = None
    """Column of obs with each cell's total over its whole profile; by default the sum over the file's genes."""
    split: Split = "unseen-perturbation"
    """What is held out."""
    predictor: Literal["ridge", "context"] = "ridge"
    """ridge: from the targets' gene embeddings; context: from contexts whose controls the model embeds alike."""
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
        for name, value, least in [("--seeds", self.seeds, 1), ("--folds", self.folds, 2)]:
            if value < least:
                raise UserError(f"{name} is {value}: it must be at least {least}.")
        if not 0 <= self.max_overlap <= 1:
            raise UserError(f"--max-overlap is {self.max_overlap}: it must be between 0 and 1.")
        check_predictor(self.predictor, self.split, self.context)


def check_predictor(predictor: str, split: str, context: tuple[str, ...]) -> None:
    """Raise UserError if the predictor and the split don't go together, or contexts are missing."""
    if predictor == "context" and split != "unseen-context":
        raise UserError(f"the predictor context predicts changes in an unseen context, not with --split {split}: "
                        "add --split unseen-context or choose --predictor ridge.")
    if split == "unseen-context" and not context:
        raise UserError("--split unseen-context needs the columns that make a context: give --context.")
