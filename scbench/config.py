"""The options of every verb, as dataclasses: the command line, the Python functions and the files of a run share them.

Nothing here imports torch, so `scbench --help` answers at once.
"""

from dataclasses import dataclass, fields
from pathlib import Path
from typing import Annotated, Literal, NamedTuple

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
    """h5ad files with raw counts, or the reference's parquet files or directories of them."""
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


STRUCTURES = ("transformer", "cnn", "cnn_sorted", "linear", "linear_mixer", "mamba", "gnn")
ALIASES = {"transformer_ours": "transformer", "cnn_base": "cnn", "cnn_ours": "cnn_sorted", "linear_base": "linear",
           "linear_ours": "linear_mixer", "gnn_cp": "gnn"}  # the reference's names
OWN_POOLING = ("cnn", "cnn_sorted", "linear_mixer")  # these end in one state a cell: no tokens are left to pool or regress on
DEFAULT_POOLING = {"linear": "avg", "mamba": "avg", **dict.fromkeys(OWN_POOLING, "own")}  # else cls
BLIND_CLS = {  # why the <cls> token of a structure is the same for every cell
    "linear": "no token sees another",
    "mamba": "<cls> stands first in a causal scan and sees no gene",
}
Structure = Literal["transformer", "cnn", "cnn_sorted", "linear", "linear_mixer", "mamba", "gnn", "transformer_ours",
                    "cnn_base", "cnn_ours", "linear_base", "linear_ours", "gnn_cp"]
Recipe = Literal["default", "aaai2025"]


class InputLaw(NamedTuple):
    """How a cell's counts become a model's input: part of the model, for training and ever after."""

    max_genes: int
    """Genes of a cell; longer cells are sampled."""
    preprocess: str = "log1p"
    """log1p, bin, or bin_aaai2025 (the reference's bins: pads enter the quantiles, ties are spread at random)."""
    normalize: str = "none"
    """none, or total: counts per 10,000 before the logarithm."""
    order: str = "ascending"
    """Order of a cell's tokens: ascending (by id), random, or drawn (as the reference's sampling leaves them)."""
    pad_to: int | None = None
    """Genes that every cell is padded to, as in the reference; None: no padding."""

    def with_max_genes(self, max_genes: int) -> "InputLaw":
        """The same for cells of so many genes; no cell is padded to less than before."""
        return self._replace(max_genes=max_genes, pad_to=self.pad_to and max(max_genes, self.pad_to))


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """The shape of an expression model. Saved as config.json beside its weights."""

    vocabulary_size: int
    """Tokens in the vocabulary, specials included."""
    structure: Structure = "transformer"
    """The encoder."""
    recipe: Recipe = "default"
    """aaai2025: layers, padding and initialisation of the reference; default: with its defects fixed."""
    width: int = 256
    """Width of the embedding and of the encoder."""
    layers: int = 6
    """Encoder layers."""
    heads: int = 8
    """Attention heads (transformer only)."""
    dropout: float = 0.15
    """Dropout probability inside the encoder."""
    mvc: bool = True
    """Train the MVC head (masked values from the cell embedding) beside the regression head."""
    pooling: Literal["cls", "avg", "own"] | None = None
    """What a cell's embedding is: the <cls> token, the mean over the cell's genes, or what the structure ends in (own)."""
    max_genes: int = 512
    """Genes a cell that the model was trained on; longer cells are sampled."""
    preprocess: Literal["log1p", "bin"] = "log1p"
    """Values are log1p of counts, or a cell's own quantile bins 1 … 50."""
    normalize: Literal["none", "total"] = "none"
    """total: log1p of counts per 10,000 instead of counts."""
    library_size_offset: bool = False
    """Tell the heads a cell's total count, so that its embedding need not."""

    def __post_init__(self) -> None:
        for name, value in [("--width", self.width), ("--layers", self.layers), ("--heads", self.heads),
                            ("--max-genes", self.max_genes), ("vocabulary_size", self.vocabulary_size)]:
            if value < 1:
                raise UserError(f"{name} is {value}: it must be at least 1.")
        structure = ALIASES.get(self.structure, self.structure)
        if structure not in STRUCTURES:
            raise UserError(f"unknown structure {structure!r}: choose one of {', '.join(STRUCTURES)}.")
        pooling = self.pooling or DEFAULT_POOLING.get(structure, "cls")
        object.__setattr__(self, "structure", structure)  # frozen: written once, here
        object.__setattr__(self, "pooling", pooling)
        if not 0 <= self.dropout < 1:
            raise UserError(f"--dropout is {self.dropout}: it must be in [0, 1).")
        if structure == "transformer" and self.width % self.heads:
            raise UserError(f"--width {self.width} is not divisible by --heads {self.heads}: change one of them.")
        if (structure in OWN_POOLING) != (pooling == "own"):
            how = "pools by itself: leave it out" if structure in OWN_POOLING else "keeps its tokens: choose cls or avg"
            raise UserError(f"--pooling {pooling} does not go with --structure {structure}, which {how}.")
        if structure in OWN_POOLING and not self.mvc:
            raise UserError(f"--structure {structure} keeps no tokens to regress on, so without MVC nothing would be trained: "
                            "leave --no-mvc out.")
        if structure in BLIND_CLS and pooling == "cls" and self.recipe == "default":
            self._refuse_blind_cls()
        if self.normalize == "total" and self.preprocess == "bin":
            raise UserError("--normalize total does not go with --preprocess bin: bins are ranks inside a cell, "
                            "whatever its total; leave one of them out.")
        if self.recipe == "aaai2025" and (self.normalize != "none" or self.library_size_offset):
            option = "--library-size-offset" if self.library_size_offset else f"--normalize {self.normalize}"
            raise UserError(f"{option} is not part of --recipe aaai2025: leave one of them out.")

    def _refuse_blind_cls(self) -> None:
        raise UserError(f"--pooling cls does not go with --structure {self.structure}: {BLIND_CLS[self.structure]}, "
                        "so all cells would share one embedding; use --pooling avg.")

    def check_trainable(self) -> None:
        """UserError for a model that can be loaded and used, but could not learn (the reference has such checkpoints)."""
        if self.structure in BLIND_CLS and self.pooling == "cls":
            self._refuse_blind_cls()

    @property
    def regression(self) -> bool:
        """Whether there is a regression head; without one the MVC predictions stand for it."""
        return self.structure not in OWN_POOLING

    @property
    def inputs(self) -> InputLaw:
        """How cells become this model's batches."""
        reference = self.recipe == "aaai2025"
        order = "ascending"
        if reference and self.structure in ("cnn", "linear_mixer", "mamba"):
            order = "drawn"
        elif self.structure == "cnn":
            order = "random"
        preprocess = "bin_aaai2025" if reference and self.preprocess == "bin" else self.preprocess
        return InputLaw(self.max_genes, preprocess, self.normalize, order, self.max_genes if reference else None)


RECIPES = {  # what an option is when it is not given
    "default": {"optimizer": "adamw", "clip": 1.0, "precision": "bf16", "epochs": 1.0},
    "aaai2025": {"optimizer": "adam", "clip": 0.0, "precision": "fp32", "epochs": 10.0, "warmup_steps": 10_000},
}


@dataclass(frozen=True, kw_only=True)
class PretrainConfig(Common):
    """Pretrain a model on a store. Runs alone, or under torchrun, srun or deepspeed."""

    store: Positional[Path]
    """The store made by `scbench prepare`."""
    output: Output
    """The run directory to make."""
    structure: Structure = "transformer"
    """The encoder; the reference's names (transformer_ours, cnn_base, …) mean the same."""
    recipe: Recipe = "default"
    """aaai2025: the reference's choices (layers, padding, order, initialisation, optimizer, schedule, fp32)."""
    width: int = 256
    """Width of the model."""
    layers: int = 6
    """Encoder layers."""
    heads: int = 8
    """Attention heads (transformer only)."""
    dropout: float = 0.15
    """Dropout probability."""
    mvc: bool = True
    """Train the MVC head too."""
    pooling: Literal["cls", "avg", "own"] | None = None
    """Cell embedding: the <cls> token or the mean over genes. By default cls; avg for linear and mamba; cnn, cnn_sorted and
    linear_mixer have their own."""
    preprocess: Literal["log1p", "bin"] = "log1p"
    """Values are log1p of counts, or a cell's own quantile bins 1 … 50."""
    normalize: Literal["none", "total"] = "none"
    """total: log1p of counts per 10,000 instead of counts."""
    library_size_offset: bool = False
    """Tell the heads a cell's total count, so that its embedding need not."""
    max_genes: int = 512
    """Genes a cell; longer cells are sampled anew each time they are drawn."""
    validation_max_genes: int | None = None
    """Genes a validation cell; by default as in training."""
    mask_ratio: float = 0.4
    """Probability that a gene's value is masked."""
    weighted_sampling: bool = True
    """Draw half of the long cells with probability proportional to log1p(count) (else all uniformly)."""
    data_share: float = 1.0
    """Share of the training split to train on (its first cells: the store is shuffled)."""
    batch_cells: int = 128
    """Cells a step, over all ranks."""
    micro_batch_cells: int | None = None
    """Cells a rank handles at once; the rest is accumulated. By default its whole share of the batch."""
    steps: int | None = None
    """Optimizer steps; excludes --epochs."""
    epochs: float | None = None
    """Passes over the training split; excludes --steps. By default 1; aaai2025: 10."""
    optimizer: Literal["adamw", "adam", "sgd"] | None = None
    """Optimizer; by default adamw; aaai2025: adam."""
    lr: float = 2e-4
    """Peak learning rate."""
    warmup_steps: int | None = None
    """Linear warm-up; by default min(10,000, a tenth of the steps); aaai2025: 10,000."""
    clip: float | None = None
    """Clip the gradient's norm to this; 0 switches clipping off. By default 1; aaai2025: 0."""
    precision: Literal["bf16", "fp32"] | None = None
    """bf16 weights with fp32 master weights and accumulation, or fp32 throughout. By default bf16; aaai2025: fp32."""
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
        if self.steps is not None and self.epochs is not None:
            raise UserError("--steps and --epochs exclude each other: give one of them.")
        object.__setattr__(self, "structure", ALIASES.get(self.structure, self.structure))
        for name, value in RECIPES[self.recipe].items():
            if getattr(self, name) is None and not (name == "epochs" and self.steps is not None):
                object.__setattr__(self, name, value)  # frozen: written once, here
        positive = {"--batch-cells": self.batch_cells, "--checkpoint-every": self.checkpoint_every,
                    "--keep-last": self.keep_last, "--validate-every": self.validate_every,
                    "--validation-cells": self.validation_cells}
        optional = {"--micro-batch-cells": self.micro_batch_cells, "--steps": self.steps, "--lanes": self.lanes,
                    "--validation-max-genes": self.validation_max_genes}
        for name, value in {**positive, **{k: v for k, v in optional.items() if v is not None}}.items():
            if value < 1:
                raise UserError(f"{name} is {value}: it must be at least 1.")
        if self.epochs is not None and self.epochs <= 0:
            raise UserError(f"--epochs is {self.epochs}: it must be positive.")
        if not 0 < self.mask_ratio < 1:
            raise UserError(f"--mask-ratio is {self.mask_ratio}: it must be between 0 and 1.")
        if not 0 < self.data_share <= 1:
            raise UserError(f"--data-share is {self.data_share}: it must be over 0 and at most 1.")
        if self.lr <= 0:
            raise UserError(f"--lr is {self.lr}: it must be positive.")
        if self.clip < 0:
            raise UserError(f"--clip is {self.clip}: it must not be negative (0 switches clipping off).")
        if self.warmup_steps is not None and self.warmup_steps < 0:
            raise UserError(f"--warmup-steps is {self.warmup_steps}: it must not be negative.")
        self.model(vocabulary_size=1).check_trainable()  # the model's own checks, before any data is read
        if self.structure == "linear_mixer" and (self.validation_max_genes or 0) > self.max_genes:
            raise UserError(f"--validation-max-genes {self.validation_max_genes} is over --max-genes {self.max_genes}: "
                            "linear_mixer has weights for the trained length only.")

    def model(self, vocabulary_size: int) -> ModelConfig:
        """The shape of the model that this run trains."""
        shared = {field.name: getattr(self, field.name) for field in fields(ModelConfig) if field.name != "vocabulary_size"}
        return ModelConfig(vocabulary_size=vocabulary_size, **shared)


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
    allow_overlap: bool = False
    """Keep cells that the model was trained on; every row of the table is then marked "transductive"."""

    def __post_init__(self) -> None:
        for name, value, least in [("--seeds", self.seeds, 1), ("--folds", self.folds, 2)]:
            if value < least:
                raise UserError(f"{name} is {value}: it must be at least {least}.")


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


@dataclass(frozen=True, kw_only=True)
class ImportReferenceConfig(Common):
    """Turn a checkpoint of the reference implementation into a model directory with the same embeddings."""

    checkpoint: Positional[Path]
    """The reference's best_model.pt: a state dict. Nothing in it is executed."""
    structure: Structure
    """What --model_structure was, or scbench's name of it."""
    vocabulary: Path
    """The vocabulary.json {token: id} that it was trained with."""
    output: Output
    """The model directory to make."""
    pooling: Literal["cls", "avg"] | None = None
    """What --cell_emb_style was; by default the structure's own."""
    preprocess: Literal["log1p", "bin"] = "log1p"
    """What --preprocess_mode was."""
    max_genes: int | None = None
    """Genes a cell that it was trained on, <cls> not counted. By default 512; linear_mixer's weights tell."""
    heads: int = 8
    """Attention heads (transformer only): the weights do not tell."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "structure", ALIASES.get(self.structure, self.structure))  # frozen: written once, here


FACTORS = ("weighted-sampling", "mvc", "preprocess", "pooling", "normalize", "library-size-offset", "size", "data-share")


def _parsed(option: str, text: str, kind: type, example: str) -> tuple:
    """The parts of a comma-separated option; UserError unless there is one, each is a `kind`, and none comes twice."""
    try:
        values = tuple(kind(part.strip()) for part in text.split(","))
    except ValueError:
        values = ()
    if not values or len(set(values)) < len(values):
        raise UserError(f"{option} {text!r} is not a list of different values like {example}.")
    return values


def _size(text: str) -> tuple[int, int]:
    layers, width = text.lower().split("x")
    return int(layers), int(width)


@dataclass(frozen=True, kw_only=True)
class CompareConfig(Common):
    """Compare structures, or with --vary options of one structure, under the same loader, objective and budget."""

    store: Positional[Path]
    """The store made by `scbench prepare`; its test split is what is compared on."""
    output: Output
    """Directory of the comparison. The same command goes on where it was stopped."""
    structures: str | None = None
    """The structures, comma-separated; by default all seven."""
    vary: str | None = None
    """Options of one structure instead, all combinations: comma-separated weighted-sampling, mvc, preprocess, pooling,
    normalize, library-size-offset, size, data-share (1, 0.1, 0.01)."""
    structure: Structure | None = None
    """The structure whose options --vary varies; by default transformer."""
    sizes: str = "6x256,12x256,12x512"
    """Layers x width of --vary size."""
    equal_parameters: bool = False
    """Add each structure once more, at as many encoder parameters as the transformer has."""
    budget_tokens: float | None = None
    """Tokens of a run (<cls> counted). One of the three budgets must be given; evaluation does not count."""
    budget_flops: float | None = None
    """Floating-point operations of a run, counted analytically."""
    budget_seconds: float | None = None
    """Seconds of a run, turned into steps by the step time of a short pilot on this machine."""
    seeds: int = 3
    """Training runs of each row: seeds --seed, --seed + 1, …"""
    learning_rates: str = "3e-4,1e-3,3e-3"
    """Rates that each row tries, each on a fifth of the budget with the first seed; one value: no search."""
    label: str | None = None
    """Column that `prepare --keep-obs` kept: probes of the test cells' embeddings predict it."""
    width: int = 256
    """Width of the models."""
    layers: int = 6
    """Encoder layers."""
    heads: int = 8
    """Attention heads (transformer only)."""
    dropout: float = 0.15
    """Dropout probability."""
    max_genes: int = 512
    """Genes a cell, in training and evaluation."""
    batch_cells: int = 128
    """Cells a step."""
    weighted_sampling: bool = True
    """Draw half of the long cells in training with probability proportional to log1p(count) (else all uniformly)."""
    precision: Literal["bf16", "fp32"] = "bf16"
    """Of training."""
    evaluation_cells: int = 4096
    """Cells of the validation and of the test split to evaluate on (the first ones: the store is shuffled)."""

    def __post_init__(self) -> None:
        budgets = [self.budget_tokens, self.budget_flops, self.budget_seconds]
        given = [budget for budget in budgets if budget is not None]
        if len(given) != 1:
            raise UserError("give exactly one of --budget-tokens, --budget-flops and --budget-seconds.")
        if not 0 < given[0] < float("inf"):
            raise UserError(f"the budget is {given[0]}: it must be positive.")
        for name, value in [("--seeds", self.seeds), ("--batch-cells", self.batch_cells),
                            ("--evaluation-cells", self.evaluation_cells)]:
            if value < 1:
                raise UserError(f"{name} is {value}: it must be at least 1.")
        if self.vary is None:
            if self.structure is not None:
                raise UserError("--structure goes with --vary: to compare structures, give --structures.")
        elif self.structures is not None or self.equal_parameters:
            option = "--equal-parameters" if self.structures is None else "--structures"
            raise UserError(f"{option} does not go with --vary, which varies one structure: leave one of them out.")
        if min(self.rates()) <= 0:
            raise UserError(f"--learning-rates {self.learning_rates}: rates must be positive.")
        self.layers_and_widths()
        self.compared()
        self.factors()

    def rates(self) -> tuple[float, ...]:
        """The learning rates to try."""
        return _parsed("--learning-rates", self.learning_rates, float, "3e-4,1e-3")

    def layers_and_widths(self) -> tuple[tuple[int, int], ...]:
        """(layers, width) of each of --sizes, the first being what the others are held against."""
        return _parsed("--sizes", self.sizes, _size, "6x256,12x512")

    def compared(self) -> tuple[str, ...]:
        """The structures that are compared."""
        if self.structures is None:
            return STRUCTURES
        names = _parsed("--structures", self.structures, lambda name: ALIASES.get(name, name), "transformer,linear")
        return _among("--structures", names, STRUCTURES)

    def factors(self) -> tuple[str, ...]:
        """The options that are varied; none if structures are compared."""
        if self.vary is None:
            return ()
        return _among("--vary", _parsed("--vary", self.vary, str, "weighted-sampling,mvc"), FACTORS)


def _among(option: str, names: tuple[str, ...], known: tuple[str, ...]) -> tuple[str, ...]:
    unknown = [name for name in names if name not in known]
    if unknown:
        raise UserError(f"{option}: unknown {', '.join(map(repr, unknown))}: choose among {', '.join(known)}.")
    return names
