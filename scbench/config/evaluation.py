"""Options of the verbs that use and judge models."""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

from tyro.conf import Positional, arg

from scbench.config.benchmark import BenchmarkConfig
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
    """bf16 is faster where the processor has it; its rounding is small beside what another draw of a cell's genes changes."""

    def __post_init__(self) -> None:
        for name, value in [("--draws", self.draws), ("--batch-cells", self.batch_cells)]:
            if value is not None and value < 1:
                raise UserError(f"{name} is {value}: it must be at least 1.")


@dataclass(frozen=True, kw_only=True)
class ClassificationConfig(BenchmarkConfig):
    """Predict a label of each cell from frozen embeddings, beside baselines, on cells that pretraining never saw."""

    model: Positional[str]
    """Model directory; or obsm:KEY, an .npz or .parquet of embeddings by cell id, an .h5ad of predictions."""
    input: Positional[Path | None] = None
    """h5ad file with raw counts and labels, or the reference's processed .pt file."""
    train: Path | None = None
    """Label transfer, with --test, in place of a file that is split: the h5ad file whose labelled cells are learnt."""
    test: Path | None = None
    """The h5ad file whose labels are then predicted, and scored."""
    label: str | None = None
    """Column of obs to predict; a .pt file implies it."""
    output: Output
    """Directory for the tables (JSON, CSV, Markdown)."""
    protocol: Literal["default", "aaai2025"] = "default"
    """default: train, validate, test in turn; aaai2025: the reference's 5 trials of 70/30, the best on the test part."""
    group: str | None = None
    """Column of obs (donor, dataset, platform) whose groups are held out whole; by default cells are held out."""
    scvi: bool = False
    """Train scVI on the training cells of each fold too (needs scvi-tools)."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if (self.train is None) != (self.test is None) or (self.train is None) == (self.input is None):
            raise UserError("give either one file of labelled cells, or both --train and --test, for label transfer.")
        folded = [option for option, given in [
            ("--seeds and --folds are", self.folds_given), ("--group is", self.group is not None),
            ("--split-file is", self.split_file is not None), ("--scvi is", self.scvi),
        ] if given]
        if self.train is not None:
            if self.label is None:
                raise UserError("--label is missing: say which column of obs, in both files, holds the labels.")
            if self.protocol == "aaai2025" or folded:
                raise UserError(f"{folded[0] if folded else '--protocol is'} no part of label transfer: leave that out.")
        if self.protocol == "aaai2025" and folded:
            raise UserError(f"{folded[0]} no part of --protocol aaai2025, which has 5 trials by cell: leave that out.")


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
