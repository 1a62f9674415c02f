"""Every benchmark of a suite for every model, in one table; the verb `scbench benchmark suite`.

The directory of a suite's results:

    suite.json                        what was asked for; another command is refused
    classification/NAME/ …            a data set's own table, as the task's own verb writes it
    results.json, .csv, .md           a row a data set, model or baseline, and probe
    forest.png                        the same as points with intervals

A data set whose file is not there is "missing"; one whose benchmark refused is "failed", and the others go on. The same
command again makes what is not there yet: after an interruption, or when a missing file was put in place.
"""

import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from scbench import __version__
from scbench.config import SuiteConfig
from scbench.errors import UserError
from scbench.evaluation.classification.label_flags import ORIGINS
from scbench.evaluation.forest import EVERYTHING, forest_plot
from scbench.evaluation.report import Column, IntervalColumn, Table, screen, versions
from scbench.evaluation.scores import LOWER_IS_BETTER
from scbench.evaluation.suite import tasks, wilcoxon
from scbench.evaluation.suite.file import AAAI2025, CLASSIFICATION, UNKNOWN, DataSet, Suite, read_suite
from scbench.evaluation.suite.models import SuiteModels, identify, name_models
from scbench.files import refuse_existing, sha256, write_text

DONE, MISSING, FAILED = "done", "missing", "failed"


class Outcome(NamedTuple):
    """What became of a data set."""

    dataset: DataSet
    status: str  # DONE, MISSING or FAILED
    reason: str | None = None  # why it is not done, and what to do
    record: dict | None = None  # its results.json


COLUMNS = [
    Column("data set", ("dataset",)),
    Column("task", ("task",)),
    Column("protocol", ("protocol",)),
    Column("model", ("model",)),
    Column("probe", ("probe",)),
    Column("metric", ("metric",)),
    IntervalColumn("value", ("value",), "{:.3f}"),
    Column("cells", ("cells",)),
    Column("overlap", ("overlap",)),
    Column("status", ("status",)),
]


def benchmark_suite(
    suite: Path | str,
    models: Mapping[str, Sequence[str]],
    output: Path | str,
    *,
    data: Path | str | None = None,
    scvi: bool = False,
    max_overlap: float = 0.01,
    allow_overlap: bool = False,
    seed: int = 0,
    progress: bool = False,
) -> Table:
    """Run what is not done yet of a suite, write its tables, and return the one over all data sets.

    Parameters
    ----------
    suite
        A TOML file (see file.py), or the name of a suite that comes with scbench.
    models
        What `external.open_model` takes, by the model's name; several are pretraining seeds of it. "{dataset}" in it stands
        for a data set's name.
    output
        The directory of the results. One that the same command began is gone on with.
    data
        Where relative paths of the suite start; by default its own folder, of a shipped one the present folder.
    scvi
        Train scVI as a baseline of classification too.
    max_overlap, allow_overlap, seed, progress
        As in `benchmark_classification`.

    Raises
    ------
    UserError
        If the suite or a model cannot be read, or the directory is of another command. A data set whose benchmark refuses is a
        row with status "failed", and raises nothing here.
    """
    output, read = Path(output), read_suite(suite)
    opened = SuiteModels(models)
    _begin(output, {
        "suite": read.sha256, "models": identify(models), "scvi": scvi, "max_overlap": max_overlap,
        "allow_overlap": allow_overlap, "seed": seed, "scbench": __version__,
    })
    options = {"max_overlap": max_overlap, "allow_overlap": allow_overlap, "seed": seed, "progress": progress}
    outcomes = []
    for number, dataset in enumerate(read.datasets, 1):
        if progress:
            print(f"data set {number} of {len(read.datasets)}: {dataset.name} ({dataset.task})", file=sys.stderr, flush=True)
        folder = Path(data) if data is not None else read.folder
        outcomes.append(_run(dataset, read, opened, folder, output, options, scvi))
    table = _table(read, outcomes, {"models": {name: list(specs) for name, specs in models.items()}, "seed": seed})
    for name, text in table.files().items():
        write_text(output / name, text)
    forest_plot(table.rows, None, output / "forest.png", table.title)
    return table


def _begin(output: Path, asked: dict) -> None:
    """UserError if `output` holds anything but what the same command began."""
    path = output / "suite.json"
    if path.is_file():
        before = json.loads(path.read_text(encoding="utf-8"))
        changed = [name for name in asked if before.get(name) != asked[name]]
        if changed:
            raise UserError(f"{output} holds results of another command ({', '.join(changed)} differ): give another --output.")
        return
    refuse_existing(output)
    write_text(path, json.dumps(asked, indent=2) + "\n")


def _run(
    dataset: DataSet, suite: Suite, models: SuiteModels, folder: Path, output: Path, options: dict, scvi: bool
) -> Outcome:
    """One data set: read what is done already, say what is missing, or run it."""
    files = [folder / path for path in dataset.path]
    file = next((file for file in files if file.exists()), None)
    if file is None:
        named = " or ".join(map(str, files))
        hint = "; ".join(part for part in (f"source: {dataset.source}", dataset.note) if part)
        return Outcome(dataset, MISSING, f"there is no {named}: put one there ({hint}).")
    if (key := tasks.unknown_key(dataset, file)) is not None:
        return Outcome(dataset, MISSING, f"{file} is there, but its {key} is {UNKNOWN!r} in the suite: write it in a copy of "
                                         "the suite and give that.")
    place, digest = output / dataset.task / dataset.name, sha256(file)
    if (place / "results.json").is_file():
        record = json.loads((place / "results.json").read_text(encoding="utf-8"))
        if record["input"]["sha256"] == digest:
            return Outcome(dataset, DONE, record=record)
        return Outcome(dataset, FAILED, f"{file} is not the file that {place} was made from: remove {place} to have it made "
                                        "again.")
    try:
        table = tasks.run(dataset, file, models.of(dataset.name), folder, suite.seeds, suite.folds, scvi, options)
    except UserError as error:
        return Outcome(dataset, FAILED, str(error))
    table = _annotated(table, dataset, file, digest)
    table.write(place)
    return Outcome(dataset, DONE, record=json.loads(table.files()["results.json"]))


def _annotated(table: Table, dataset: DataSet, file: Path, digest: str) -> Table:
    """A data set's own table with what the suite says of it; rows have the suite's name of it."""
    details = {**table.details, "input": {"file": file.name, "sha256": digest},
               "data_set": {"source": dataset.source, "note": dataset.note}}
    said = list(table.sentences)
    if dataset.task == CLASSIFICATION:
        flagged, origin = details["label_flags"], ORIGINS[dataset.label_origin]
        said.append(origin)
        details["label_flags"] = {**flagged, "sentences": [origin, *flagged["sentences"]], "origin": dataset.label_origin}
    said.append(f"Source of the data: {dataset.source}.")
    rows = [{**row, "dataset": dataset.name} for row in table.rows]
    return table._replace(rows=rows, sentences=said, details=details)


def _table(suite: Suite, outcomes: list[Outcome], details: dict) -> Table:
    """All data sets in one table."""
    rows = [row for outcome in outcomes for row in _rows(outcome)]
    fields = list(dict.fromkeys(field for row in rows for field in row))
    rows = [{field: row.get(field) for field in fields} for row in rows]
    compared = _comparisons(outcomes)
    tests, said = _over_sets(outcomes)
    details |= {
        "suite": {"title": suite.title, "sha256": suite.sha256},
        "data_sets": [
            {"dataset": one.dataset.name, "task": one.dataset.task, "status": one.status, "reason": one.reason,
             "source": one.dataset.source, "label_origin": one.dataset.label_origin,
             "input": one.record and one.record["input"]}
            for one in outcomes
        ],
        "comparisons": compared, "wilcoxon": tests, "versions": versions(),
    }
    spoken = dict.fromkeys(f"{one['dataset']}: {one['sentence']}" for one in compared)
    said = [*_status_sentences(outcomes), *spoken, *said, *_flag_sentences(outcomes)]
    return Table(suite.title, rows, COLUMNS, said, details)


def _rows(outcome: Outcome) -> list[dict]:
    """The rows of a data set; one that says why, if there are none."""
    dataset = outcome.dataset
    same = {"task": dataset.task, "dataset": dataset.name, "status": outcome.status, "reason": outcome.reason}
    nothing = dict.fromkeys(("model", "kind", "probe", "protocol", "metric", "value", "value_low", "value_high", "cells",
                             "overlap"))
    if outcome.record is None:
        return [{**same, **nothing}]
    metric = outcome.record["metric"]
    return [
        {
            **same, **nothing, **row, **same, "metric": metric, "value": row[metric], "value_low": row.get(f"{metric}_low"),
            "value_high": row.get(f"{metric}_high"),
        }
        for row in outcome.record["rows"] if row.get("stratum") in (None, EVERYTHING)
    ]


def comparable(rows: list[dict]) -> list[dict]:
    """The rows of a data set that answer one question: with a value, and for all the pairs that any row has (a baseline that
    is defined for some perturbations alone has easier ones)."""
    most = max((row.get("pairs") or 0 for row in rows), default=0)
    return [row for row in rows if row["value"] is not None and (row.get("pairs") or most) == most]


def _over_sets(outcomes: list[Outcome]) -> tuple[list[dict], list[str]]:
    """Wilcoxon tests of each task and protocol over its data sets, and what they say."""
    groups: dict[tuple, list[Outcome]] = {}
    for one in outcomes:
        if one.record is not None:
            key = one.dataset.task, one.dataset.protocol, one.dataset.split, one.record["metric"]
            groups.setdefault(key, []).append(one)
    tests, said = [], []
    for (task, protocol, split, metric), group in groups.items():
        rows = {one.dataset.name: comparable(_rows(one)) for one in group}
        scores = {name: {(row["model"], row["probe"]): row["value"] for row in several} for name, several in rows.items()}
        kinds = {(row["model"], row["probe"]): row["kind"] for several in rows.values() for row in several}
        found = wilcoxon.compare_over_sets(scores, kinds, -1 if metric in LOWER_IS_BETTER else 1)
        title = " ".join(filter(None, (task, protocol, split)))
        tests += [{"task": task, "protocol": protocol, "split": split, "metric": metric, **one} for one in found]
        said += [f"{title}: {sentence}" for sentence in wilcoxon.sentences(found, metric)]
    return tests, said


def _status_sentences(outcomes: list[Outcome]) -> list[str]:
    counted = ", ".join(f"{sum(one.status == status for one in outcomes)} {status}" for status in (DONE, MISSING, FAILED))
    return [
        f"{len(outcomes)} data sets: {counted}.",
        *(f"{one.dataset.name} ({one.dataset.task}), {one.status}: {one.reason}" for one in outcomes if one.status != DONE),
    ]


def _comparisons(outcomes: list[Outcome]) -> list[dict]:
    """How each model stands to the best baseline of each data set, in the metric of this table."""
    return [
        {"dataset": one.dataset.name, **compared} for one in outcomes if one.record is not None
        for compared in one.record["comparisons"] if compared["metric"] == one.record["metric"]
    ]


def _flag_sentences(outcomes: list[Outcome]) -> list[str]:
    """What stands in the way of believing a data set's numbers."""
    said = []
    for one in outcomes:
        if one.record is None:
            continue
        flagged = list(one.record.get("label_flags", {}).get("sentences", []))
        if one.dataset.values != "counts":
            flagged.append(f"Values are taken as {one.dataset.values}, not as counts.")
        if one.dataset.protocol == AAAI2025:
            flagged.append(f"The protocol {AAAI2025} is optimistic (its own table says why).")
        said += [f"{one.dataset.name}: {sentence}" for sentence in flagged]
    return said


def run_suite(config: SuiteConfig) -> dict:
    """`scbench benchmark suite`: write everything to --output, show the table, return it as JSON-able values.

    UserError at the end, when all is written, if a data set failed.
    """
    table = benchmark_suite(
        config.suite, name_models(config.specs()), config.output, data=config.data, scvi=config.scvi,
        max_overlap=config.max_overlap, allow_overlap=config.allow_overlap, seed=config.seed, progress=not config.json,
    )
    if not config.json:
        console = screen(width=160)
        table.show(console)
        console.print(f"Written to {config.output}: results.json, results.csv, results.md, forest.png, a folder a data set")
    failed = [one["dataset"] for one in table.details["data_sets"] if one["status"] == FAILED]
    if failed:
        raise UserError(f"{len(failed)} of {len(table.details['data_sets'])} data sets failed ({', '.join(failed)}): see "
                        f"{config.output}/results.md, mend what it says and run the same command again.")
    return table.record()
