"""The models of a table by name, each with its pretraining seeds, and which cells of a file they have seen."""

import re
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from typing import NamedTuple

import numpy as np

from scbench.data.cells import CellTokens
from scbench.data.gene_identity import GeneMap
from scbench.data.sources.anndata import AnnDataSource
from scbench.data.vocabulary import Vocabulary
from scbench.errors import UserError
from scbench.evaluation import embed
from scbench.evaluation.external import ExternalEmbedding
from scbench.evaluation.guard import NOT_CHECKABLE, TRANSDUCTIVE, UNSEEN, Guarded, guard, match
from scbench.evaluation.predictions_files import ExternalPredictions
from scbench.evaluation.progress import progress_bar
from scbench.kernels import random
from scbench.models.model import ExpressionModel

MODEL, UNTRAINED = "trained model", "untrained model"
Model = ExpressionModel | ExternalEmbedding | ExternalPredictions
Models = Mapping[str, Sequence[Model]]  # by name, each with its pretraining seeds
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


class Checked(NamedTuple):
    """What the leakage guard and the vocabularies say of a file, for all models."""

    guards: dict[str, Guarded]  # by the member's name
    overlap: dict[str, str]  # by the entrant's name
    gene_maps: dict[str, GeneMap]  # by the fingerprint of the vocabulary
    details: dict[str, list[dict]]  # by the entrant's name, one a member, JSON-able

    @property
    def seen(self) -> np.ndarray:
        """bool [cells of the file]: to be left out, for some model was trained or validated on them."""
        return np.any([guarded.cells for guarded in self.guards.values()], axis=0)


def entrants_of(models: Models | Model, reserved: Collection[str]) -> list[Entrant]:
    """The models by name; one that is given alone is called "trained model", or by its own name if it is not ours.
    UserError if there is none, or if one bears the name of another row; `reserved`: regular expressions of these."""
    if not isinstance(models, Mapping):
        models = {MODEL if isinstance(models, ExpressionModel) else models.name: [models]}
    if not models:
        raise UserError("no model is given: give at least one.")
    found = []
    for name, seeds in models.items():
        if any(re.fullmatch(pattern, name) for pattern in reserved):
            raise UserError(f"a model cannot be called {name!r}, as another row of the table is: give it another name.")
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


def embed_all(
    entrants: list[Entrant], tokens_on: Callable[[Vocabulary], tuple[CellTokens, np.ndarray]], seed: int, progress: bool
) -> dict[str, np.ndarray]:
    """Embeddings of cells, float32 [cells, D], by each of our networks under the member's name, and by an untrained twin
    beside each model of ours. `tokens_on`: the cells on a vocabulary, and their content hashes there."""
    networks = networks_of(entrants)
    networks |= {
        untrained_name(entrant.name): untrained_twin(entrant.network, seed) for entrant in entrants
        if entrant.network is not None
    }
    tokens, found = {}, {}
    for name, network in networks.items():
        vocabulary = network.vocabulary.fingerprint
        if vocabulary not in tokens:
            tokens[vocabulary] = tokens_on(network.vocabulary)
        cells, hashes = tokens[vocabulary]
        with progress_bar(f"embedding, {name}", len(hashes), progress) as advance:
            found[name] = embed.encode(network, cells, hashes, seed=seed, advance=advance)
    return found


def check(
    entrants: list[Entrant], source: AnnDataSource, labelled: np.ndarray | None = None, *, max_overlap: float,
    allow_overlap: bool, progress: bool,
) -> Checked:
    """What all models know of an open source; parameters and errors as of `guard` and `match`."""
    guards, overlap, maps, matchings, details = {}, {}, {}, {}, {}
    options = {"max_overlap": max_overlap, "allow_overlap": allow_overlap, "progress": progress}
    for entrant in entrants:
        details[entrant.name] = []
        for name, model in entrant.members:
            guards[name], known = Guarded(np.zeros(source.n_cells, dtype=bool), NOT_CHECKABLE, {}), {}
            if isinstance(model, ExpressionModel):
                vocabulary = model.vocabulary.fingerprint
                if vocabulary not in maps:
                    maps[vocabulary], matchings[vocabulary] = match(model, source, progress)
                guards[name] = guard(model, source, labelled, called(entrant, entrants), **options)
                known = {"fingerprint": embed.fingerprint(model), "gene_matching": matchings[vocabulary]}
            details[entrant.name].append(
                {"provenance": model.provenance, "overlap": guards[name].overlap, "seen": guards[name].seen} | known
            )
        said = {guards[member.name].overlap for member in entrant.members}
        overlap[entrant.name] = next((one for one in (NOT_CHECKABLE, TRANSDUCTIVE) if one in said), UNSEEN)
    return Checked(guards, overlap, maps, details)


def called(entrant: Entrant, entrants: list[Entrant]) -> str:
    """An entrant in a message."""
    return "the model" if len(entrants) == 1 else entrant.name
