"""The verb that benchmarks classification: what it writes and shows, and what is refused."""

import csv
import json

import numpy as np
import pytest
from planted_tables import ONCE, hashes_of

from scbench.config import ClassificationConfig
from scbench.errors import UserError
from scbench.evaluation import embed
from scbench.evaluation.classification.benchmark import benchmark_classification, run_classification
from scbench.evaluation.split_files import read_split


@pytest.fixture
def files(model, cells, tmp_path):
    model.save_pretrained(tmp_path / "model", {}, hashes_of(model, cells)[:12])
    cells.write_h5ad(tmp_path / "in.h5ad")
    paths = {"model": tmp_path / "model", "input": tmp_path / "in.h5ad", "output": tmp_path / "out"}
    defaults = {**paths, "label": "type", **ONCE}
    return lambda **options: ClassificationConfig(**{"max_overlap": 1, **defaults, **options})


def test_run_classification_writes_and_shows_the_table(files, tmp_path, capsys):
    result = run_classification(files())
    record = json.loads((tmp_path / "out" / "results.json").read_text())
    assert record == json.loads(json.dumps(result))
    about = record["models"]["trained model"][0]
    assert about["fingerprint"] == embed.fingerprint(embed.load_model(tmp_path / "model"))
    assert record["split_sha256"] == read_split(tmp_path / "out" / "split.json").digest
    with open(tmp_path / "out" / "confusion.csv", newline="") as file:
        counted = [int(r["cells"]) for r in csv.DictReader(file) if (r["model"], r["probe"]) == ("trained model", "linear")]
    assert (len(counted), sum(counted)) == (9, 108)
    assert record["cells"]["overlapping"] == 12
    with open(tmp_path / "out" / "results.csv", newline="") as file:
        assert [r["accuracy"] for r in csv.DictReader(file)] == [str(r["accuracy"]) for r in record["rows"]]
    markdown = (tmp_path / "out" / "results.md").read_text()
    shown = capsys.readouterr().out
    for name in ("trained model", "majority class", "unseen"):
        assert name in markdown
        assert name in shown
    assert "The trained model with k-NN" in markdown
    run_classification(files(output=tmp_path / "again", json=True))
    assert capsys.readouterr().out == ""
    assert (tmp_path / "again" / "results.json").read_bytes() == (tmp_path / "out" / "results.json").read_bytes()


def test_bad_input_is_one_sentence_and_leaves_nothing(files, tmp_path, cells):
    for options, message in [
        ({"label": "typ"}, r"in\.h5ad has no column 'typ' in obs: choose --label among type, n"),
        ({"label": "n"}, r"120 labelled cells are left, with 0 classes"),
        ({"model": tmp_path}, "not a model directory"),
        ({"input": tmp_path / "no.h5ad"}, "there is no file"),
        ({"layer": "nope"}, "no layer 'nope'"),
        ({"model": "obsm:X_none"}, "no 'X_none' in obsm"),
        ({"model": "obsm:X_none", "protocol": "aaai2025", "seeds": 3, "folds": 5}, "take a model directory, not obsm:X_none"),
        ({"split_file": tmp_path / "no.json", "seeds": 3, "folds": 5}, "the split file .* cannot be read"),
    ]:
        with pytest.raises(UserError, match=message):
            run_classification(files(**options))
    for options, message in [
        ({"folds": 2}, "--folds is 2: it must be at least 3"), ({"seeds": 0}, "--seeds is 0"),
        ({"split_file": tmp_path / "no.json"}, "--seeds and --folds are those of --split-file"),
        ({"group": "n", "protocol": "aaai2025", "seeds": 3, "folds": 5}, "--group is no part of --protocol aaai2025"),
    ]:
        with pytest.raises(UserError, match=message):
            files(**options)
    assert not (tmp_path / "out").exists()
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine").write_text("")
    with pytest.raises(UserError, match="exists already"):
        run_classification(files())


@pytest.mark.parametrize(("change", "message"), [
    (lambda cells: cells.obs.__setitem__("type", "one"), "with 1 classes of at least 10 cells in 'type', and two are needed"),
    (lambda cells: cells.obs.__setitem__("type", ""), "holds no label at all"),
    (lambda cells: cells.obs.__setitem__("type", np.linspace(0, 1, 120)), "fractional numbers"),
    (lambda cells: setattr(cells, "X", cells.X * np.float32(0.3)), "no raw counts"),
    (lambda cells: setattr(cells, "var_names", [f"{'OTHER' if i > 4 else 'GENE'}{i}" for i in range(80)]), "of the counts of"),
])
def test_bad_cells(model, cells, change, message):
    change(cells)
    with pytest.raises(UserError, match=message):
        benchmark_classification(model, cells, "type", **ONCE)
