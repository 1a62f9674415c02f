"""The options of every verb, as dataclasses: the command line, the Python functions and the files of a run share them.

Nothing here imports torch, so `scbench --help` answers at once.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

from tyro.conf import Positional, arg

from scbench.errors import UserError

Output = Annotated[Path, arg(aliases=["-o"])]


@dataclass(frozen=True, kw_only=True)
class Common:
    """Options that every verb understands."""

    seed: int = 0
    """Seed of every random choice."""
    json: bool = False
    """Print the result as JSON."""
    debug: bool = False
    """Show the traceback of an error."""


@dataclass(frozen=True, kw_only=True)
class PrepareConfig(Common):
    """Turn h5ad files into a shard store: raw counts, mapped onto one vocabulary, deduplicated, split and shuffled."""

    inputs: Positional[tuple[Path, ...]]
    """h5ad files with raw counts."""
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
    split: str = ".9,.05,.05"
    """Shares of cells for training, validation and test."""
    split_by: tuple[str, ...] = ()
    """Columns of obs: whole groups (donors, datasets) go to one split."""
    keep_obs: tuple[str, ...] = ()
    """Columns of obs to keep in the store."""
    min_genes: int = 1
    """Drop cells with fewer expressed genes (in the vocabulary)."""
    workers: int | None = None
    """Processes; by default one per core."""

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
class InfoConfig(Common):
    """Say what a store holds."""

    store: Positional[Path]
    """The store."""


@dataclass(frozen=True, kw_only=True)
class VerifyConfig(Common):
    """Check every byte of a store against its manifest."""

    store: Positional[Path]
    """The store."""


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """The shape of an expression model. Saved as config.json beside its weights."""

    vocabulary_size: int
    """Tokens in the vocabulary, specials included."""
    structure: Literal["transformer"] = "transformer"
    """The encoder."""
    width: int = 256
    """Width of the embedding and of the encoder."""
    layers: int = 6
    """Encoder layers."""
    heads: int = 8
    """Attention heads."""
    dropout: float = 0.15
    """Dropout at the attention output, inside the feed-forward network and at its output."""
    mvc: bool = True
    """Train the MVC head (masked values from the cell embedding) beside the regression head."""
    pooling: Literal["cls", "avg"] = "cls"
    """What a cell's embedding is: the <cls> token, or the mean over the cell's genes."""
    max_genes: int = 512
    """Genes a cell that the model was trained on; longer cells are sampled."""

    def __post_init__(self) -> None:
        for name, value in [("--width", self.width), ("--layers", self.layers), ("--heads", self.heads),
                            ("--max-genes", self.max_genes), ("vocabulary_size", self.vocabulary_size)]:
            if value < 1:
                raise UserError(f"{name} is {value}: it must be at least 1.")
        if self.structure not in ("transformer",):
            raise UserError(f"unknown structure {self.structure!r}: choose transformer.")
        if self.width % self.heads:
            raise UserError(f"--width {self.width} is not divisible by --heads {self.heads}: change one of them.")
        if not 0 <= self.dropout < 1:
            raise UserError(f"--dropout is {self.dropout}: it must be in [0, 1).")


@dataclass(frozen=True, kw_only=True)
class PretrainConfig(Common):
    """Pretrain a model on a store. Runs alone, or under torchrun, srun or deepspeed."""

    store: Positional[Path]
    """The store made by `scbench prepare`."""
    output: Output
    """The run directory to make."""
    structure: Literal["transformer"] = "transformer"
    """The encoder."""
    width: int = 256
    """Width of the model."""
    layers: int = 6
    """Encoder layers."""
    heads: int = 8
    """Attention heads."""
    dropout: float = 0.15
    """Dropout probability."""
    mvc: bool = True
    """Train the MVC head too."""
    pooling: Literal["cls", "avg"] = "cls"
    """Cell embedding: the <cls> token or the mean over genes."""
    max_genes: int = 512
    """Genes a cell; longer cells are sampled anew each time they are drawn."""
    mask_ratio: float = 0.4
    """Probability that a gene's value is masked."""
    weighted_sampling: bool = True
    """Draw half of the long cells with probability proportional to log1p(count) (else all uniformly)."""
    batch_cells: int = 128
    """Cells a step, over all ranks."""
    micro_batch_cells: int | None = None
    """Cells a rank handles at once; the rest is accumulated. By default its whole share of the batch."""
    steps: int | None = None
    """Optimizer steps; excludes --epochs."""
    epochs: float | None = None
    """Passes over the training split; excludes --steps. One pass by default."""
    optimizer: Literal["adamw", "adam", "sgd"] = "adamw"
    """Optimizer."""
    lr: float = 2e-4
    """Peak learning rate."""
    warmup_steps: int | None = None
    """Linear warm-up; by default min(10,000, a tenth of the steps)."""
    clip: float = 1.0
    """Clip the gradient's norm to this; 0 switches clipping off."""
    precision: Literal["bf16", "fp32"] = "bf16"
    """bf16 weights with fp32 master weights and accumulation, or fp32 throughout."""
    deepspeed: str = "zero1"
    """zero0 … zero3 (the files that scbench ships), or a DeepSpeed JSON file."""
    checkpoint_every: int = 1000
    """Steps between checkpoints (one is always written at the end)."""
    keep_last: int = 2
    """Checkpoints to keep."""
    validate_every: int = 500
    """Steps between validations (one is always made at the end)."""
    validation_cells: int = 4096
    """Cells of the validation split to validate on (the first ones: the store is shuffled)."""
    resume: bool = False
    """Go on from the newest checkpoint in --output; starts anew if there is none."""
    lanes: int | None = None
    """Extents that are read side by side and mixed; by default min(64, extents, batch)."""

    def __post_init__(self) -> None:
        positive = {"--batch-cells": self.batch_cells, "--checkpoint-every": self.checkpoint_every,
                    "--keep-last": self.keep_last, "--validate-every": self.validate_every,
                    "--validation-cells": self.validation_cells}
        optional = {"--micro-batch-cells": self.micro_batch_cells, "--steps": self.steps, "--lanes": self.lanes}
        for name, value in {**positive, **{k: v for k, v in optional.items() if v is not None}}.items():
            if value < 1:
                raise UserError(f"{name} is {value}: it must be at least 1.")
        if self.steps is not None and self.epochs is not None:
            raise UserError("--steps and --epochs exclude each other: give one of them.")
        if self.epochs is not None and self.epochs <= 0:
            raise UserError(f"--epochs is {self.epochs}: it must be positive.")
        if not 0 < self.mask_ratio < 1:
            raise UserError(f"--mask-ratio is {self.mask_ratio}: it must be between 0 and 1.")
        if self.lr <= 0:
            raise UserError(f"--lr is {self.lr}: it must be positive.")
        if self.clip < 0:
            raise UserError(f"--clip is {self.clip}: it must not be negative (0 switches clipping off).")
        if self.warmup_steps is not None and self.warmup_steps < 0:
            raise UserError(f"--warmup-steps is {self.warmup_steps}: it must not be negative.")
        self.model(vocabulary_size=1)  # the model's own checks, before any data is read

    def model(self, vocabulary_size: int) -> ModelConfig:
        """The shape of the model that this run trains."""
        return ModelConfig(
            vocabulary_size=vocabulary_size, structure=self.structure, width=self.width, layers=self.layers,
            heads=self.heads, dropout=self.dropout, mvc=self.mvc, pooling=self.pooling, max_genes=self.max_genes,
        )


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
    draws: int = 4
    """Gene subsets averaged for a cell with more genes than the model was trained on."""
    batch_cells: int = 64
    """Cells at once."""

    def __post_init__(self) -> None:
        for name, value in [("--draws", self.draws), ("--batch-cells", self.batch_cells)]:
            if value < 1:
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
    allow_overlap: bool = False
    """Keep cells that the model was trained on; every row of the table is then marked "transductive"."""

    def __post_init__(self) -> None:
        for name, value, least in [("--seeds", self.seeds, 1), ("--folds", self.folds, 2)]:
            if value < least:
                raise UserError(f"{name} is {value}: it must be at least {least}.")


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
