"""The models of a table: what each knows of targets, of controls, or has predicted already."""

from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple

import numpy as np

from scbench.data.cells import content_hash, take, to_tokens
from scbench.data.gene_identity import GeneMap, map_genes
from scbench.data.gene_table import gene_table
from scbench.data.sources.anndata import AnnDataSource
from scbench.errors import UserError
from scbench.evaluation import embed, leakage
from scbench.evaluation.external import ExternalEmbedding
from scbench.evaluation.labelled_cells import NOT_CHECKABLE, TRANSDUCTIVE, UNSEEN
from scbench.evaluation.perturbation import features
from scbench.evaluation.perturbation.cells import NAMED
from scbench.evaluation.perturbation.fold import (
    ADDITIVE,
    CONTEXTS,
    LOADINGS,
    MATCHING_MEAN,
    MODEL,
    NO_CHANGE,
    OWN_MEAN,
    PCA_CENTROIDS,
    RANDOM,
    TRAIN_MEAN,
    UNTRAINED,
)
from scbench.evaluation.perturbation.scoring import CEILING
from scbench.evaluation.predictions_files import ExternalPredictions
from scbench.evaluation.progress import progress_bar
from scbench.kernels import random
from scbench.models.model import ExpressionModel

Model = ExpressionModel | ExternalEmbedding | ExternalPredictions
RESERVED = (UNTRAINED, LOADINGS, PCA_CENTROIDS, RANDOM, NO_CHANGE, TRAIN_MEAN, OWN_MEAN, MATCHING_MEAN, ADDITIVE, CEILING)
PREDICTIONS = "predictions"  # the probe of a model that was asked elsewhere
NO_TOKEN, NEVER_SEEN, NO_VECTOR = "no token", "never seen in training", "no embedding"
_UNTRAINED = 17  # what a key of Stream.EVALUATION decides


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


def entrants_of(models: Mapping[str, Sequence[Model]] | Model) -> list[Entrant]:
    """The models by name; one that is given alone is called "trained model", or by its own name if it is not ours."""
    if not isinstance(models, Mapping):
        models = {MODEL if isinstance(models, ExpressionModel) else models.name: [models]}
    found = []
    for name, seeds in models.items():
        if name in RESERVED:
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


def untrained_name(entrant: Entrant) -> str:
    """What the untrained twin of an entrant is called."""
    return UNTRAINED if entrant.name == MODEL else f"{entrant.name}, {UNTRAINED}"


def random_name(width: int, widths: Iterable[int]) -> str:
    """What random vectors of a width are called, among those of all `widths`."""
    return RANDOM if len(set(widths)) == 1 else f"{RANDOM}, D = {width}"


def gene_names(source: AnnDataSource, entrants: list[Entrant]) -> set[str]:
    """All that may be the name of a gene: the file's, the vocabularies', the gene table's."""
    organism = "mouse" if source.identity.organism == "mouse" else "human"
    names = {name for names in (source.identity.ids, source.identity.symbols) for name in names if name}
    return names.union(gene_table(organism).names, *(model.vocabulary.tokens for model in networks_of(entrants).values()))


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
                    f"{source.name}: {_called(entrant, entrants)} was trained or validated on {found.seen.sum():,} of its "
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


class Vectors(NamedTuple):
    """What the models know of targets."""

    by_member: dict[str, dict[str, np.ndarray]]  # float64 [D] of each target
    refusals: dict[str, list[str]]  # the targets that some model cannot use, by reason
    checkable: bool  # whether all models of ours can say which genes they were trained on


def read_vectors(entrants: list[Entrant], targets: list[str], source: str) -> Vectors:
    """The targets' embeddings of all models that don't bring predictions; UserError if one of these has none."""
    found, refusals, checkable = {}, {}, True
    for entrant in entrants:
        for name, model in () if entrant.predicts else entrant.members:
            if isinstance(model, ExpressionModel):
                tokens, trained = features.target_tokens(model, targets), features.trained_tokens(model)
                checkable &= trained is not None
                mine = {
                    NO_TOKEN: set(targets) - set(tokens),
                    NEVER_SEEN: set() if trained is None else {one for one, token in tokens.items() if not trained[token]},
                }
                found[name] = features.gene_embeddings(model, tokens)
            else:
                found[name] = model.vectors_of(targets)
                mine = {NO_VECTOR: set(targets) - set(found[name])}
            if targets and set.union(*mine.values()) == set(targets):
                what = "was trained on" if isinstance(model, ExpressionModel) else "has an embedding of"
                raise UserError(
                    f"{source}: none of the {len(targets)} targets ({', '.join(targets[:NAMED])}) is a gene that "
                    f"{_called(entrant, entrants)} {what}, which ridge needs: choose another model or file, or --predictor "
                    "context."
                )
            for reason, names in mine.items():
                refusals[reason] = refusals.get(reason, set()) | names
    return Vectors(found, {reason: sorted(names) for reason, names in refusals.items() if names}, checkable)


def rivals_of(entrant: Entrant, predictor: str, widths: dict[str, int]) -> tuple[str, ...]:
    """What predicts as an entrant does without what it knows. `widths`: of the members' gene vectors."""
    if predictor == CONTEXTS:
        return (untrained_name(entrant), PCA_CENTROIDS) if entrant.network else (PCA_CENTROIDS,)
    return (LOADINGS,) if entrant.predicts else (LOADINGS, random_name(widths[entrant.members[0].name], widths.values()))


def embed_controls(
    entrants: list[Entrant], source: AnnDataSource, maps: dict[str, GeneMap], rows: np.ndarray, seed: int, progress: bool
) -> dict[str, np.ndarray]:
    """Embeddings of the cells in `rows` (ascending), float32 [cells of the file, D] (0, or anything, elsewhere), of all
    models that don't bring predictions, and of an untrained one beside each of ours."""
    found = {
        name: model.values_of(source) for entrant in entrants for name, model in entrant.members
        if isinstance(model, ExternalEmbedding)
    }
    networks = networks_of(entrants)
    for entrant in entrants:
        if model := entrant.network:
            twin = ExpressionModel(model.config, model.vocabulary, random.key(seed, random.Stream.EVALUATION, _UNTRAINED) >> 1)
            networks[untrained_name(entrant)] = twin.to(embed.device_of(model))
    found |= {name: np.zeros((source.n_cells, model.config.width), dtype=np.float32) for name, model in networks.items()}
    if not networks:
        return found
    with progress_bar("embedding controls", source.n_cells, progress) as advance:
        for start, read in embed.chunks(source):
            last = start + len(read.offsets) - 1
            mine = rows[(rows >= start) & (rows < last)]
            for vocabulary, gene_map in maps.items() if len(mine) else ():
                cells = take(to_tokens(read, gene_map), mine - start)
                hashes = content_hash(cells.genes, cells.counts, cells.offsets)
                for name, network in networks.items():
                    if network.vocabulary.fingerprint == vocabulary:
                        found[name][mine] = embed.encode(network, cells, hashes, seed=seed)
            advance(last - start)
    return found


def _called(entrant: Entrant, entrants: list[Entrant]) -> str:
    """An entrant in a message."""
    return "the model" if len(entrants) == 1 else entrant.name
