"""The options that both benchmarks share."""

import dataclasses
from dataclasses import dataclass
from pathlib import Path

from scbench.config import PretrainConfig
from scbench.errors import UserError

LONGEST = 512  # genes a cell at most, where --genes does not say


@dataclass(frozen=True, kw_only=True)
class Options:
    """Cells, model and steps of a benchmark. The defaults are the goal's shape, but for the cells' lengths (--genes 512)."""

    store: Path | None = None
    """Take cells from the training split of this store; by default they are synthetic."""
    genes: int | None = None
    """Synthetic cells have exactly this many genes (and <cls>), a store's at most; by default lengths vary, up to 512."""
    vocabulary_size: int = 60_697
    """Tokens of the vocabulary (a store brings its own)."""
    batch_cells: int = 32
    """Cells a step."""
    width: int = 256
    """Width of the model."""
    layers: int = 6
    """Encoder layers."""
    heads: int = 8
    """Attention heads."""
    steps: int = 5
    """Timed steps of each implementation."""
    warmup: int = 2
    """Steps before them."""
    seed: int = 0
    """Of the cells and the weights."""
    json: Path | None = None
    """File for the rows; a long CSV is written beside it."""

    def __post_init__(self) -> None:
        for name in ("vocabulary_size", "batch_cells", "steps"):
            if getattr(self, name) < 1:
                raise UserError(f"--{name.replace('_', '-')} is {getattr(self, name)}: it must be at least 1.")
        if self.store is None and not 1 <= self.max_genes <= self.vocabulary_size - 3:
            raise UserError(
                f"--genes {self.max_genes} does not fit a vocabulary of {self.vocabulary_size} tokens, 3 of them special."
            )
        if self.json is not None and self.json.suffix == ".csv":
            raise UserError(f"--json {self.json} would be overwritten by the CSV beside it: name it .json.")

    @property
    def max_genes(self) -> int:
        """Genes a cell at most."""
        return self.genes or LONGEST

    def training(self, *, precision: str, deepspeed: str, dropout: float) -> PretrainConfig:
        """The same as a pretraining run's options; its store and output are never opened."""
        return PretrainConfig(
            store=self.store or Path("synthetic"), output=Path("unused"), width=self.width, layers=self.layers,
            heads=self.heads, dropout=dropout, max_genes=self.max_genes, batch_cells=self.batch_cells, seed=self.seed,
            precision=precision, deepspeed=deepspeed,
        )

    def settings(self) -> dict:
        """What a row says of how it was measured."""
        settings = dataclasses.asdict(self)
        del settings["json"]
        return {**settings, "store": str(self.store) if self.store else "synthetic"}
