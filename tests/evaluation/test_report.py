"""Tables on disk: JSON, CSV and Markdown that say the same, or nothing at all."""

import csv
import json

import pytest

from scbench.evaluation.report import Column, IntervalColumn, Table

ROWS = [
    {"model": "a|b", "value": 0.51234, "low": 0.4, "high": 0.6, "other": None},
    {"model": "c", "value": 1.0, "low": 1.0, "high": 1.0, "other": 0.25},
]
COLUMNS = [
    Column("model", ("model",)), Column("value", ("value", "low", "high"), "{:.3f} ({:.1f}–{:.1f})"),
    Column("other", ("other",), "{:.2f}"),
]
TABLE = Table("A title", ROWS, COLUMNS, ["One sentence."], {"seed": 3})


def test_three_files_say_the_same(tmp_path):
    TABLE.write(tmp_path / "out")
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["results.csv", "results.json", "results.md"]
    found = json.loads((tmp_path / "out" / "results.json").read_text())
    assert found == {"title": "A title", "rows": ROWS, "sentences": ["One sentence."], "seed": 3}
    with open(tmp_path / "out" / "results.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["model"] for row in rows] == ["a|b", "c"]
    assert [float(row["value"]) for row in rows] == [0.51234, 1.0]
    assert rows[0]["other"] == ""
    assert (tmp_path / "out" / "results.md").read_text() == (
        "# A title\n\n| model | value | other |\n| --- | --- | --- |\n| a\\|b | 0.512 (0.4–0.6) | – |\n"
        "| c | 1.000 (1.0–1.0) | 0.25 |\n\n- One sentence.\n"
    )


def test_nothing_is_left_of_a_table_that_cannot_be_written(tmp_path):
    with pytest.raises(ValueError):
        TABLE._replace(rows=[{**ROWS[0], "value": float("nan")}]).write(tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def test_an_interval_stands_behind_its_value_where_there_is_one():
    column = IntervalColumn("error", ("mse",), "{:.2f}")
    assert column.text({"mse": -0.1, "mse_low": -0.25, "mse_high": 0.125}) == "-0.10 (-0.25 to 0.12)"
    assert column.text({"mse": 0.1, "mse_low": None, "mse_high": None}) == column.text({"mse": 0.1}) == "0.10"
    assert column.text({"mse": None, "mse_low": None, "mse_high": None}) == "–"
