"""The rows of a comparison: which options each of them trains with."""

import itertools
from collections.abc import Callable
from typing import NamedTuple

from scbench.config import DEFAULT_POOLING, OWN_POOLING, CompareConfig, ModelConfig, PretrainConfig
from scbench.errors import UserError
from scbench.models.flops import encoder_parameters

MOST_LAYERS = 12  # of a row at equal parameters
WIDTH_STEP = 8
SHARES = (1.0, 0.1, 0.01)  # of the training split; --vary data-share
SWITCH = (("off", False), ("on", True))


class Row(NamedTuple):
    """One line of the table: a structure, or a combination of options."""

    name: str  # also of its directory
    options: dict  # fields of PretrainConfig
    levels: dict[str, str]  # --vary: the level of each factor


class Plan(NamedTuple):
    """What is trained, and what cannot be."""

    rows: list[Row]
    refused: list[dict]  # combinations that make no sense: name, reason


def plan(config: CompareConfig) -> Plan:
    """The rows of `config`; UserError if none of them can be trained."""
    rows = _combinations(config) if config.factors() else _structures(config)
    kept, refused = [], []
    for row in rows:
        try:
            pretrain_options(config, row)
            kept.append(row)
        except UserError as error:
            if not config.factors():
                raise
            refused.append({"name": row.name, "reason": str(error)})
    if not kept:
        raise UserError(f"no combination of --vary {config.vary} can be trained: {refused[0]['reason']}")
    return Plan(kept, refused)


def pretrain_options(config: CompareConfig, row: Row, **options) -> PretrainConfig:
    """What a run of `row` is trained with; UserError if that makes no sense."""
    names = ("width", "layers", "heads", "dropout", "max_genes", "batch_cells", "weighted_sampling", "precision")
    shared = {name: getattr(config, name) for name in names}
    return PretrainConfig(store=config.store, output=config.output, **{**shared, **row.options, **options})


def _structures(config: CompareConfig) -> list[Row]:
    """Average pooling wherever there is a choice, and the structure's own default beside it."""
    rows = []
    for structure in config.compared():
        rows += [_row(structure, pooling) for pooling in _poolings(structure)]
    if config.equal_parameters:
        rows += [row for structure in config.compared() if (row := _equal(config, structure)) is not None]
    return rows


def _poolings(structure: str) -> list[str]:
    if structure in OWN_POOLING:
        return ["own"]
    return ["avg"] if DEFAULT_POOLING.get(structure) == "avg" else ["avg", "cls"]


def _row(structure: str, pooling: str, **shape: int) -> Row:
    name = structure if pooling == "own" else f"{structure}-{pooling}"
    if shape:
        name += "-{layers}x{width}".format(**shape)
    return Row(name, {"structure": structure, "pooling": pooling, **shape}, {})


def _equal(config: CompareConfig, structure: str) -> Row | None:
    """The structure with about as many encoder parameters as the transformer: the number of layers that comes closest at
    the same width, then the closest multiple of 8 for the width. None if that is how it is compared anyway."""
    def parameters(structure: str, layers: int, width: int) -> int:
        return encoder_parameters(ModelConfig(
            vocabulary_size=1, structure=structure, layers=layers, width=width, heads=1, max_genes=config.max_genes,
        ))

    wanted = parameters("transformer", config.layers, config.width)

    def nearest(choices: range, count: Callable[[int], int]) -> int:
        return min(choices, key=lambda choice: abs(count(choice) - wanted))

    layers = nearest(range(1, MOST_LAYERS + 1), lambda layers: parameters(structure, layers, config.width))
    width = config.width
    if parameters(structure, layers, width) != wanted:
        choices = range(WIDTH_STEP, 4 * width + 1, WIDTH_STEP)
        width = nearest(choices, lambda width: parameters(structure, layers, width))
    if (layers, width) == (config.layers, config.width):
        return None
    return _row(structure, _poolings(structure)[0], layers=layers, width=width)


def levels_of(config: CompareConfig, factor: str) -> list[tuple[str, dict]]:
    """The levels of a factor, and the options that each of them sets; the first is what the others are held against."""
    match factor:
        case "weighted-sampling" | "mvc" | "library-size-offset":
            return [(level, {factor.replace("-", "_"): value}) for level, value in SWITCH]
        case "preprocess":
            return [(value, {"preprocess": value}) for value in ("log1p", "bin")]
        case "pooling":
            return [(value, {"pooling": value}) for value in ("cls", "avg")]
        case "normalize":
            return [(value, {"normalize": value}) for value in ("none", "total")]
        case "size":
            return [(f"{layers}x{width}", {"layers": layers, "width": width}) for layers, width in config.layers_and_widths()]
        case "data-share":
            return [(f"{share:g}", {"data_share": share}) for share in SHARES]
    raise ValueError(f"unknown factor {factor!r}")


def _combinations(config: CompareConfig) -> list[Row]:
    """Every combination of the factors' levels."""
    factors = config.factors()
    rows = []
    for chosen in itertools.product(*(levels_of(config, factor) for factor in factors)):
        levels = {factor: level for factor, (level, _) in zip(factors, chosen, strict=True)}
        options = {"structure": config.structure or "transformer"}
        for _, values in chosen:
            options |= values
        rows.append(Row(",".join(f"{factor}={level}" for factor, level in levels.items()), options, levels))
    return rows
