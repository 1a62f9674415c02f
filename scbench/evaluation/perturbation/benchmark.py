"""Benchmark: predict the change that a perturbation makes, beside baselines and a ceiling, on what was held out.

Protocol: cells, perturbations, combinations or contexts are held out in folds, repeated with `seeds` different divisions.
Every predictor gives one change a held-out pair (a perturbation in a context); it is scored on one half of the pair's cells
against one half of the context's own controls, and the other halves give the ceiling. Perturbation types and studies are never
mixed: each study is split and fitted alone.
"""

from pathlib import Path
from typing import NamedTuple

import anndata
import numpy as np
from threadpoolctl import threadpool_limits

from scbench.config import PerturbationConfig, Values
from scbench.config.perturbation import check_predictor
from scbench.data.sources.anndata import AnnDataSource
from scbench.errors import UserError
from scbench.evaluation import embed, external
from scbench.evaluation.entrants import Entrant, Model, Models, check, entrants_of
from scbench.evaluation.guard import TRANSDUCTIVE, UNSEEN
from scbench.evaluation.perturbation import pooled, report
from scbench.evaluation.perturbation.cells import PerturbedCells, Reading, name_cells, read_perturbed_cells
from scbench.evaluation.perturbation.changes import group_means
from scbench.evaluation.perturbation.entrants import (
    RESERVED,
    Vectors,
    embed_controls,
    gene_names,
    random_name,
    read_vectors,
    rivals_of,
)
from scbench.evaluation.perturbation.fold import RIDGE, Knowledge, predict_fold, prepare_fold
from scbench.evaluation.perturbation.predictions import SavedProfiles, changes_of, read_profiles
from scbench.evaluation.perturbation.scoring import Board, score_fold
from scbench.evaluation.perturbation.splits import CELLS, PERTURBATION, UNITS, draw_split, halves, make_folds, why_not
from scbench.evaluation.predictions_files import Profiles
from scbench.evaluation.progress import progress_bar
from scbench.evaluation.reference_cells import described, values_sentences
from scbench.evaluation.report import Table, screen, versions
from scbench.evaluation.split_files import Split, read_split, unique_ids
from scbench.files import refuse_existing

SMALL = 10_000  # cells; below, threads mostly wait for each other
TASK = "perturbation"


class Asked(NamedTuple):
    """Who is asked on which split."""

    entrants: list[Entrant]
    known: Knowledge
    profiles: dict[str, Profiles]  # of members that bring predictions
    split: Split
    genes: np.ndarray  # str objects, the names of the file's genes


def benchmark_perturbation(
    models: Models | Model,
    source: AnnDataSource | anndata.AnnData | Path | str,
    perturbation_column: str,
    control: str,
    *,
    context: tuple[str, ...] = (),
    study: tuple[str, ...] | None = None,
    total_counts_column: str | None = None,
    split: str = PERTURBATION,
    predictor: str = RIDGE,
    split_file: Split | None = None,
    save_predictions: bool = False,
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
    """The table of models on one set of perturbed cells: all on the same cells and folds.

    Parameters
    ----------
    models
        A model: one of ours; an ExternalEmbedding, of cells for `context`, of genes by their names for `ridge`; or
        ExternalPredictions. Or several by name, each with its pretraining seeds, whose mean is the model's row.
    source
        Raw counts of perturbed cells and controls.
    perturbation_column, control
        Column of obs that names each cell's perturbation (`A`, `A+B`, `A_B`, `A,ctrl`), and what it calls controls.
    context, study
        Columns of obs. Changes are against the controls of the same context; studies are never mixed (by default the columns
        dataset, study and perturbation_type where they are there).
    total_counts_column
        Column of obs with each cell's total over its whole profile; by default the sum over the file's genes. For a file of
        less than 2,000 genes it must be named, or be "panel", for the sum over these.
    split
        unseen-cells, unseen-perturbation (of one target), unseen-combination or unseen-context.
    predictor
        ridge: from the sum of the targets' gene embeddings; perturbations of targets that a model has no embedding of, or
        never saw in pretraining, are left out for all. context: from the contexts whose controls a model embeds alike.
    split_file
        Folds to use rather than to draw; their number and repetitions take the place of `folds` and `seeds`.
    save_predictions
        Write the models' predicted profiles beside the table, as predictions.h5ad (with several members one file each).
    values
        What the source holds (see `scbench.evaluation.embed.opened`).
    layer, genes_column
        As in `scbench.embed`.
    seeds, folds
        Repetitions of the cross-validation, and its folds (at most as many as there are contexts).
    max_overlap, allow_overlap
        As in `benchmark_classification`.
    seed
        Of folds, halves, bootstrap, gene draws, random vectors and untrained models.
    progress
        Show a progress bar if on a terminal.

    Raises
    ------
    UserError
        If a column, the controls, the targets or a model can't be used, or too little remains to be split.
    """
    check_predictor(predictor, split, context)
    entrants = entrants_of(models, RESERVED)
    if split_file is not None:
        split_file.check(TASK, perturbation_column, UNITS[split])
        folds, seeds = split_file.folds, split_file.repetitions
    with embed.opened(source, layer=layer, genes_column=genes_column, values=values) as opened:
        genes = gene_names(opened, entrants)
        named = name_cells(opened, perturbation_column, control, context=context, study=study, genes=genes)
        vectors = Vectors({}, {}, True)
        if predictor == RIDGE:
            vectors = read_vectors(entrants, named.all_targets(), opened.name)
        refused = {target for names in vectors.refusals.values() for target in names}
        checked = check(entrants, opened, max_overlap=max_overlap, allow_overlap=allow_overlap, progress=progress)
        reading = read_perturbed_cells(
            opened, named, total_counts_column=total_counts_column, refused=refused, seen=checked.seen,
        )
        studies, unsplit = _splittable(reading, split, folds, opened.name)
        if split_file is None:
            split_file = draw_split(named, split, folds, seeds, seed, dataset=opened.name, column=perturbation_column)
        embedded = {}
        if predictor != RIDGE:
            controls = np.sort(np.concatenate([cells.rows[cells.controls] for cells in studies]))
            embedded = embed_controls(entrants, opened, checked.gene_maps, controls, seed, progress)
        used = {perturbation_column, *context, *(study or ()), total_counts_column or ""}
        caught = [one for cells in studies if (one := pooled.unmatched(cells, opened.obs, used))]
        place, said_of_values = described(opened), values_sentences(opened)
        names = unique_ids(opened.gene_names)
    widths = {name: len(next(iter(one.values()))) for name, one in vectors.by_member.items() if one}
    rivals = {entrant.name: rivals_of(entrant, predictor, widths) for entrant in entrants}
    randoms = {random_name(width, widths.values()): width for width in widths.values()}
    profiles = {
        name: read_profiles(model, split_file, control, genes) for entrant in entrants if entrant.predicts
        for name, model in entrant.members
    }
    asked = Asked(entrants, Knowledge(predictor, vectors.by_member, randoms, embedded, seed), profiles, split_file, names)
    saved = {
        member.name: SavedProfiles(member.name, split_file, control, names, refused) for entrant in entrants
        for member in entrant.members if save_predictions
    }
    board, chosen = _run(studies, asked, saved, progress)
    common = {
        "dataset": place["name"], "perturbation_column": perturbation_column, "protocol": split, "values": place["values"],
        "totals": reading.totals, "seeds": split_file.repetitions, "folds": split_file.folds,
        "cells": sum(int((cells.pair >= 0).sum()) for cells in studies),
    }
    rows = report.rows(board, entrants, rivals, predictor, common, checked.overlap, TRANSDUCTIVE if allow_overlap else UNSEEN)
    pooled_scores = [score for cells in studies if (score := pooled.across_contexts(cells)) is not None]
    compared = report.comparisons(board, entrants, rivals, predictor)
    said = [
        *report.sentences(board, entrants, rivals, compared),
        *report.reading_sentences(reading, studies, unsplit, pooled_scores, caught),
        *(report.target_sentences(studies, vectors) if predictor == RIDGE else []),
        *report.overlap_sentences(checked.overlap),
        *said_of_values,
    ]
    targets = {target for cells in studies for one in cells.perturbations for target in one}
    details = {
        "protocol": report.protocol(predictor, split, split_file),
        "source": place,
        "models": {
            entrant.name: [about | report.values_of(board, name) for about, (name, _) in
                           zip(checked.details[entrant.name], entrant.members, strict=True)]
            for entrant in entrants
        },
        "split_sha256": split_file.digest,
        "cells": reading.counted | {"exact copies": reading.copies},
        "left_out": reading.left_out | ({"not split": unsplit} if unsplit else {}),
        "targets": {"all": len(named.all_targets()), "used": len(targets), "refused": vectors.refusals,
                    "measured": sum(bool(studies[0].target_columns.get(target)) for target in targets)},
        "pooled_controls": pooled_scores, "unmatched_controls": [one._asdict() for one in caught],
        "chosen": chosen,
        "differences": report.differences(board, entrants, rivals),
        "comparisons": compared,
        "seed": seed,
        "versions": versions(),
    }
    beside = {"split.json": split_file.write, **_files(saved)}
    title = f"Change by {perturbation_column} in {place['name']}, {split}"
    return Table(title, rows, report.COLUMNS, said, details, beside, report.MAIN)


def _files(saved: dict[str, SavedProfiles]) -> dict:
    """What writes the predictions, by the file's name."""
    if len(saved) == 1:
        return {"predictions.h5ad": next(iter(saved.values())).write}
    plain = {name: "".join(letter if letter.isalnum() else "_" for letter in name) for name in saved}
    return {f"predictions.{number}.{plain[name]}.h5ad": one.write for number, (name, one) in enumerate(saved.items(), 1)}


def _splittable(reading: Reading, split: str, folds: int, name: str) -> tuple[list[PerturbedCells], list[str]]:
    """The studies that can be split, and why the others cannot."""
    reasons = [why_not(cells, split, folds) for cells in reading.studies]
    judged = list(zip(reading.studies, reasons, strict=True))
    unsplit = [f"{cells.study or 'the file'}: {reason}" for cells, reason in judged if reason]
    studies = [cells for cells, reason in judged if reason is None]
    if not studies:
        raise UserError(f"{name} cannot be split by {split} ({'; '.join(unsplit)}): choose another --split or fewer --folds.")
    return studies, unsplit


def _run(
    studies: list[PerturbedCells], asked: Asked, saved: dict[str, SavedProfiles], progress: bool
) -> tuple[Board, list[dict]]:
    """Scores of every method in every fold, and what was chosen on validation."""
    split, known = asked.split, asked.known
    board, chosen = Board(split.protocol, known.seed), []
    n = sum(len(cells.pair) for cells in studies)
    rounds = [(repetition, number) for repetition in range(split.repetitions) for number in range(len(studies))]
    with threadpool_limits(1 if n < SMALL else None), progress_bar("perturbation", len(rounds), progress) as advance:
        for repetition, number in rounds:
            cells = studies[number]
            scored = halves(np.where(cells.controls, cells.context, -1), cells.hashes, known.seed, repetition)
            everywhere = None
            if saved:
                everywhere = group_means(
                    cells.values, np.where(cells.controls & ~scored, cells.context, -1), len(cells.contexts)
                )
            for fold in make_folds(cells, split, known.seed, repetition):
                held = prepare_fold(cells, fold, scored)
                predictions, strengths = predict_fold(held, known, split.protocol, repetition)
                for name, profiles in asked.profiles.items():
                    predictions[name] = changes_of(profiles, held, repetition, asked.genes)
                for name, one in saved.items():
                    one.add(held, repetition, predictions[name], everywhere)
                chosen.append({"study": cells.study, "repetition": repetition, "fold": fold.number} | {
                    name: "mean" if np.isinf(strength) else strength for name, strength in strengths.items()
                })
                for pair, stratum, scores in score_fold(held, predictions, split.protocol == CELLS, known.seed):
                    board.add(number, cells, pair, stratum, _with_models(scores, asked.entrants))
            advance(1)
    return board, chosen


def _with_models(scores: dict[str, np.ndarray], entrants: list[Entrant]) -> dict:
    """Scores of a pair with those of each model, the mean over its pretraining seeds, and how far it is from all others."""
    means = {entrant.name: np.mean([scores[name] for name, _ in entrant.members], axis=0) for entrant in entrants}
    everything = scores | means
    apart = {
        (entrant.name, name): everything[entrant.name] - values for entrant in entrants for name, values in everything.items()
        if name != entrant.name and name not in {member.name for member in entrant.members}
    }
    return everything | apart


def run_perturbation(config: PerturbationConfig) -> dict:
    """`scbench benchmark perturbation`: write the table to --output, show it, return it as JSON-able values."""
    refuse_existing(config.output)
    model = external.open_model(config.model)
    options = {
        "layer": config.layer, "genes_column": config.genes_column, "values": config.values,
        "max_overlap": config.max_overlap, "allow_overlap": config.allow_overlap, "seed": config.seed,
        "progress": not config.json,
    }
    if config.protocol == "aaai2025":
        from scbench.evaluation.perturbation.prompts import benchmark_prompts_of  # it stands on this folder

        table = benchmark_prompts_of(
            model, config.input, config.perturbation_column, config.control, unseen=config.unseen, **options
        )
    else:
        table = benchmark_perturbation(
            model, config.input, config.perturbation_column, config.control, context=config.context, study=config.study,
            total_counts_column=config.total_counts_column, split=config.split, predictor=config.predictor,
            split_file=None if config.split_file is None else read_split(config.split_file),
            save_predictions=config.save_predictions, seeds=config.seeds, folds=config.folds, **options,
        )
    table.write(config.output)
    if not config.json:
        console = screen(width=200)  # where nobody says how wide it is: the metrics with their intervals side by side
        table.show(console)
        console.print(f"Written to {config.output}: results.json, results.csv, results.md and what goes with them")
    return table.record()
