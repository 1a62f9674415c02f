"""Options of pretraining, and the two recipes."""

from dataclasses import dataclass, fields
from pathlib import Path
from typing import Literal

from tyro.conf import Positional

from scbench.config.common import Common, Output
from scbench.config.duration import seconds
from scbench.config.model import ALIASES, ModelConfig, Recipe, Structure
from scbench.errors import UserError

RECIPES = {  # what an option is when it is not given
    "default": {"optimizer": "adamw", "clip": 1.0, "precision": "bf16", "epochs": 1.0},
    "aaai2025": {"optimizer": "adam", "clip": 0.0, "precision": "fp32", "epochs": 10.0, "warmup_steps": 10_000},
}


@dataclass(frozen=True, kw_only=True)
class PretrainConfig(Common):
    """Pretrain a model on a store. Runs alone, or under torchrun, srun or deepspeed."""

    store: Positional[Path]
    """The store made by `scbench prepare`."""
    stage_to: Path | None = None
    """Copy the store into this directory of a local disk first (once a node) and read it there."""
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
    """zero0 … zero3, zero2_offload, zero3_offload (the files that scbench ships), or a DeepSpeed JSON file."""
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
    time_limit: str | None = None
    """Save and leave in time (exit code 75) before the process is so old: 3h50m, 90m, seconds."""
    timeout: str = "30m"
    """How long a rank waits for the others before the run ends."""
    peak_tflops: float | None = None
    """The device's best rate, of which MFU is a share; by default from NVIDIA's data sheets."""
    lanes: int | None = None
    """Extents that are read side by side and mixed; by default min(64, extents, batch)."""
    loader_workers: int = 0
    """Processes a rank that read and draw cells; 0: threads of the rank do it. They change no batch."""

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
        if self.loader_workers < 0:
            raise UserError(f"--loader-workers is {self.loader_workers}: it must not be negative.")
        if self.epochs is not None and self.epochs <= 0:
            raise UserError(f"--epochs is {self.epochs}: it must be positive.")
        if not 0 < self.mask_ratio < 1:
            raise UserError(f"--mask-ratio is {self.mask_ratio}: it must be between 0 and 1.")
        if not 0 < self.data_share <= 1:
            raise UserError(f"--data-share is {self.data_share}: it must be over 0 and at most 1.")
        if self.lr <= 0:
            raise UserError(f"--lr is {self.lr}: it must be positive.")
        if self.peak_tflops is not None and self.peak_tflops <= 0:
            raise UserError(f"--peak-tflops is {self.peak_tflops}: it must be positive.")
        seconds("--timeout", self.timeout)
        if self.time_limit is not None:
            seconds("--time-limit", self.time_limit)
        if self.clip < 0:
            raise UserError(f"--clip is {self.clip}: it must not be negative (0 switches clipping off).")
        if self.warmup_steps is not None and self.warmup_steps < 0:
            raise UserError(f"--warmup-steps is {self.warmup_steps}: it must not be negative.")
        self.model(vocabulary_size=1).check_trainable()  # the model's own checks, before any data is read
        if self.structure == "linear_mixer" and (self.validation_max_genes or 0) > self.max_genes:
            raise UserError(f"--validation-max-genes {self.validation_max_genes} is over --max-genes {self.max_genes}: "
                            "linear_mixer has weights for the trained length only.")

    @property
    def time_limit_seconds(self) -> float | None:
        """--time-limit in seconds."""
        return None if self.time_limit is None else seconds("--time-limit", self.time_limit)

    @property
    def timeout_seconds(self) -> float:
        """--timeout in seconds."""
        return seconds("--timeout", self.timeout)

    def model(self, vocabulary_size: int) -> ModelConfig:
        """The shape of the model that this run trains."""
        shared = {field.name: getattr(self, field.name) for field in fields(ModelConfig) if field.name != "vocabulary_size"}
        return ModelConfig(vocabulary_size=vocabulary_size, **shared)
