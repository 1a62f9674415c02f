"""The tables of a comparison: a row a structure or setting, and a row a run."""

import csv
import io

from scbench.config import CompareConfig
from scbench.evaluation.compare.effects import EstimateColumn, estimate
from scbench.evaluation.compare.plan import Plan, Row
from scbench.evaluation.compare.runs import ERRORS, HEADS, PROBES
from scbench.evaluation.report import Column, Table

ESTIMATES = (*(f"{head}_{name}" for head in HEADS for name in ERRORS), *PROBES, "depth_r2")
PLAIN = ("row", "kind", "structure", "pooling", "layers", "width", "seeds", "diverged", "lr", "steps", "parameters",
         "encoder_parameters", "tokens_per_cell", "training_flops_per_cell", "activation_bytes_per_cell", "cells_per_second",
         "seconds", "search_steps", "search_seconds")
COSTS = [
    Column("parameters", ("parameters",), "{:,}"),
    Column("FLOPs/cell", ("training_flops_per_cell",), "{:.2e}"),
    Column("cells/s", ("cells_per_second",), "{:,.0f}"),
    Column("kept bytes/cell", ("activation_bytes_per_cell",), "{:.2e}"),
]
LOSSES = [
    EstimateColumn("MVC loss", ("mvc_loss",), "{:.4f}"),
    EstimateColumn("regression loss", ("regression_loss",), "{:.4f}"),
]
PROBE_COLUMNS = [
    EstimateColumn("k-NN", ("knn_accuracy",), "{:.3f}"),
    EstimateColumn("linear", ("linear_accuracy",), "{:.3f}"),
    EstimateColumn("depth R²", ("depth_r2",), "{:.2f}"),
]
OFFSET = "gene mean + cell offset"  # the baseline that a model should beat


def results_table(config: CompareConfig, plan: Plan, done: dict[str, dict], baselines: dict, store: dict) -> Table:
    """The table of a comparison.

    Parameters
    ----------
    config, plan
        What was compared.
    done
        What `runs.run_row` returned, by the row's name.
    baselines
        What `runs.baseline_rows` returned.
    store
        Its name and fingerprint, for the record.
    """
    factors = config.factors()
    rows = [_model_row(config, row, done[row.name]) for row in plan.rows] + _baseline_rows(baselines, factors)
    columns = [Column("row", ("row",)), Column("rate", ("lr",), "{:g}"), Column("steps", ("steps",), "{:,}")]
    columns += COSTS if compares_costs(config) else []
    columns += LOSSES + (PROBE_COLUMNS if config.label is not None else [])
    subject = f"options of {config.structure or 'transformer'}" if factors else "structures"
    title = f"Comparison of {subject}, {budget_text(config)} a run"
    details = {
        "options": options_record(config), "store": store, "refused": plan.refused, "law": baselines["law"],
        "searches": {name: one["rates"] for name, one in done.items()},
    }
    return Table(title, rows, columns, _sentences(config, plan, rows), details)


def compares_costs(config: CompareConfig) -> bool:
    """Whether the rows differ in what a cell costs."""
    return not config.factors() or "size" in config.factors()


def _model_row(config: CompareConfig, row: Row, done: dict) -> dict:
    planned, runs = done["plan"], done["runs"]
    speeds = [run["cells_per_second"] for run in runs]
    shape = {name: row.options.get(name, getattr(config, name)) for name in ("layers", "width")}
    fields = {
        "row": row.name, "kind": "model", "structure": row.options["structure"], "pooling": row.options.get("pooling"),
        **shape, **row.levels, "seeds": len(runs), "diverged": len(done["diverged"]), "lr": done["rates"]["chosen"],
        "steps": planned["steps"], "parameters": planned["parameters"], "encoder_parameters": planned["encoder_parameters"],
        "tokens_per_cell": planned["tokens"], "training_flops_per_cell": planned["flops"],
        "activation_bytes_per_cell": planned["activations"],
        "cells_per_second": sum(speeds) / len(speeds) if speeds else None, "seconds": sum(run["seconds"] for run in runs),
        "search_steps": done["rates"]["steps"], "search_seconds": done["rates"]["seconds"],
    }
    return _row(fields, {name: [run[name] for run in runs if run[name] is not None] for name in ESTIMATES})


def _baseline_rows(baselines: dict, factors: tuple[str, ...]) -> list[dict]:
    """Baselines of the loss and of the probes. Both heads predict the same genes, so a loss stands in both columns."""
    nothing = dict.fromkeys(factors)
    rows = []
    for errors in baselines["errors"]:
        values = {f"{head}_{name}": [errors[field]] for head in HEADS for name, field in ERRORS.items()}
        rows.append(_row({"row": errors["method"], "kind": "baseline", **nothing}, values))
    for name, found in baselines["probes"].items():
        values = {field: [value] for field, value in found.items() if value is not None}
        rows.append(_row({"row": name, "kind": "baseline", **nothing}, values))
    return rows


def _row(fields: dict, estimates: dict[str, list[float]]) -> dict:
    """A row with all its fields, in one order."""
    row = {**dict.fromkeys(PLAIN), **fields}
    for name in ESTIMATES:
        row |= estimate(estimates.get(name, [])).fields(name)
    return row


def budget_text(config: CompareConfig) -> str:
    """The budget in words."""
    for name, unit in [("tokens", "tokens"), ("flops", "FLOPs"), ("seconds", "seconds")]:
        value = getattr(config, f"budget_{name}")
        if value is not None:
            return f"{value:,.0f} {unit}" if value < 1e9 else f"{value:.3g} {unit}"
    raise ValueError("a comparison has a budget")


def options_record(config: CompareConfig) -> dict:
    """The options that decide what a comparison computes, JSON-able."""
    return {name: value for name, value in vars(config).items() if name not in ("store", "output", "json", "debug")}


def _sentences(config: CompareConfig, plan: Plan, rows: list[dict]) -> list[str]:
    models = [row for row in rows if row["kind"] == "model"]
    seeds = "one seed"
    if config.seeds > 1:
        seeds = f"mean of {config.seeds} seeds ± half the 95 % interval (Student's t over seeds)"
    said = [
        f"Losses: mean squared error of masked genes of the test split in log1p counts, uniform gene subsets; {seeds}.",
    ]
    if compares_costs(config):
        said.append("Parameters: all but the gene table (a graph encoder's factor tables count). FLOPs/cell: needed in "
                    "training, counted analytically. Kept bytes: activations that wait for the backward pass. cells/s: median "
                    "step on this machine, indicative.")
    if len(config.rates()) > 1:
        tried = sum(row["search_seconds"] for row in models)
        final = sum(row["seconds"] for row in models)
        said.append(f"Each row tried the rates {', '.join(f'{rate:g}' for rate in config.rates())} on a fifth of the budget, "
                    f"first seed, and kept the best on validation cells: {tried:,.0f} s in all, beside {final:,.0f} s of the "
                    "runs themselves.")
    offset = next(row["mvc_loss"] for row in rows if row["row"] == OFFSET)
    losses = {row["row"]: row["regression_loss"] if row["mvc_loss"] is None else row["mvc_loss"] for row in models}
    above = [name for name, loss in losses.items() if loss is not None and loss >= offset]
    below = sum(loss is not None and loss < offset for loss in losses.values())
    others = f"; not: {', '.join(above)}" if above and not config.factors() else ""
    said.append(f"Below {OFFSET} ({offset:.4f}): {below} of {len(models)} rows{others}.")
    said += [f"{row['row']}: {row['diverged']} of {config.seeds} runs diverged." for row in models if row["diverged"]]
    said += [f"{row['row']}: diverged at every rate." for row in models if row["lr"] is None]
    said += [f"Refused: {refused['name']}: {refused['reason']}" for refused in plan.refused]
    return said


def runs_csv(done: dict[str, dict]) -> str:
    """One row a run, with everything that was measured of it."""
    rows = [{"row": name, **run} for name, one in done.items() for run in one["runs"]]
    text = io.StringIO()
    writer = csv.DictWriter(text, fieldnames=list(rows[0]) if rows else ["row"], lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue()
