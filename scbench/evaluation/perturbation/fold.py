"""One fold: what is fitted on its training cells, and what each method predicts for its held-out pairs."""

from collections.abc import Callable
from typing import NamedTuple

import numpy as np
from scipy.sparse import csr_matrix
from sklearn.decomposition import PCA

from scbench.evaluation.perturbation import baselines, context, features, ridge
from scbench.evaluation.perturbation.cells import PerturbedCells
from scbench.evaluation.perturbation.changes import Changes, gene_list, group_means
from scbench.evaluation.perturbation.scoring import CEILING, Held
from scbench.evaluation.perturbation.splits import CELLS, CONTEXT, INNER_HALVES, Fold, halves

RIDGE, CONTEXTS = "ridge", "context"
LOADINGS, PCA_CENTROIDS, RANDOM = "PCA gene loadings", "PCA", "random vectors"
NO_CHANGE, TRAIN_MEAN, OWN_MEAN, MATCHING_MEAN, ADDITIVE = (
    "no change", "train mean", "own training mean", "matching mean", "additive",
)


class Knowledge(NamedTuple):
    """What a benchmark knows beside the cells."""

    predictor: str  # RIDGE or CONTEXTS
    gene_vectors: dict[str, dict[str, np.ndarray]]  # ridge: by model, the embedding of each target
    random_widths: dict[str, int]  # ridge: by what random vectors are called, their width
    control_embeddings: dict[str, np.ndarray]  # context: by model, [cells of the file, D], rows of controls filled
    seed: int


def prepare_fold(cells: PerturbedCells, fold: Fold, scored_controls: np.ndarray) -> Held:
    """Choose the genes and measure the training changes against the controls that are not scored."""
    fitting_controls = cells.controls & ~scored_controls
    genes = gene_list(cells.values[cells.controls | fold.train])
    values = cells.values[:, genes]
    controls = group_means(values, np.where(fitting_controls, cells.context, -1), len(cells.contexts))
    fitted = _changes(cells, genes, values, fold.train, controls)
    return Held(cells, fold, genes, values, scored_controls, fitted, controls)


def predict_fold(held: Held, known: Knowledge, split: str, repetition: int) -> tuple[dict[str, np.ndarray], dict[str, float]]:
    """Every method's changes of the held-out pairs, float64 [pairs, genes], NaN rows where it says nothing; and the strength
    (or width) that was chosen for each fitted method."""
    cells, fitted, pairs = held.cells, held.fitted, held.fold.pairs
    asked = cells.pair_perturbation[pairs], cells.pair_context[pairs]
    inner = _inner(held, split, known.seed, repetition)
    predictions, chosen = {}, {}
    grid: tuple = ridge.STRENGTHS if known.predictor == RIDGE else context.WIDTHS
    function: Callable = ridge.predict if known.predictor == RIDGE else context.predict
    vectors = _features(held, known, repetition) if known.predictor == RIDGE else _centroids(held, known)
    for name, one in vectors.items():
        place = len(grid) - 1
        if inner:
            place = ridge.choose(
                grid, inner, lambda a, b, one=one: function(one, a, b.perturbation, b.context, grid)
            )
        chosen[name] = grid[place]
        predictions[name] = function(one, fitted, *asked, grid[place : place + 1])[0]
    predictions[NO_CHANGE] = baselines.no_change(fitted, *asked)
    predictions[TRAIN_MEAN] = baselines.train_mean(fitted, *asked)
    if split == CELLS:
        predictions[OWN_MEAN] = baselines.own_mean(fitted, *asked)
    else:
        predictions[MATCHING_MEAN] = baselines.matching_mean(fitted, *asked, cells.perturbations)
    predictions[ADDITIVE] = baselines.additive(fitted, *asked, cells.perturbations)
    other = group_means(held.values, np.where(held.fold.other, cells.pair, -1), len(cells.pair_context))
    predictions[CEILING] = other[pairs] - held.controls[asked[1]]
    return {name: one for name, one in predictions.items() if not np.isnan(one).all()}, chosen


def _changes(
    cells: PerturbedCells, genes: np.ndarray, values: csr_matrix, rows: np.ndarray, controls: np.ndarray
) -> Changes:
    """Changes of the pairs of some perturbed cells."""
    pairs = np.unique(cells.pair[rows & ~cells.controls])
    means = group_means(values, np.where(rows, cells.pair, -1), len(cells.pair_context))[pairs]
    perturbation, where = cells.pair_perturbation[pairs], cells.pair_context[pairs]
    scored = np.stack([~np.isin(genes, cells.own_columns(number)) for number in perturbation])
    return Changes.of(perturbation, where, means - controls[where], scored, len(cells.contexts))


def _inner(held: Held, split: str, seed: int, repetition: int) -> list[tuple[Changes, Changes]]:
    """Training and validation changes out of the training cells, divided as held-out ones are from these."""
    cells, train = held.cells, held.fold.train
    if split == CELLS:
        half = halves(np.where(train, cells.pair, -1), cells.hashes, seed, repetition, INNER_HALVES)
        parts = [_changes(cells, held.genes, held.values, rows, held.controls) for rows in (train & ~half, half)]
        return [(parts[0], parts[1]), (parts[1], parts[0])]
    group = held.fitted.context if split == CONTEXT else held.fitted.perturbation
    return ridge.validation_folds(held.fitted, group)


def _features(held: Held, known: Knowledge, repetition: int) -> dict[str, np.ndarray]:
    """Features of all perturbations, [perturbations, D], by method."""
    cells = held.cells
    targets = sorted({target for one in cells.perturbations for target in one})
    columns = np.union1d(held.genes, [column for target in targets for column in cells.target_columns.get(target, [])])
    columns = columns.astype(np.int64)
    places = {target: np.searchsorted(columns, cells.target_columns.get(target, [])).tolist() for target in targets}
    loadings = features.gene_loadings(cells.values[cells.controls | held.fold.train][:, columns], places)
    drawn = {name: features.random_vectors(targets, width, known.seed + repetition)
             for name, width in known.random_widths.items()}
    vectors = known.gene_vectors | {LOADINGS: loadings} | drawn
    return {name: features.summed(cells, one) for name, one in vectors.items()}


def _centroids(held: Held, known: Knowledge) -> dict[str, np.ndarray]:
    """Mean embedding of each context's controls that are not scored, [contexts, D], by method."""
    cells = held.cells
    starts = cells.controls & ~held.scored_controls
    group = np.where(starts, cells.context, -1)[starts]

    def means(embedding: np.ndarray) -> np.ndarray:
        return np.stack([embedding[group == number].mean(axis=0) for number in range(len(cells.contexts))])

    found = {name: means(embedding[cells.rows[starts]]) for name, embedding in known.control_embeddings.items()}
    training = held.values[cells.controls | held.fold.train]
    components = min(features.COMPONENTS, training.shape[0] - 1, training.shape[1] - 1)
    pca = PCA(components, svd_solver="arpack", random_state=0).fit(training)
    return found | {PCA_CENTROIDS: means(pca.transform(held.values[starts]))}
