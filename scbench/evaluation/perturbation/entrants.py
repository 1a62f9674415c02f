"""What each model of a table knows of targets and of controls."""

from collections.abc import Iterable
from typing import NamedTuple

import numpy as np

from scbench.data.cells import content_hash, take, to_tokens
from scbench.data.gene_identity import GeneMap
from scbench.data.gene_table import gene_table
from scbench.data.sources.anndata import AnnDataSource
from scbench.errors import UserError
from scbench.evaluation import embed
from scbench.evaluation.entrants import UNTRAINED, Entrant, called, networks_of, untrained_name
from scbench.evaluation.external import ExternalEmbedding
from scbench.evaluation.perturbation import features
from scbench.evaluation.perturbation.cells import NAMED
from scbench.evaluation.perturbation.fold import (
    ADDITIVE,
    CONTEXTS,
    LOADINGS,
    MATCHING_MEAN,
    NO_CHANGE,
    OWN_MEAN,
    PCA_CENTROIDS,
    RANDOM,
    TRAIN_MEAN,
)
from scbench.evaluation.perturbation.scoring import CEILING
from scbench.evaluation.progress import progress_bar
from scbench.kernels import random
from scbench.models.model import ExpressionModel

RESERVED = (UNTRAINED, LOADINGS, PCA_CENTROIDS, RANDOM, NO_CHANGE, TRAIN_MEAN, OWN_MEAN, MATCHING_MEAN, ADDITIVE, CEILING)
PREDICTIONS = "predictions"  # the probe of a model that was asked elsewhere
NO_TOKEN, NEVER_SEEN, NO_VECTOR, NOT_PREDICTED = (
    "no token", "never seen in training", "no embedding", "left out of the predictions",
)
_UNTRAINED = 17  # what a key of Stream.EVALUATION decides


def random_name(width: int, widths: Iterable[int]) -> str:
    """What random vectors of a width are called, among those of all `widths`."""
    return RANDOM if len(set(widths)) == 1 else f"{RANDOM}, D = {width}"


def gene_names(source: AnnDataSource, entrants: list[Entrant]) -> set[str]:
    """All that may be the name of a gene: the file's, the vocabularies', the gene table's."""
    organism = "mouse" if source.identity.organism == "mouse" else "human"
    names = {name for names in (source.identity.ids, source.identity.symbols) for name in names if name}
    return names.union(gene_table(organism).names, *(model.vocabulary.tokens for model in networks_of(entrants).values()))


class Vectors(NamedTuple):
    """What the models know of targets."""

    by_member: dict[str, dict[str, np.ndarray]]  # float64 [D] of each target
    refusals: dict[str, list[str]]  # the targets that some model cannot use, by reason
    checkable: bool  # whether all models of ours can say which genes they were trained on


def read_vectors(entrants: list[Entrant], targets: list[str], source: str) -> Vectors:
    """The targets' embeddings of all models that don't bring predictions; UserError if one of these has none."""
    found, refusals, checkable = {}, {}, True
    for entrant in entrants:
        for name, model in entrant.members:
            if entrant.predicts:
                mine = {NOT_PREDICTED: set(targets).intersection(model.refused)}
            elif isinstance(model, ExpressionModel):
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
            if not entrant.predicts and targets and set.union(*mine.values()) == set(targets):
                what = "was trained on" if isinstance(model, ExpressionModel) else "has an embedding of"
                raise UserError(
                    f"{source}: none of the {len(targets)} targets ({', '.join(targets[:NAMED])}) is a gene that "
                    f"{called(entrant, entrants)} {what}, which ridge needs: choose another model or file, or --predictor "
                    "context."
                )
            for reason, names in mine.items():
                refusals[reason] = refusals.get(reason, set()) | names
    return Vectors(found, {reason: sorted(names) for reason, names in refusals.items() if names}, checkable)


def rivals_of(entrant: Entrant, predictor: str, widths: dict[str, int]) -> tuple[str, ...]:
    """What predicts as an entrant does without what it knows. `widths`: of the members' gene vectors."""
    if predictor == CONTEXTS:
        return (untrained_name(entrant.name), PCA_CENTROIDS) if entrant.network else (PCA_CENTROIDS,)
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
            networks[untrained_name(entrant.name)] = twin.to(embed.device_of(model))
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
