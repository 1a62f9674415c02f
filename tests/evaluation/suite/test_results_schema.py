"""Every kind of table follows the schema that others can write theirs by, and the schema refuses what is none."""

import copy
import json
from importlib import resources

import anndata
import numpy as np
import pytest
from jsonschema import Draft202012Validator

from scbench.evaluation.classification.benchmark import benchmark_classification
from scbench.evaluation.classification.transfer import benchmark_transfer
from scbench.evaluation.suite.suite import benchmark_suite

SETS = {
    "types": 'task = "classification"\npath = "cells.h5ad"\nlabel = "type"',
    "types-aaai2025": 'task = "classification"\nprotocol = "aaai2025"\npath = "cells.h5ad"\nlabel = "type"',
    "screen": 'task = "perturbation"\npath = "screen.h5ad"\nperturbation_column = "condition"\ncontrol = "control"\n'
              'total_counts_column = "panel"',
    "screen-aaai2025": 'task = "perturbation"\nprotocol = "aaai2025"\npath = "screen.h5ad"\n'
                       'perturbation_column = "condition"\ncontrol = "control"',
    "halves": 'task = "counts"\npath = "cells.h5ad"',
    "gone": 'task = "counts"\npath = "gone.h5ad"',
    "refused": 'task = "classification"\npath = "cells.h5ad"\nlabel = "no such column"',
}


@pytest.fixture
def validator() -> Draft202012Validator:
    schema = json.loads((resources.files("scbench.suites") / "results.schema.json").read_text(encoding="utf-8"))
    Draft202012Validator.check_schema(schema)
    return Draft202012Validator(schema)


def errors(validator, record) -> list[str]:
    return [f"{'/'.join(map(str, error.absolute_path))}: {error.message}" for error in validator.iter_errors(record)]


def screen(cells: anndata.AnnData) -> anndata.AnnData:
    """Cells of nine perturbations and controls."""
    cells.obs["condition"] = ["control" if number % 10 == 0 else f"GENE{number % 10}" for number in range(cells.n_obs)]
    return cells


@pytest.mark.parametrize("names", [
    ("types", "screen", "halves", "gone", "refused"),
    pytest.param(tuple(SETS), marks=pytest.mark.full),  # minutes: trials of many epochs
])
def test_every_table_of_a_suite_and_the_suite_itself(validator, tmp_path, planted_cells, model, names):
    planted_cells(90).write_h5ad(tmp_path / "cells.h5ad")
    screen(planted_cells(260)).write_h5ad(tmp_path / "screen.h5ad")
    for seed in ("0", "1"):
        model.save_pretrained(tmp_path / seed, {"seed": seed})
    entries = "".join(f'[[dataset]]\nname = "{name}"\n{SETS[name]}\n' for name in names)
    (tmp_path / "suite.toml").write_text(f"seeds = 1\nfolds = 3\n{entries}")
    models = {"once": [str(tmp_path / "0")], "twice": [str(tmp_path / "0"), str(tmp_path / "1")]}
    table = benchmark_suite(tmp_path / "suite.toml", models, tmp_path / "results")
    status = {one["dataset"]: one["status"] for one in table.details["data_sets"]}
    assert status == {**dict.fromkeys(names, "done"), "gone": "missing", "refused": "failed"}, table.sentences
    written = sorted((tmp_path / "results").rglob("results.json"))
    assert len(written) == len(names) - 2 + 1
    for path in written:
        assert errors(validator, json.loads(path.read_text(encoding="utf-8"))) == [], path
        assert (path.parent / "forest.png").is_file()
    compared = {(one["dataset"], one["model"]): one["sentence"] for one in table.details["comparisons"]}
    assert compared.keys() == {(name, model) for name in names if status[name] == "done" for model in models}
    for (name, _), sentence in compared.items():
        assert "the best baseline, " in sentence and f"{name}: {sentence}" in table.sentences
    for name in names[:-2]:
        seeds = {row["model"]: row["pretraining_seeds"] for row in table.rows
                 if (row["dataset"], row["kind"]) == (name, "model")}
        assert seeds == {"once": 1, "twice": 2}


def test_label_transfer(validator, planted_cells, model):
    table = benchmark_transfer(model, planted_cells(90), planted_cells(60, seed=1), "type")
    assert errors(validator, json.loads(table.files()["results.json"])) == []


def test_what_is_no_table_is_refused(validator, cells, model):
    record = json.loads(benchmark_classification(model, cells, "type", seeds=1, folds=3).files()["results.json"])
    assert errors(validator, record) == []

    def changed(change) -> list[str]:
        other = copy.deepcopy(record)
        change(other)
        return errors(validator, other)

    first = "rows/0"
    for change, said in [
        (lambda r: r.pop("rows"), "'rows' is a required property"),
        (lambda r: r["rows"].clear(), "rows: [] should be non-empty"),
        (lambda r: r["rows"][0].pop("accuracy"), f"{first}: 'accuracy' is a required property"),
        (lambda r: r["rows"][0].pop("kind"), f"{first}: 'kind' is a required property"),
        (lambda r: r["rows"][0].update(accuracy=1.2), f"{first}/accuracy: 1.2 is greater than the maximum"),
        (lambda r: r["rows"][0].update(accuracy=None), f"{first}/accuracy: None is not of type 'number'"),
        (lambda r: r["rows"][0].update(task="clustering"), f"{first}/task: 'clustering' is not one of"),
        (lambda r: r["rows"][0].update(kind="ours"), f"{first}/kind: 'ours' is not one of"),
        (lambda r: r["rows"][0].update(overlap="none"), f"{first}/overlap: 'none' is not one of"),
        (lambda r: r["rows"][0].update(status="missing"), f"{first}: 'reason' is a required property"),
        (lambda r: r.update(split_sha256="abc"), "split_sha256: 'abc' does not match"),
        (lambda r: r["comparisons"][0].pop("sentence"), "comparisons/0: 'sentence' is a required property"),
        (lambda r: r["comparisons"][0].update(verdict="wins"), "comparisons/0/verdict: 'wins' is not one of"),
    ]:
        found = changed(change)
        assert any(said in one for one in found), (said, found)
    assert changed(lambda r: r["rows"][0].update(mine=np.pi)) == []
