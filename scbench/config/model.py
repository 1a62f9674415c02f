"""The shape of a model, how cells become its inputs, and the options of import-reference."""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal, NamedTuple

from tyro.conf import Positional

from scbench.config.common import Common, Output
from scbench.errors import UserError

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
