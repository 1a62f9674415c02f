"""Options of plan."""

import re
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Literal

from tyro.conf import Positional

from scbench.config.common import Common
from scbench.config.model import ALIASES, ModelConfig, Structure
from scbench.errors import UserError

GpuName = Literal["h200", "h100", "h100-pcie", "a100", "a100-40gb", "l40s", "a40", "a6000", "a30", "a10", "l4"]
UNITS = {"": 1.0, "MB": 1e6, "GB": 1e9, "TB": 1e12, "MIB": 2.0**20, "GIB": 2.0**30, "TIB": 2.0**40}


@dataclass(frozen=True, kw_only=True)
class PlanConfig(Common):
    """Say whether a model fits, how fast it would train, and which command to run. Nothing is trained and no GPU is needed."""

    store: Positional[Path | None] = None
    """A store: its vocabulary, its cells' lengths and how many there are."""
    structure: Structure = "transformer"
    """The encoder."""
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
    max_genes: int = 512
    """Genes a cell at most."""
    mean_genes: float | None = None
    """Genes a cell on average, without a store; by default --max-genes."""
    vocabulary_size: int = 60_697
    """Tokens of the vocabulary, without a store."""
    mask_ratio: float = 0.4
    """Probability that a gene's value is masked."""
    batch_cells: int = 128
    """Cells a step, over all ranks."""
    micro_batch_cells: int | None = None
    """Cells a rank handles at once; by default the most that fit."""
    precision: Literal["bf16", "fp32"] | None = None
    """By default the faster one that fits."""
    deepspeed: Literal["zero0", "zero1", "zero2", "zero3", "zero2_offload", "zero3_offload"] | None = None
    """The stage; by default the fastest that fits."""
    gpus: int = 1
    """GPUs, one rank each, of one host; 0: one process on the CPU."""
    gpu: GpuName = "h100"
    """The kind of GPU."""
    gpu_memory: str | None = None
    """Memory of a GPU, like 40GB or 24GiB; by default the kind's. With --gpus 0: of the host; by default what is free here."""
    cells: float | None = None
    """Cells to train on in all; by default one pass over the store's, or ten million."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "structure", ALIASES.get(self.structure, self.structure))  # frozen: written once, here
        for name, value in [("--batch-cells", self.batch_cells), ("--micro-batch-cells", self.micro_batch_cells)]:
            if value is not None and value < 1:
                raise UserError(f"{name} is {value}: it must be at least 1.")
        if self.gpus < 0:
            raise UserError(f"--gpus is {self.gpus}: give 0 for the CPU, or how many there are.")
        if self.batch_cells < self.gpus:
            raise UserError(f"--batch-cells {self.batch_cells} is less than one cell for each of the {self.gpus} GPUs.")
        if self.gpus == 0 and (self.deepspeed or "").endswith("offload"):
            raise UserError(f"--deepspeed {self.deepspeed} does not go with --gpus 0: there the state is in the host's memory "
                            "anyway.")
        if self.mean_genes is not None and not 1 <= self.mean_genes <= self.max_genes:
            raise UserError(f"--mean-genes {self.mean_genes:g} must be between 1 and --max-genes {self.max_genes}.")
        if self.mean_genes is not None and self.store is not None:
            raise UserError("--mean-genes is what the store says: leave one of them out.")
        if not 0 < self.mask_ratio < 1:
            raise UserError(f"--mask-ratio is {self.mask_ratio}: it must be between 0 and 1.")
        if self.cells is not None and self.cells <= 0:
            raise UserError(f"--cells is {self.cells:g}: it must be positive.")
        self.memory_bytes()
        self.model(self.vocabulary_size)  # its own checks

    @property
    def world(self) -> int:
        """Ranks."""
        return max(1, self.gpus)

    def memory_bytes(self) -> float | None:
        """--gpu-memory in bytes; None if it is not given."""
        if self.gpu_memory is None:
            return None
        match = re.fullmatch(r"([0-9]+(?:\.[0-9]+)?)\s*([A-Za-z]*)", self.gpu_memory.strip())
        if match is None or match[2].upper() not in UNITS or float(match[1]) == 0:
            raise UserError(f"--gpu-memory {self.gpu_memory!r} is no amount of memory: write it like 80GB or 24GiB.")
        return float(match[1]) * UNITS[match[2].upper()]

    def model(self, vocabulary_size: int) -> ModelConfig:
        """The shape of the model."""
        names = {field.name for field in fields(ModelConfig)} & {field.name for field in fields(self)} - {"vocabulary_size"}
        return ModelConfig(vocabulary_size=vocabulary_size, **{name: getattr(self, name) for name in names})
