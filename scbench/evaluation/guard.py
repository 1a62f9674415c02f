"""What a model knows of the cells of a file: which it was trained on, and which of their genes and counts it reads."""

from typing import NamedTuple

import numpy as np

from scbench.data.gene_identity import GeneMap, map_genes
from scbench.data.sources.anndata import AnnDataSource
from scbench.errors import UserError
from scbench.evaluation import embed, leakage
from scbench.evaluation.progress import progress_bar
from scbench.models.model import ExpressionModel

UNSEEN, TRANSDUCTIVE, NOT_CHECKABLE = "unseen", "transductive", "not checkable"


class Guarded(NamedTuple):
    """What the leakage guard says of a model and a file."""

    cells: np.ndarray  # bool [cells of the file]: to be left out, for the model was trained or validated on them
    overlap: str  # UNSEEN, TRANSDUCTIVE or NOT_CHECKABLE
    seen: dict[str, int]  # cells that it was trained or validated on, by the guard's stage

    def sentences(self, model: str = "the model") -> list[str]:
        """The same in plain words; `model` names it."""
        said = []
        if sum(self.seen.values()):
            said.append(f"Known from training of {model}: {_by_stage(self.seen)}.")
        unasked = [stage for stage in (leakage.CORE, leakage.GENE_SET) if stage not in self.seen]
        if self.seen and unasked:
            said.append(f"The leakage guard's stages {', '.join(unasked)} cannot be asked about this file and {model}: copies "
                        "that only they know would not be found.")
        if self.overlap == TRANSDUCTIVE:
            said.append(f"Transductive: cells that {model} may have been trained on were kept.")
        elif self.overlap == NOT_CHECKABLE:
            said.append(f"Nothing says which cells {model} was trained on: whether these are new to it cannot be checked.")
        return said


def guard(
    model: ExpressionModel, source: AnnDataSource, labelled: np.ndarray | None = None, called: str = "the model", *,
    max_overlap: float, allow_overlap: bool, progress: bool,
) -> Guarded:
    """Which cells of an open source a model has seen; UserError if that is too large a share of them.

    `labelled`: bool [cells of the file], those that count; all by default. `called`: the model in the message.
    """
    found = leakage.find_seen_cells(model, source, progress=progress)
    seen = found.counts() if labelled is None else found.counts(labelled)
    asked = source.n_cells if labelled is None else int(labelled.sum())
    total = sum(seen.values())
    if not allow_overlap and total > max_overlap * asked:
        raise UserError(
            f"{source.name}: {called} was trained or validated on {total:,} of the {asked:,} "
            f"{'' if labelled is None else 'labelled '}cells ({_by_stage(seen)}), {total / asked:.1%}, and {max_overlap:.1%} "
            "are allowed: give other cells, --max-overlap 1 to leave these out, or --allow-overlap to keep them."
        )
    overlap = TRANSDUCTIVE if allow_overlap else UNSEEN if found.checked else NOT_CHECKABLE
    return Guarded(np.zeros_like(found.seen) if allow_overlap else found.seen, overlap, seen)


def match(model: ExpressionModel, source: AnnDataSource, progress: bool) -> tuple[GeneMap, dict]:
    """Which genes and counts of an open source a model knows, the latter JSON-able; UserError if it knows too few."""
    gene_map = map_genes(source.identity, model.vocabulary, source.name)
    with progress_bar("checking the counts", source.n_cells, progress) as advance:
        return gene_map, embed.match_counts(source, gene_map, advance)


def _by_stage(seen: dict[str, int]) -> str:
    return ", ".join(f"{cells:,} by {stage}" for stage, cells in seen.items() if cells)
