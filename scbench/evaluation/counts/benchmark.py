"""Benchmark: predict one half of each cell's counts from the other half, beside baselines; zeros included, no labels needed.

Protocol: each cell's counts are split into two halves that are independent given its rates (thinning.py). The frozen model
embeds half A; from that, k-NN and a log-linear law fitted on training cells predict half B's counts over the genes that vary
most among them (predictors.py). Cells are tested fold by fold; the mean Poisson deviance of all cells is compared with
that of the depth-scaled gene mean.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import anndata
import numpy as np
import scipy.sparse
from sklearn.decomposition import PCA
from threadpoolctl import threadpool_limits

from scbench.config import CountsConfig, Values
from scbench.data.sources.anndata import AnnDataSource
from scbench.errors import UserError
from scbench.evaluation import baselines, embed
from scbench.evaluation.counts import predictors, report
from scbench.evaluation.counts.report import GENE_MEAN, KNN, LOG_LINEAR, NO_PROBE, SMOOTHED, Method
from scbench.evaluation.counts.thinning import Halves, read_halves
from scbench.evaluation.entrants import UNTRAINED, Entrant, Model, Models, check, embed_all, entrants_of
from scbench.evaluation.external import ExternalEmbedding, open_model
from scbench.evaluation.folds import Parts, fold_parts, group_folds
from scbench.evaluation.labels import FEWEST_GROUPS, read_labels
from scbench.evaluation.predictions_files import ExternalPredictions
from scbench.evaluation.progress import progress_bar
from scbench.evaluation.reference_cells import described, values_sentences
from scbench.evaluation.report import Table, screen, versions
from scbench.evaluation.scores import stratified_folds
from scbench.evaluation.split_files import Split, read_split, unit_hashes
from scbench.files import refuse_existing
from scbench.models.model import ExpressionModel

TASK, PROTOCOL = "counts", "default"
FEWEST = 20  # training cells of a fold
SMALL = 10_000  # cells; below, threads mostly wait for each other


class Cells(NamedTuple):
    """What is split, embedded and predicted."""

    halves: Halves
    groups: np.ndarray | None  # str objects [cells]
    counted: dict[str, int]  # all cells of the file, and removed ones by reason


def benchmark_counts(
    models: Models | Model,
    source: AnnDataSource | anndata.AnnData | Path | str,
    *,
    group: str | None = None,
    split: Split | None = None,
    values: Values = "counts",
    layer: str | None = None,
    genes_column: str | None = None,
    seeds: int = 3,
    folds: int = 5,
    max_overlap: float = 0.01,
    allow_overlap: bool = False,
    seed: int = 0,
    progress: bool = False,
) -> Table:
    """The table of some models on one set of cells.

    Parameters
    ----------
    models
        A model, or models by name, each with its pretraining seeds. An ExternalEmbedding must be of half A, by the cell ids
        that `scbench benchmark thin` gave it.
    source
        Raw counts.
    group
        Column of obs whose groups are held out whole; cells without one are left out.
    split
        Folds to use in place of drawn ones; `seeds` and `folds` are its.
    values, layer, genes_column
        As in `embed.opened`; values "as_is" are no counts and are refused.
    seeds, folds
        Repetitions of the cross-validation, and its folds (at most as many as groups). The halves are the same in all.
    max_overlap, allow_overlap
        As in `benchmark_classification`.
    seed
        Of the halves, folds, bootstrap, gene draws and untrained models.
    progress
        Show a progress bar if on a terminal.

    Raises
    ------
    UserError
        If an embedding is not of half A, a model has seen too many cells, or too few cells remain.
    """
    if values == "as_is":
        raise UserError("values that are no counts (as_is) cannot be split: give counts, or say that they are lognorm.")
    entrants = entrants_of(models, (UNTRAINED, GENE_MEAN, SMOOTHED, r"PCA \([0-9]+\)"))
    with embed.opened(source, layer=layer, genes_column=genes_column, values=values) as opened:
        checked = check(entrants, opened, max_overlap=max_overlap, allow_overlap=allow_overlap, progress=progress)
        halves = read_halves(opened, seed, progress=progress)
        every = _choose(halves, None if group is None else read_labels(opened.obs, group, opened.name, "--group"))
        place, recovered = described(opened), values_sentences(opened)
    split = _draw(every, group, folds, seeds, seed) if split is None else split
    split.check(TASK, group or "", "cell" if group is None else "group")
    cells = _without(every, checked.seen)
    fold = split.folds_of(cells.halves.ids if group is None else cells.groups, halves.source)
    embedded = _embed(entrants, cells.halves, seed, progress)
    widths = sorted({baselines.COMPONENTS, *(values.shape[1] for values in embedded.values())})
    deviances, genes, chosen = _predict(cells.halves, embedded, widths, fold, split.folds, progress)
    board = report.Board.of(deviances, entrants, widths, cells.groups, seed)
    common = {
        "dataset": place["name"], "values": place["values"], "protocol": PROTOCOL, "seeds": split.repetitions,
        "folds": split.folds, "cells": len(cells.halves.ids), "genes": genes,
        "groups": None if group is None else len(set(cells.groups)),
    }
    compared = report.comparisons(board)
    details = {
        "protocol": report.protocol(split, group),
        "source": place,
        "models": checked.details,
        "cells": cells.counted,
        "half_sha256": halves.digest,
        "split_sha256": split.digest,
        "chosen": chosen,
        "differences": report.differences(board),
        "comparisons": compared,
        "pretraining_seeds": report.members(board),
        "seed": seed,
        "versions": versions(),
    }
    said = [*report.sentences(compared, cells.counted, common, checked.overlap), *recovered]
    rows = report.rows(board, common, checked.overlap)
    title = f"Half of the counts from the other half in {place['name']}"
    return Table(title, rows, report.COLUMNS, said, details, {"split.json": split.write}, "deviance_explained")


def _choose(halves: Halves, groups: np.ndarray | None) -> Cells:
    """The cells that may take part, whatever the models: with counts, with a group if there are some, each content once."""
    filled = np.asarray(halves.seen.sum(axis=1) + halves.unseen.sum(axis=1)).ravel() > 0
    groups = None if groups is None else groups[halves.rows]
    grouped = filled if groups is None else filled & np.array([group is not None for group in groups], dtype=bool)
    rows = np.flatnonzero(grouped)
    once = np.sort(rows[np.unique(halves.content[rows], return_index=True)[1]])
    counted = {
        "total": len(halves.ids), "empty": int((~filled).sum()), "ungrouped": int((filled & ~grouped).sum()),
        "duplicates": len(rows) - len(once),
    }
    return Cells(halves.take(once), None if groups is None else groups[once], counted)


def _without(cells: Cells, seen: np.ndarray) -> Cells:
    """The cells that no model has seen. `seen`: bool [cells of the file]."""
    places = np.flatnonzero(~seen[cells.halves.rows])
    counted = cells.counted | {"overlapping": len(cells.halves.ids) - len(places)}
    return Cells(cells.halves.take(places), None if cells.groups is None else cells.groups[places], counted)


def _draw(cells: Cells, group: str | None, folds: int, seeds: int, seed: int) -> Split:
    """Deal cells, or whole groups, to folds, `seeds` times. There are no more folds than groups."""
    halves = cells.halves
    if group is None:
        alike = np.zeros(len(halves.ids), dtype=np.int64)
        fold = [stratified_folds(alike, halves.keys, folds, seed, repetition) for repetition in range(seeds)]
        return Split.of(TASK, halves.source, "", PROTOCOL, folds, "cell", halves.ids, np.stack(fold))
    names, sizes = np.unique(cells.groups.astype(str), return_counts=True)
    if len(names) < FEWEST_GROUPS:
        raise UserError(f"{halves.source}: {len(names)} groups in column {group!r} hold cells, and {FEWEST_GROUPS} are needed "
                        "to train, validate and test on: choose another --group.")
    keys = unit_hashes(names)
    folds = min(folds, len(names))
    fold = [group_folds(sizes[:, None], keys, folds, seed, repetition) for repetition in range(seeds)]
    return Split.of(TASK, halves.source, group, PROTOCOL, folds, "group", names.tolist(), np.stack(fold))


def _embed(entrants: list[Entrant], halves: Halves, seed: int, progress: bool) -> dict[str, np.ndarray]:
    """Embeddings of half A, float32 [cells, D], by all members of all entrants and an untrained twin of each of ours."""
    found = {
        member.name: _external(member.model, halves) for entrant in entrants for member in entrant.members
        if not isinstance(member.model, ExpressionModel)
    }
    return found | embed_all(entrants, halves.tokens_on, seed, progress)


def _external(model: ExternalEmbedding | ExternalPredictions, halves: Halves) -> np.ndarray:
    """An embedding from elsewhere of half A; UserError if it is of anything else."""
    if not isinstance(model, ExternalEmbedding):
        raise UserError(f"{model.name} holds predictions, and counts are predicted from embeddings here: give a model "
                        "directory, or embeddings of the file that scbench benchmark thin writes.")
    try:
        with AnnDataSource(halves.anndata()) as source:
            return model.values_of(source)
    except UserError as error:
        raise UserError(
            f"{model.name} is no embedding of this half of the counts of {halves.source}, and one of whole cells has seen "
            "what is to be predicted: write the half with scbench benchmark thin, under the same --seed, embed that file, and "
            f"give an .npz or .parquet by its cell ids ({str(error).rstrip('.')})."
        ) from None


def _predict(
    halves: Halves, embedded: dict[str, np.ndarray], widths: list[int], fold: np.ndarray, folds: int, progress: bool
) -> tuple[dict[Method, np.ndarray], int, list[dict]]:
    """Deviances of every method, float64 [repetitions, cells]; the most genes that were predicted; the chosen strengths.

    `fold`: int64 [repetitions, cells].
    """
    n = len(halves.ids)
    counts = (halves.seen + halves.unseen).tocsr()
    values = baselines.log_normalise(halves.seen)
    totals = np.asarray(halves.seen.sum(axis=1), dtype=np.float64).ravel()
    deviances: dict[Method, np.ndarray] = {}
    most, chosen = 0, []
    threads = threadpool_limits(1 if n < SMALL else None)
    with threads, progress_bar("predicting counts", len(fold) * folds, progress) as advance:
        for repetition, number in np.ndindex(len(fold), folds):
            parts = fold_parts(fold[repetition], number, folds)
            if len(parts.test):
                _check(parts, halves.source)
                genes = predictors.choose_genes(counts[parts.train])
                if not len(genes):
                    raise UserError(f"{halves.source}: no gene is expressed by {predictors.EXPRESSED_IN} training cells of a "
                                    "fold: give more cells.")
                strengths = {}
                for method, choice in _methods(halves, embedded, widths, values[:, genes], totals, genes, parts):
                    deviances.setdefault(method, np.empty(fold.shape))[repetition, parts.test] = choice.deviance
                    if choice.strength:
                        strengths[" ".join(method)] = list(choice.strength)
                most = max(most, len(genes))
                chosen.append({"repetition": repetition, "fold": number, "genes": len(genes)} | strengths)
            advance(1)
    return deviances, most, chosen


def _check(parts: Parts, source: str) -> None:
    """UserError if a fold has too little to fit or choose on."""
    if len(parts.train) < FEWEST or not len(parts.validation):
        raise UserError(f"{source}: a fold has {len(parts.train)} cells to train on and {len(parts.validation)} to validate, "
                        f"and {FEWEST} and 1 are needed: give more cells or change --folds.")


def _methods(
    halves: Halves, embedded: dict[str, np.ndarray], widths: list[int], values: scipy.sparse.csr_matrix, totals: np.ndarray,
    genes: np.ndarray, parts: Parts,
) -> Iterator[tuple[Method, predictors.Choice]]:
    """Every method on the test cells of one division. `values`: log-normalised half A, [cells, genes]."""
    exposure = predictors.exposures(totals, parts.train)
    counts = halves.unseen[:, genes].astype(np.float64)
    train, validation, test = (predictors.Part(exposure[rows], counts[rows]) for rows in parts)
    fold = predictors.Fold(train, validation, test, predictors.shares_of(train))
    yield (GENE_MEAN, NO_PROBE), predictors.gene_mean(fold)
    seen, held = halves.seen[:, genes], (parts.validation, parts.test)
    yield (SMOOTHED, NO_PROBE), predictors.smoothed_half(
        fold, tuple(seen[rows] for rows in held), tuple(totals[rows] for rows in held)
    )
    features = {name: [array[rows].astype(np.float64) for rows in parts] for name, array in embedded.items()}
    dense = [values[rows].toarray() for rows in parts]
    solver = "covariance_eigh" if dense[0].shape[0] > dense[0].shape[1] else "full"
    with np.errstate(invalid="ignore"):  # of one gene, the same in all cells, a share of the variance is 0 / 0; nobody asks
        pca = PCA(min(max(widths), len(dense[0]) - 1, dense[0].shape[1]), svd_solver=solver).fit(dense[0])
    components = [pca.transform(part) for part in dense]
    features |= {report.pca_name(width): [part[:, :width] for part in components] for width in widths}
    for name, arrays in features.items():
        yield (name, KNN), predictors.nearest_cells(fold, *arrays)
        yield (name, LOG_LINEAR), predictors.log_linear(fold, *arrays)


def run_counts(config: CountsConfig) -> dict:
    """`scbench benchmark counts`: write the table to --output, show it, return it as JSON-able values."""
    refuse_existing(config.output)
    split = None if config.split_file is None else read_split(config.split_file)
    table = benchmark_counts(
        open_model(config.model), config.input, group=config.group, split=split, values=config.values, layer=config.layer,
        genes_column=config.genes_column, seeds=config.seeds, folds=config.folds, max_overlap=config.max_overlap,
        allow_overlap=config.allow_overlap, seed=config.seed, progress=not config.json,
    )
    table.write(config.output)
    if not config.json:
        console = screen()
        table.show(console)
        console.print(f"Written to {config.output}: results.json, results.csv, results.md, forest.png, split.json")
    return table.record()
