"""Options of the verbs that use and judge models."""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

from tyro.conf import Positional, arg

from scbench.config.common import Common, Output
from scbench.errors import UserError


@dataclass(frozen=True, kw_only=True)
class EmbedConfig(Common):
    """Write an h5ad with the cells' embeddings in obsm["X_scbench"], or the embeddings alone."""

    model: Positional[Path]
    """Model directory (a run's model/)."""
    input: Positional[Path]
    """h5ad file with raw counts."""
    output: Positional[Path]
    """h5ad to write; .npz or .parquet with --only-embedding."""
    only_embedding: bool = False
    """Write the embeddings and cell ids alone, as .npz or .parquet."""
    layer: str | None = None
    """Where the raw counts are: X, raw, or the name of a layer."""
    genes_column: str | None = None
    """Column of var that names the genes."""
    draws: int | None = None
    """Gene subsets averaged for a cell with more genes than the model was trained on; by default 4; recipe aaai2025: 1."""
    batch_cells: int = 64
    """Cells at once."""
    precision: Literal["fp32", "bf16"] = "fp32"
    """bf16: three times as fast where the processor has it; rounding makes a twentieth of the difference of another draw."""

    def __post_init__(self) -> None:
        for name, value in [("--draws", self.draws), ("--batch-cells", self.batch_cells)]:
            if value is not None and value < 1:
                raise UserError(f"{name} is {value}: it must be at least 1.")


@dataclass(frozen=True, kw_only=True)
class ClassificationConfig(Common):
    """Predict a label of each cell from frozen embeddings, beside baselines, on cells that pretraining never saw."""

    model: Positional[Path]
    """Model directory."""
    input: Positional[Path]
    """h5ad file with raw counts and labels."""
    label: str
    """Column of obs to predict."""
    output: Output
    """Directory for the tables (JSON, CSV, Markdown)."""
    layer: str | None = None
    """Where the raw counts are: X, raw, or the name of a layer."""
    genes_column: str | None = None
    """Column of var that names the genes."""
    seeds: int = 3
    """Repetitions of the whole cross-validation."""
    folds: int = 5
    """Folds of the cross-validation."""
    max_overlap: float = 0.01
    """Refuse if the model was trained on a larger share of the labelled cells; 1: never. Those cells are left out."""
    allow_overlap: bool = False
    """Keep cells that the model was trained on; every row of the table is then marked "transductive"."""

    def __post_init__(self) -> None:
        for name, value, least in [("--seeds", self.seeds, 1), ("--folds", self.folds, 2)]:
            if value < least:
                raise UserError(f"{name} is {value}: it must be at least {least}.")
        if not 0 <= self.max_overlap <= 1:
            raise UserError(f"--max-overlap is {self.max_overlap}: it must be between 0 and 1.")


@dataclass(frozen=True, kw_only=True)
class EvaluateConfig(Common):
    """Errors of a model on masked genes of held-out cells, in log1p counts, beside baselines: one law for every model."""

    model: Positional[Path]
    """Model directory."""
    store: Positional[Path]
    """A store on the model's vocabulary, made by `scbench prepare`."""
    output: Annotated[Path | None, arg(aliases=["-o"])] = None
    """Directory for the tables (JSON, CSV, Markdown); by default they are only shown."""
    split: Literal["test", "validation"] = "test"
    """Split to evaluate on."""
    cells: int = 4096
    """Cells to evaluate on (the first ones of the split: the store is shuffled)."""
    max_genes: int | None = None
    """Genes a cell; longer cells are sampled. By default as in training; give one number to compare models."""
    mask_ratio: float = 0.4
    """Probability that a gene's value is masked."""

    def __post_init__(self) -> None:
        for name, value in [("--cells", self.cells), ("--max-genes", self.max_genes)]:
            if value is not None and value < 1:
                raise UserError(f"{name} is {value}: it must be at least 1.")
        if not 0 < self.mask_ratio < 1:
            raise UserError(f"--mask-ratio is {self.mask_ratio}: it must be between 0 and 1.")


@dataclass(frozen=True, kw_only=True)
class DemoConfig(Common):
    """The whole path on real cells in minutes: prepare, pretrain, embed, benchmark, plots."""

    input: Positional[Path | None] = None
    """Your own h5ad; by default 700 PBMCs that ship with scanpy."""
    label: str | None = None
    """Column of obs to predict (needed with your own file)."""
    output: Output = Path("demo")
    """Directory for everything that the demo makes."""
    steps: int = 400
    """Optimizer steps."""

    def __post_init__(self) -> None:
        if self.steps < 1:
            raise UserError(f"--steps is {self.steps}: it must be at least 1.")
