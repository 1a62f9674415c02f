"""The verb `scbench compare`: structures, or options of one, under the same loader, objective and budget.

The directory of a comparison:

    compare.json                      what was asked for; another command is refused
    baselines.json                    what needs no model
    runs/                             see runs.py
    results.json, .csv, .md           a row a structure or setting
    runs.csv                          a row a run
    effects.json, .csv, .md           --vary: paired differences
    quality.png, accuracy.png         against the FLOPs of a cell, where rows differ in them
    effects.png                       --vary
"""

import json
import os
import sys

from scbench.config import CompareConfig
from scbench.data.store import Store
from scbench.errors import UserError
from scbench.evaluation.compare import plots
from scbench.evaluation.compare.effects import effects, effects_table
from scbench.evaluation.compare.plan import plan
from scbench.evaluation.compare.report import compares_costs, options_record, results_table, runs_csv
from scbench.evaluation.compare.runs import baseline_rows, run_row
from scbench.evaluation.labelled_cells import ModelCells, read_stored_cells
from scbench.evaluation.report import Table, screen
from scbench.files import refuse_existing, write_text

WIDE = 200  # columns, for so many numbers a row


def compare(config: CompareConfig) -> tuple[Table, Table | None]:
    """Run what is not done yet of a comparison, and write its tables and pictures.

    Returns the table, and with --vary that of the effects.

    Raises
    ------
    UserError
        For options that make no sense, a store without what is needed, or a directory of another comparison.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise UserError("scbench compare runs in one process: start it without torchrun, srun or deepspeed.")
    planned = plan(config)
    store = Store.open(config.store)
    for split in ("train", "validation", "test"):
        if store.split(split).n_cells == 0:
            raise UserError(f"the store {config.store} has no {split} cells: prepare it with --split .8,.1,.1 or the like.")
    cells = _labelled(config, store)
    _open(config, store)

    def say(line: str) -> None:
        if not config.json:
            print(line, file=sys.stderr, flush=True)

    baselines = baseline_rows(config, store, cells)
    done = {}
    for number, row in enumerate(planned.rows, 1):
        say(f"row {number} of {len(planned.rows)}: {row.name}")
        done[row.name] = run_row(config, store, row, cells, say)
    source = {"fingerprint": store.fingerprint, "sources": store.manifest["sources"]}
    table = results_table(config, planned, done, baselines, source)
    _write(config, table.files() | {"runs.csv": runs_csv(done)})
    if compares_costs(config):
        plots.plot_quality(table.rows, "mvc_loss", config.output / "quality.png")
        if config.label is not None:
            plots.plot_quality(table.rows, "linear_accuracy", config.output / "accuracy.png")
    found = effects(config, [(row, done[row.name]["runs"]) for row in planned.rows]) if config.factors() else []
    if not found:
        return table, None
    second = effects_table(config, found)
    _write(config, second.files("effects"))
    plots.plot_effects(found, config.output / "effects.png")
    return table, second


def _labelled(config: CompareConfig, store: Store) -> ModelCells | None:
    """The test cells that probes predict the label of."""
    if config.label is None:
        return None
    return read_stored_cells(store, "test", config.label, config.evaluation_cells)


def _open(config: CompareConfig, store: Store) -> None:
    """Make the directory, or check that it is this comparison's."""
    path = config.output / "compare.json"
    record = json.loads(json.dumps({**options_record(config), "store_fingerprint": store.fingerprint}))
    if path.is_file():
        before = json.loads(path.read_text(encoding="utf-8"))
        for name, value in record.items():
            if before.get(name) != value:
                option = "the store" if name == "store_fingerprint" else f"--{name.replace('_', '-')}"
                raise UserError(f"{option} was {before.get(name)} when the comparison {config.output} was started and is "
                                f"{value} now: give the same, or another --output.")
        return
    refuse_existing(config.output)
    write_text(path, json.dumps(record, indent=2) + "\n")


def _write(config: CompareConfig, files: dict[str, str]) -> None:
    for name, text in files.items():
        write_text(config.output / name, text)


def run_compare(config: CompareConfig) -> dict:
    """`scbench compare`: show the table, return it as JSON-able values."""
    table, second = compare(config)
    if not config.json:
        console = screen(width=WIDE)
        table.show(console)
        for line in second.sentences if second else []:
            console.print(f"- {line}", markup=False)
        console.print(f"Written to {config.output}: results, runs.csv, plots")
    return table.record() | ({"effects": second.rows} if second else {})
