"""Options of compare."""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from tyro.conf import Positional

from scbench.config.common import Common, Output
from scbench.config.model import ALIASES, STRUCTURES, Structure
from scbench.errors import UserError

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
