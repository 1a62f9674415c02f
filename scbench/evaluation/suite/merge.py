"""One table of the tables that a function makes of each model alone: the protocols of the reference."""

from collections.abc import Mapping, Sequence
from statistics import fmean

import numpy as np

from scbench.evaluation.entrants import MODEL, untrained_name
from scbench.evaluation.perturbation.prompt_report import BASE, NOTHING, PROMPT
from scbench.evaluation.report import Table

OWN = {  # what depends on the model, and what it is called beside others
    MODEL: "{}", PROMPT: "{}", untrained_name(MODEL): untrained_name("{}"), BASE: f"{{}}, {BASE}", NOTHING: f"{{}}, {NOTHING}",
}


def merge(tables: Mapping[str, Sequence[Table]]) -> Table:
    """Tables of pretraining seeds by model, on the same data, as one.

    Rows of a model, and of what depends on it, are means over its seeds, with `pretraining_seeds` and the metric's standard
    deviation over them. A baseline that does not depend on the model stands there once, unless a model's genes change it.
    """
    rows, said, compared = [], [], []
    every = [table.sentences for several in tables.values() for table in several]
    for name, several in tables.items():
        for row in _mean_rows(several):
            row["model"] = _called(row["model"], name)
            if row in rows:
                continue
            if any((row["model"], row["probe"]) == (other["model"], other["probe"]) for other in rows):
                row["model"] = f"{row['model']}, on the genes of {name}"
            rows.append(row)
        for number, table in enumerate(several, 1):
            which = name if len(several) == 1 else f"{name}, pretraining seed {number}"
            own = {line: f"{which}: {line}" for line in table.sentences if not all(line in lines for lines in every)}
            said += own.values()
            compared += [
                {**one, "model": _called(one["model"], name), "baseline": _called(one["baseline"], name),
                 "sentence": own.get(one["sentence"], one["sentence"])}
                for one in table.details["comparisons"]
            ]
    first = next(iter(tables.values()))[0]
    said += [line for line in first.sentences if all(line in lines for lines in every)]
    rows.sort(key=lambda row: row["kind"] != "model")
    details = {
        **first.details, "comparisons": compared,
        "models": {name: [table.details for table in several] for name, several in tables.items()},
    }
    return first._replace(rows=rows, sentences=said, details=details)


def _called(row: str, model: str) -> str:
    """What a row of a model's own table is called beside others."""
    return OWN.get(row, row).format(model)


def _mean_rows(several: Sequence[Table]) -> list[dict]:
    """The rows of one model's tables, numbers averaged over them."""
    metric, found = several[0].metric, []
    for same in zip(*(table.rows for table in several), strict=True):
        row = dict(same[0])
        for field, value in row.items():
            if isinstance(value, float):
                row[field] = fmean(one[field] for one in same)
        spread = float(np.std([one[metric] for one in same], ddof=1)) if len(same) > 1 else None
        found.append({**row, "pretraining_seeds": len(same), f"{metric}_pretraining_sd": spread})
    return found
