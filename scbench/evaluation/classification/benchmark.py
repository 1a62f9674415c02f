"""Benchmark: predict a label of each cell from frozen embeddings, beside baselines, on cells the models never saw.

Protocol: the cells, or whole groups of them, are dealt to folds by hashes of their names; each fold tests once, the next one
validates, the others train. Everything is fitted on training cells; what has a strength chooses it on validation cells. With
`seeds` different dealings every cell has an out-of-fold prediction in every repetition. Metrics are means over repetitions;
their 95 % intervals come from a bootstrap over cells, or over groups, that is the same for all methods, so methods can be
compared pair by pair.
"""

import hashlib
from pathlib import Path

import anndata
import numpy as np

from scbench.config import ClassificationConfig, Values
from scbench.data.sources.anndata import AnnDataSource
from scbench.errors import UserError
from scbench.evaluation import baselines, embed, probes
from scbench.evaluation.classification import report, scvi_baseline
from scbench.evaluation.classification.cells import embeddings_of, take_part
from scbench.evaluation.classification.label_flags import flags
from scbench.evaluation.classification.probing import (
    DEPTH,
    GENES,
    MAJORITY,
    NO_PROBE,
    PCA,
    SCVI,
    depth_r2,
    predict,
    strengths_of,
)
from scbench.evaluation.classification.report import BASELINE_KIND, COLUMNS, MODEL_KIND
from scbench.evaluation.classification.selection import GRID
from scbench.evaluation.entrants import UNTRAINED, Checked, Entrant, Model, Models, called, entrants_of, networks_of
from scbench.evaluation.external import open_model
from scbench.evaluation.folds import TASK
from scbench.evaluation.guard import UNSEEN
from scbench.evaluation.labelled_cells import LabelledCells, ModelCells
from scbench.evaluation.progress import progress_bar
from scbench.evaluation.reference_cells import described, labelled_source, open_reference_pt, values_sentences
from scbench.evaluation.report import Table, screen, versions
from scbench.evaluation.scores import RESAMPLES, score
from scbench.evaluation.split_files import Split, read_split
from scbench.files import refuse_existing
from scbench.models.model import ExpressionModel


def benchmark_classification(
    models: Model | Models,
    source: AnnDataSource | anndata.AnnData | Path | str,
    label: str | None = None,
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
    scvi: bool = False,
    progress: bool = False,
) -> Table:
    """The table of some models on one labelled set of cells.

    Parameters
    ----------
    models
        By name, each with its pretraining seeds: pretrained models, external embeddings, predictions. Or a single one.
    source
        Raw counts and labels; or the path of the reference's .pt file, for models on the reference's token ids.
    label
        Column of obs to predict; a .pt file implies it. Missing labels (NaN, '', unknown, na, …), exact copies and classes
        under 10 cells are left out.
    group
        Column of obs (donor, dataset, platform) whose groups are held out whole; classes in fewer than 3 are left out.
    split
        Folds to use instead of drawing them: `folds` and `seeds` are then its own.
    values
        What the source holds, if not counts (see `embed.opened`).
    layer, genes_column
        As in `scbench.embed`.
    seeds, folds
        How often the cells are dealt to folds, and to how many (3 or more; no more than there are groups).
    max_overlap
        Refuse if a model was trained or validated on a larger share of the labelled cells (see `scbench.find_seen_cells`).
        Up to it, such cells are left out for all models; the folds of the others stay what they are.
    allow_overlap
        Keep the cells that models were trained or validated on; the models' rows are then marked "transductive".
    seed
        Of the folds, the bootstrap, the gene draws, the untrained models and scVI.
    scvi
        Train scVI on each fold's training cells too, as a baseline; it needs scvi-tools.
    progress
        Show a progress bar if on a terminal.

    Raises
    ------
    UserError
        If the label, the group or the split can't be used, too few cells remain, or a model has seen too many.
    """
    entrants = entrants_of(models, (UNTRAINED, DEPTH, GENES, MAJORITY, SCVI, f"{PCA}( [0-9]+)?"))
    names = [entrant.name for entrant in entrants]
    if scvi:
        scvi_baseline.check_installed()
    ours = list(networks_of(entrants).values())
    options = {"layer": layer, "genes_column": genes_column, "values": values}
    with labelled_source(ours[0] if ours else None, source, label, **options) as (opened, label):
        if opened.kind == "pt":
            for model in ours[1:]:
                open_reference_pt(source, model)  # refuses other token ids
        taken = take_part(entrants, opened, label, group, split, folds, seeds, seed,
                          {"max_overlap": max_overlap, "allow_overlap": allow_overlap, "progress": progress})
        embeddings = embeddings_of(entrants, taken, opened, seed, progress)
        given = {"task": TASK, "dataset": opened.name, "label": label, "values": described(opened)["values"],
                 "protocol": f"{taken.split.folds}-fold by {'cell' if group is None else group}"}
        flagged = flags(opened.obs, label)
        details = {"source": described(opened), **flagged.details()}
        spoken_values = values_sentences(opened)
    cells, split, checked = taken.cells, taken.split, taken.checked
    beside = (DEPTH, PCA, GENES, MAJORITY, *((SCVI,) if scvi else ()))
    found = predict(cells, embeddings, taken.parts, seed, progress, beside=beside)
    predictions = {**{(name, NO_PROBE): each for name, each in taken.predictions.items()}, **found.predictions}
    predictions = dict(sorted(predictions.items(), key=lambda item: _place(item[0][0], names)))
    flat = {method: each.reshape(-1, len(cells.classes)) for method, each in predictions.items()}
    scores = score(cells.classes, flat, seed, cells.groups)
    r2 = depth_r2(cells, found.depths)
    groups = None if group is None else len(cells.group_names)
    counted = {"seeds": split.repetitions, "folds": split.folds, "cells": len(cells.classes),
               "classes": len(cells.class_names), "groups": groups}
    accuracies = {method: (each == cells.classes).mean(axis=(1, 2)).tolist() for method, each in predictions.items()}
    rows = [
        report.row(
            method, MODEL_KIND if method[0] in names else BASELINE_KIND, checked.overlap.get(method[0], UNSEEN),
            scores[method], accuracies[method], r2.get(method[0]), given, counted,
        )
        for method in predictions
    ]
    compared = report.comparisons_of(scores, names)
    confusion = report.confusions(cells.classes, predictions, cells.class_names)
    details |= {
        "protocol": _protocol(split, group), "split_sha256": split.digest,
        "models": checked.details,
        "cells": {**cells.counted, "classes": cells.class_sizes(), "dropped_classes": cells.dropped_classes},
        "cells_sha256": digest(cells), "differences": report.differences_of(scores, names), "comparisons": compared,
        "strengths": strengths_of(found),
        "pretraining": [{"model": method[0], "probe": method[1], "accuracy": each}
                        for method, each in accuracies.items() if len(each) > 1],
        "confusion": confusion, "seed": seed, "versions": versions(),
    }
    said = [
        *report.sentences(compared, r2, names), *report.seeds_sentences(rows),
        *report.groups_sentences(group, groups), *cells.sentences(), *_guard_sentences(entrants, checked), *spoken_values,
        *flagged.sentences,
        *([] if scvi else ["scVI was not run: give --scvi, with scvi-tools installed."]),
    ]
    title = f"Classification of {label} in {opened.name}"
    beside_it = {"split.json": split.write, "confusion.csv": report.confusion_csv(confusion)}
    return Table(title, rows, COLUMNS, said, details, beside_it, "accuracy")


def _place(name: str, models: list[str]) -> int:
    """Models first, in their order."""
    return models.index(name) if name in models else len(models)


def _guard_sentences(entrants: list[Entrant], checked: Checked) -> list[str]:
    """What the leakage guard says of each model, each sentence once."""
    said = [sentence for entrant in entrants for member in entrant.members
            for sentence in checked.guards[member.name].sentences(called(entrant, entrants))]
    return list(dict.fromkeys(said))


def origin(model: ExpressionModel, cells: ModelCells, seed: int) -> dict:
    """What the table of one model is made of, JSON-able: the model, the cells, the seed and the versions of the software."""
    return {
        "model": {"fingerprint": embed.fingerprint(model), "provenance": model.provenance},
        "cells": {
            **cells.counted, "seen": cells.seen, "classes": cells.class_sizes(), "dropped_classes": cells.dropped_classes,
        },
        "cells_sha256": digest(cells),
        "gene_matching": cells.matching,
        "seed": seed,
        "versions": versions(),
    }


def embed_cells(model: ExpressionModel, cells: ModelCells, seed: int, progress: str | bool) -> np.ndarray:
    with progress_bar(str(progress), len(cells.hashes), bool(progress)) as advance:
        return embed.encode(model, cells.tokens, cells.hashes, seed=seed, advance=advance)


def digest(cells: LabelledCells) -> str:
    """SHA-256 of the cells that took part, whatever their order: their counts of all genes, and their labels."""
    order = np.argsort(cells.content, kind="stable")
    found = hashlib.sha256(cells.content[order].astype("<u8").tobytes())
    found.update(cells.classes[order].astype("<i8").tobytes())
    found.update("\0".join(cells.class_names).encode())
    return found.hexdigest()


def _protocol(split: Split, group: str | None) -> str:
    what = "stratified, over cells" if group is None else f"over whole groups of {group!r}, classes spread as evenly as can be"
    return (
        f"{split.folds} folds, {what}, dealt {split.repetitions} times by hashes of names; each tests once, the next one "
        f"validates, the others train; {embed.SUBSETS}; "
        f"k-NN: k = {probes.NEIGHBOURS}, Euclidean, unweighted; linear: multinomial logistic regression, L2, C of "
        f"{', '.join(f'{strength:g}' for strength in GRID)} chosen by balanced accuracy on "
        "validation cells, not fitted again, on features standardised by the training cells (not standardised for "
        f"{GENES}: log1p of counts per 10,000 of the {baselines.VARIABLE_GENES:,} genes of largest variance); PCA: so many "
        "components (or all there are) of log1p of counts per 10,000, all genes; everything is fitted on training cells; "
        f"intervals: 2.5 and 97.5 percentiles of {RESAMPLES:,} bootstrap resamples of the "
        f"{'cells' if group is None else 'groups'}, the same for all methods; the best baseline is the one of the highest "
        "accuracy on the same test cells, which favours baselines a little"
    )


def run_classification(config: ClassificationConfig) -> dict:
    """`scbench benchmark classification`: write the table to --output, show it, return it as JSON-able values."""
    refuse_existing(config.output)
    model = open_model(config.model)
    options = {
        "layer": config.layer, "genes_column": config.genes_column, "values": config.values,
        "max_overlap": config.max_overlap, "allow_overlap": config.allow_overlap, "seed": config.seed,
        "progress": not config.json,
    }
    if (config.protocol != "default" or config.train is not None) and not isinstance(model, ExpressionModel):
        raise UserError(f"--protocol aaai2025 and label transfer take a model directory, not {config.model}.")
    if config.protocol == "aaai2025":
        from scbench.evaluation.classification.aaai2025 import benchmark_aaai2025  # it stands on this file

        table = benchmark_aaai2025(model, config.input, config.label, **options)
    elif config.train is not None:
        from scbench.evaluation.classification.transfer import benchmark_transfer  # it too

        table = benchmark_transfer(model, config.train, config.test, config.label, **options)
    else:
        table = benchmark_classification(
            model, config.input, config.label, group=config.group, seeds=config.seeds, folds=config.folds, scvi=config.scvi,
            split=None if config.split_file is None else read_split(config.split_file), **options,
        )
    table.write(config.output)
    if not config.json:
        console = screen()
        table.show(console)
        console.print(f"Written to {config.output}: results.json, results.csv, results.md and what goes with them")
    return table.record()
