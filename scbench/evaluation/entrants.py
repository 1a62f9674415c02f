"""The models of a table by name, each with its pretraining seeds, and which cells of a file they have seen."""

from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import NamedTuple

import numpy as np

from scbench.data.gene_identity import GeneMap, map_genes
from scbench.data.sources.anndata import AnnDataSource
from scbench.errors import UserError
from scbench.evaluation import embed, leakage
from scbench.evaluation.external import ExternalEmbedding
from scbench.evaluation.labelled_cells import NOT_CHECKABLE, TRANSDUCTIVE, UNSEEN
from scbench.evaluation.predictions_files import ExternalPredictions
from scbench.evaluation.progress import progress_bar
from scbench.kernels import random
from scbench.models.model import ExpressionModel

MODEL, UNTRAINED = "trained model", "untrained model"
Model = ExpressionModel | ExternalEmbedding | ExternalPredictions
_UNTRAINED = 2  # what a key of Stream.EVALUATION decides, beside those of scores.py


class Member(NamedTuple):
    """One pretraining seed of a model."""

    name: str  # distinct in the table
    model: Model


class Entrant(NamedTuple):
    """A model of the table, with all its pretraining seeds."""

    name: str
    members: tuple[Member, ...]

    @property
    def predicts(self) -> bool:
        """Whether it brings predictions rather than an embedding."""
        return isinstance(self.members[0].model, ExternalPredictions)

    @property
    def network(self) -> ExpressionModel | None:
        """The first seed's, if it is one of ours."""
        return self.members[0].model if isinstance(self.members[0].model, ExpressionModel) else None


class Guarded(NamedTuple):
    """What the leakage guard and the vocabularies say of a file, for all models."""

    seen: np.ndarray  # bool [cells of the file], some model was trained or validated on it
    overlap: dict[str, str]  # by the entrant's name
    gene_maps: dict[str, GeneMap]  # by the fingerprint of the vocabulary
    details: dict[str, dict]  # by the member's name, JSON-able


def entrants_of(models: Mapping[str, Sequence[Model]] | Model, reserved: Collection[str]) -> list[Entrant]:
    """The models by name; one that is given alone is called "trained model", or by its own name if it is not ours.
    UserError if one bears a name of `reserved`, those of the other rows."""
    if not isinstance(models, Mapping):
        models = {MODEL if isinstance(models, ExpressionModel) else models.name: [models]}
    found = []
    for name, seeds in models.items():
        if name in reserved:
            raise UserError(f"a model is called {name!r}, as a row of the table already is: give it another name.")
        names = [name] if len(seeds) == 1 else [f"{name}, pretraining seed {number}" for number in range(1, len(seeds) + 1)]
        found.append(Entrant(name, tuple(map(Member, names, seeds))))
    return found


def networks_of(entrants: Iterable[Entrant]) -> dict[str, ExpressionModel]:
    """All our networks by the member's name."""
    return {
        member.name: member.model for entrant in entrants for member in entrant.members
        if isinstance(member.model, ExpressionModel)
    }


def untrained_name(model: str) -> str:
    """What the untrained twin of a model is called."""
    return UNTRAINED if model == MODEL else f"{model}, {UNTRAINED}"


def untrained_twin(model: ExpressionModel, seed: int) -> ExpressionModel:
    """A model of the same shape with the weights that a training starts from, on the same device."""
    twin = ExpressionModel(model.config, model.vocabulary, random.key(seed, random.Stream.EVALUATION, _UNTRAINED) >> 1)
    return twin.to(embed.device_of(model))


def guard(
    entrants: list[Entrant], source: AnnDataSource, max_overlap: float, allow_overlap: bool, progress: bool
) -> Guarded:
    """Which cells a model has seen, and whether the file's genes are the models'; UserError if it has seen too many, or if
    they are not."""
    seen, maps, matching, details = np.zeros(source.n_cells, dtype=bool), {}, {}, {}
    checked: dict[str, bool] = {}
    for entrant in entrants:
        checked[entrant.name] = entrant.network is not None
        for name, model in entrant.members:
            if not isinstance(model, ExpressionModel):
                details[name] = {"provenance": model.provenance}
                continue
            vocabulary = model.vocabulary.fingerprint
            if vocabulary not in maps:
                maps[vocabulary] = map_genes(source.identity, model.vocabulary, source.name)
                with progress_bar("checking the counts", source.n_cells, progress) as advance:
                    matching[vocabulary] = embed.match_counts(source, maps[vocabulary], advance)
            found = leakage.find_seen_cells(model, source, progress=progress)
            if not allow_overlap and found.seen.mean() > max_overlap:
                raise UserError(
                    f"{source.name}: {called(entrant, entrants)} was trained or validated on {found.seen.sum():,} of its "
                    f"{source.n_cells:,} cells, and {max_overlap:.1%} are allowed: give other cells, --max-overlap 1 to leave "
                    "these out, or --allow-overlap to keep them."
                )
            seen |= found.seen
            checked[entrant.name] &= bool(found.checked)
            details[name] = {
                "fingerprint": embed.fingerprint(model), "provenance": model.provenance,
                "gene_matching": matching[vocabulary], "seen": found.counts(),
            }
    overlap = {name: TRANSDUCTIVE if allow_overlap else UNSEEN if known else NOT_CHECKABLE for name, known in checked.items()}
    return Guarded(seen, overlap, maps, details)


def called(entrant: Entrant, entrants: list[Entrant]) -> str:
    """An entrant in a message."""
    return "the model" if len(entrants) == 1 else entrant.name
