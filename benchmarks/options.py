"""The options that throughput.py and rivals.py share."""

import dataclasses
import itertools
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from scbench.config import STRUCTURES, ModelConfig, PretrainConfig
from scbench.errors import UserError

Structure = Literal["transformer", "cnn", "cnn_sorted", "linear", "linear_mixer", "mamba", "gnn"]
Task = Literal["training", "embedding"]


@dataclass(frozen=True, kw_only=True)
class Common:
    """What all cases of a run have in common."""

    store: Path | None = None
    """Take cells from the training split of this store; by default they are synthetic."""
    median_genes: int | None = None
    """Synthetic cells express about so many genes (log-normal, spread .5), cut at --genes; by default exactly --genes."""
    vocabulary_size: int = 60_697
    """Tokens of the vocabulary (a store brings its own)."""
    heads: int = 8
    """Attention heads (transformer only)."""
    steps: int = 5
    """Timed steps (training) or rounds over the same cells (embedding)."""
    warmup: int = 2
    """Steps or rounds before them."""
    seed: int = 0
    """Of the cells and the weights."""


@dataclass(frozen=True, kw_only=True)
class Options(Common):
    """One case. The defaults are the goal's shape."""

    structure: Structure = "transformer"
    width: int = 256
    layers: int = 6
    genes: int = 512
    """Genes a cell at most; with <cls> one token more."""
    batch_cells: int = 32

    def __post_init__(self) -> None:
        for name in ("vocabulary_size", "batch_cells", "steps", "genes"):
            if getattr(self, name) < 1:
                raise UserError(f"--{name.replace('_', '-')} is {getattr(self, name)}: it must be at least 1.")
        if self.store is None and self.genes > self.vocabulary_size - 3:
            raise UserError(f"--genes {self.genes} does not fit a vocabulary of {self.vocabulary_size} tokens, 3 of them "
                            "special.")
        if self.median_genes is not None and (self.store is not None or self.median_genes < 1):
            raise UserError(f"--median-genes {self.median_genes} is of synthetic cells, at least 1: leave --store out.")

    def training(self, *, precision: str, deepspeed: str, dropout: float) -> PretrainConfig:
        """The same as a pretraining run's options; its store and output are never opened."""
        return PretrainConfig(
            store=self.store or Path("synthetic"), output=Path("unused"), structure=self.structure, width=self.width,
            layers=self.layers, heads=self.heads, dropout=dropout, max_genes=self.genes, batch_cells=self.batch_cells,
            seed=self.seed, precision=precision, deepspeed=deepspeed,
        )

    def model(self, vocabulary_size: int, *, dropout: float = 0.0, recipe: str = "default") -> ModelConfig:
        """The shape of the model."""
        return ModelConfig(
            vocabulary_size=vocabulary_size, structure=self.structure, recipe=recipe, width=self.width, layers=self.layers,
            heads=self.heads, dropout=dropout, max_genes=self.genes,
        )

    def settings(self) -> dict:
        """What a row says of how it was measured."""
        return {**dataclasses.asdict(self), "store": str(self.store) if self.store else "synthetic"}


@dataclass(frozen=True, kw_only=True)
class Sweep(Common):
    """Every combination of the lists is a case."""

    structures: tuple[Structure, ...] = STRUCTURES
    """Which encoders."""
    tasks: tuple[Task, ...] = ("training", "embedding")
    """Training steps, or cell embeddings without gradients."""
    widths: tuple[int, ...] = (256,)
    """Widths of the model."""
    layers: tuple[int, ...] = (6,)
    """Numbers of encoder layers."""
    genes: tuple[int, ...] = (512,)
    """Genes a cell at most; with <cls> one token more."""
    batch_cells: tuple[int, ...] = (32,)
    """Cells a step, over all ranks."""
    json: Path | None = None
    """File for the rows; a long CSV is written beside it."""
    plots: Path | None = None
    """Folder for pictures of the rows."""

    def __post_init__(self) -> None:
        if self.json is not None and self.json.suffix == ".csv":
            raise UserError(f"--json {self.json} would be overwritten by the CSV beside it: name it .json.")

    def cases(self) -> list[Options]:
        """All of them, structure by structure."""
        common = {field.name: getattr(self, field.name) for field in dataclasses.fields(Common)}
        names = ("structure", "width", "layers", "genes", "batch_cells")
        lists = (self.structures, self.widths, self.layers, self.genes, self.batch_cells)
        return [Options(**common, **dict(zip(names, values, strict=True)))
                for values in itertools.product(*map(dict.fromkeys, lists))]
