"""Benchmark: predict the change that a perturbation makes, beside baselines and a ceiling, on what was held out.

Protocol: cells, perturbations, combinations or contexts are held out in folds, repeated with `seeds` different divisions.
Every predictor gives one change a held-out pair (a perturbation in a context); it is scored on one half of the pair's cells
against one half of the context's own controls, and the other halves give the ceiling. Perturbation types and studies are never
mixed: each study is split and fitted alone.
"""

import platform
from importlib.metadata import version
from pathlib import Path

import anndata
import numpy as np
from threadpoolctl import threadpool_limits

from scbench import __version__
from scbench.config import PerturbationConfig
from scbench.config.perturbation import check_predictor
from scbench.data.cells import content_hash, take, to_tokens
from scbench.data.gene_identity import GeneMap, map_genes
from scbench.data.gene_table import gene_table
from scbench.data.sources.anndata import AnnDataSource
from scbench.errors import UserError
from scbench.evaluation import embed, leakage
from scbench.evaluation.labelled_cells import NOT_CHECKABLE, TRANSDUCTIVE, UNSEEN
from scbench.evaluation.perturbation import features, pooled, report
from scbench.evaluation.perturbation.cells import (
    NAMED,
    PerturbedCells,
    Reading,
    labels_of,
    read_perturbed_cells,
)
from scbench.evaluation.perturbation.fold import CONTEXTS, MODEL, RIDGE, UNTRAINED, Knowledge, predict_fold, prepare_fold
from scbench.evaluation.perturbation.names import targets_of
from scbench.evaluation.perturbation.scoring import Board, Held, score_fold
from scbench.evaluation.perturbation.splits import CELLS, PERTURBATION, halves, make_folds, why_not
from scbench.evaluation.progress import progress_bar
from scbench.evaluation.report import Table, screen
from scbench.files import refuse_existing
from scbench.kernels import random
from scbench.models.model import ExpressionModel

_UNTRAINED = 17  # what a key of Stream.EVALUATION decides
SMALL = 10_000  # cells; below, threads mostly wait for each other


def benchmark_perturbation(
    model: ExpressionModel,
    source: AnnDataSource | anndata.AnnData | Path | str,
    perturbation_column: str,
    control: str,
    *,
    context: tuple[str, ...] = (),
    study: tuple[str, ...] | None = None,
    total_counts_column: str | None = None,
    split: str = PERTURBATION,
    predictor: str = RIDGE,
    layer: str | None = None,
    genes_column: str | None = None,
    seeds: int = 3,
    folds: int = 5,
    max_overlap: float = 0.01,
    allow_overlap: bool = False,
    seed: int = 0,
    progress: bool = False,
) -> Table:
    """The table of one model on one set of perturbed cells.

    Parameters
    ----------
    model
        The pretrained model.
    source
        Raw counts of perturbed cells and controls.
    perturbation_column, control
        Column of obs that names each cell's perturbation (`A`, `A+B`, `A_B`, `A,ctrl`), and what it calls controls.
    context, study
        Columns of obs. Changes are against the controls of the same context; studies are never mixed (by default the columns
        dataset, study and perturbation_type where they are there).
    total_counts_column
        Column of obs with each cell's total over its whole profile; by default the sum over the file's genes.
    split
        unseen-cells, unseen-perturbation (of one target), unseen-combination or unseen-context.
    predictor
        ridge: from the sum of the targets' gene embeddings; perturbations of targets without a token, or never seen in
        pretraining, are left out. context: from the contexts whose controls the model embeds alike.
    layer, genes_column
        As in `scbench.embed`.
    seeds, folds
        Repetitions of the cross-validation, and its folds (at most as many as there are contexts).
    max_overlap, allow_overlap
        As in `benchmark_classification`.
    seed
        Of folds, halves, bootstrap, gene draws, random vectors and the untrained model.
    progress
        Show a progress bar if on a terminal.

    Raises
    ------
    UserError
        If a column, the controls or the targets can't be used, or too little remains to be split.
    """
    check_predictor(predictor, split, context)
    with embed.opened(source, layer=layer, genes_column=genes_column) as opened:
        gene_map = map_genes(opened.identity, model.vocabulary, opened.name)
        genes = _gene_names(opened, model)
        targets = sorted({
            target for name in set(labels_of(opened, perturbation_column, "--perturbation-column")) - {None}
            for target in targets_of(name, control, genes)
        })
        tokens = features.target_tokens(model, targets) if targets else {}
        trained = features.trained_tokens(model)
        refusals = _refusals(targets, tokens, trained) if predictor == RIDGE else {}
        refused = {target for names in refusals.values() for target in names}
        if predictor == RIDGE and targets and refused == set(targets):
            raise UserError(
                f"{opened.name}: none of the {len(targets)} targets ({', '.join(targets[:NAMED])}) is a gene that the model "
                "was trained on, which ridge needs: choose another model or file, or --predictor context."
            )
        with progress_bar("checking the counts", opened.n_cells, progress) as advance:
            matching = embed.match_counts(opened, gene_map, advance)
        found = leakage.find_seen_cells(model, opened, progress=progress)
        if not allow_overlap and found.seen.mean() > max_overlap:
            raise UserError(
                f"{opened.name}: the model was trained or validated on {found.seen.sum():,} of its {opened.n_cells:,} cells, "
                f"and {max_overlap:.1%} are allowed: give other cells, --max-overlap 1 to leave these out, or --allow-overlap "
                "to keep them."
            )
        reading = read_perturbed_cells(
            opened, perturbation_column, control, context=context, study=study, total_counts_column=total_counts_column,
            genes=genes, refused=refused, seen=None if allow_overlap else found.seen,
        )
        studies, unsplit = _splittable(reading, split, folds, opened.name)
        embedded = _embed_controls(model, opened, gene_map, studies, seed, progress) if predictor == CONTEXTS else {}
        used = {perturbation_column, *context, *(study or ()), total_counts_column or ""}
        caught = [one for cells in studies if (one := pooled.unmatched(cells, opened.obs, used))]
        name, place = opened.name, {"name": opened.name, "layer": opened.layer, "recovered_counts": opened.recovered}
    vectors = features.gene_embeddings(model, tokens) if predictor == RIDGE else {}
    known = Knowledge(predictor, vectors, embedded, seed)
    board, chosen = _run(studies, known, split, folds, seeds, progress)
    overlap = TRANSDUCTIVE if allow_overlap else UNSEEN if found.checked else NOT_CHECKABLE
    common = {
        "dataset": name, "perturbation_column": perturbation_column, "protocol": split, "overlap": overlap, "seeds": seeds,
        "folds": folds, "cells": sum(int((cells.pair >= 0).sum()) for cells in studies),
    }
    pooled_scores = [score for cells in studies if (score := pooled.across_contexts(cells)) is not None]
    said = [
        *report.sentences(board, predictor),
        *report.reading_sentences(reading, studies, unsplit, pooled_scores, caught),
        *(report.target_sentences(studies, refusals, checkable=trained is not None) if predictor == RIDGE else []),
    ]
    details = {
        "protocol": report.protocol(predictor, split, folds, seeds),
        "source": place,
        "model": {"fingerprint": embed.fingerprint(model), "provenance": model.provenance},
        "cells": reading.counted, "left_out": reading.left_out | ({"not split": unsplit} if unsplit else {}),
        "targets": {"all": len(targets), "without a token": len(targets) - len(tokens), "refused": refusals,
                    "measured": sum(bool(studies[0].target_columns.get(target)) for target in targets)},
        "totals": reading.totals,
        "pooled_controls": pooled_scores, "unmatched_controls": [one._asdict() for one in caught],
        "chosen": chosen,
        "differences": report.differences(board, predictor),
        "gene_matching": matching,
        "seen": found.counts(),
        "seed": seed,
        "versions": {
            "scbench": __version__, "python": platform.python_version(),
            **{name: version(name) for name in ("torch", "numpy", "scipy", "scikit-learn", "anndata")},
        },
    }
    title = f"Change by {perturbation_column} in {name}, {split}"
    return Table(title, report.rows(board, predictor, common), report.COLUMNS, said, details)


def _gene_names(source: AnnDataSource, model: ExpressionModel) -> set[str]:
    """All that may be the name of a gene: the file's, the vocabulary's, the gene table's."""
    organism = "mouse" if source.identity.organism == "mouse" else "human"
    own = {name for names in (source.identity.ids, source.identity.symbols) for name in names if name}
    return own | set(model.vocabulary.tokens) | set(gene_table(organism).names)


def _refusals(targets: list[str], tokens: dict[str, int], trained: np.ndarray | None) -> dict[str, list[str]]:
    """The targets that ridge refuses, by reason."""
    found = {
        "no token": [target for target in targets if target not in tokens],
        "never seen in training": [target for target in targets if trained is not None and target in tokens
                                   and not trained[tokens[target]]],
    }
    return {reason: names for reason, names in found.items() if names}


def _splittable(reading: Reading, split: str, folds: int, name: str) -> tuple[list[PerturbedCells], list[str]]:
    """The studies that can be split, and why the others cannot."""
    reasons = [why_not(cells, split, folds) for cells in reading.studies]
    judged = list(zip(reading.studies, reasons, strict=True))
    unsplit = [f"{cells.study or 'the file'}: {reason}" for cells, reason in judged if reason]
    studies = [cells for cells, reason in judged if reason is None]
    if not studies:
        raise UserError(f"{name} cannot be split by {split} ({'; '.join(unsplit)}): choose another --split or fewer --folds.")
    return studies, unsplit


def _embed_controls(
    model: ExpressionModel, source: AnnDataSource, gene_map: GeneMap, studies: list[PerturbedCells], seed: int, progress: bool
) -> dict[str, np.ndarray]:
    """Embeddings of all controls by the model and an untrained one, float32 [cells of the file, D], 0 elsewhere."""
    rows = np.sort(np.concatenate([cells.rows[cells.controls] for cells in studies]))
    untrained = ExpressionModel(model.config, model.vocabulary, random.key(seed, random.Stream.EVALUATION, _UNTRAINED) >> 1)
    networks = {MODEL: model, UNTRAINED: untrained.to(embed.device_of(model))}
    found = {name: np.zeros((source.n_cells, model.config.width), dtype=np.float32) for name in networks}
    with progress_bar("embedding controls", source.n_cells, progress) as advance:
        for start, read in embed.chunks(source):
            last = start + len(read.offsets) - 1
            mine = rows[(rows >= start) & (rows < last)]
            if len(mine):
                cells = take(to_tokens(read, gene_map), mine - start)
                hashes = content_hash(cells.genes, cells.counts, cells.offsets)
                for name, network in networks.items():
                    found[name][mine] = embed.encode(network, cells, hashes, seed=seed)
            advance(last - start)
    return found


def _run(
    studies: list[PerturbedCells], known: Knowledge, split: str, folds: int, seeds: int, progress: bool
) -> tuple[Board, list[dict]]:
    """Scores of every method in every fold, and what was chosen on validation."""
    board, chosen = Board(split, known.seed), []
    n = sum(len(cells.pair) for cells in studies)
    with threadpool_limits(1 if n < SMALL else None), progress_bar("perturbation", seeds * len(studies), progress) as advance:
        for repetition in range(seeds):
            for number, cells in enumerate(studies):
                scored = halves(np.where(cells.controls, cells.context, -1), cells.hashes, known.seed, repetition)
                for place, fold in enumerate(make_folds(cells, split, folds, known.seed, repetition)):
                    held: Held = prepare_fold(cells, fold, scored)
                    predictions, strengths = predict_fold(held, known, split, repetition)
                    chosen.append({"study": cells.study, "repetition": repetition, "fold": place} | {
                        name: "mean" if np.isinf(strength) else strength for name, strength in strengths.items()
                    })
                    for pair, stratum, scores in score_fold(held, predictions, split == CELLS, known.seed):
                        apart = {(MODEL, name): scores[MODEL] - values for name, values in scores.items() if name != MODEL}
                        board.add(number, cells, pair, stratum, scores | apart)
                advance(1)
    return board, chosen


def run_perturbation(config: PerturbationConfig) -> dict:
    """`scbench benchmark perturbation`: write the table to --output, show it, return it as JSON-able values."""
    refuse_existing(config.output)
    model = embed.load_model(config.model)
    table = benchmark_perturbation(
        model, config.input, config.perturbation_column, config.control, context=config.context, study=config.study,
        total_counts_column=config.total_counts_column, split=config.split, predictor=config.predictor, layer=config.layer,
        genes_column=config.genes_column, seeds=config.seeds, folds=config.folds, max_overlap=config.max_overlap,
        allow_overlap=config.allow_overlap, seed=config.seed, progress=not config.json,
    )
    table.write(config.output)
    if not config.json:
        console = screen()
        table.show(console)
        console.print(f"Written to {config.output}: results.json, results.csv, results.md")
    return table.record()
