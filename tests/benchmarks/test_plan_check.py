"""docs/results/plan: what was measured, against what plan says today."""

import json
from pathlib import Path

import pytest

from scbench.config import STRUCTURES

ROOT = Path(__file__).parents[2]
FILE = ROOT / "docs" / "results" / "plan" / "memory.json"


@pytest.fixture
def rows(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    check = __import__("plan_check")
    found = json.loads(FILE.read_text(encoding="utf-8"))
    for row in found:
        settings = {name: value for name, value in row["settings"].items() if name != "mask_ratio"}
        taken = {"peak_gradients": row["measured_bytes"], "peak_update": 0, "parameters": row["parameters"]}
        row["today"] = check.row_of(row["size"], check.Case(**settings), taken)
    return found


def test_the_published_prediction_is_the_one_that_plan_makes(rows):
    for row in rows:
        today = row.pop("today")
        assert row == today


def test_every_structure_stage_and_number_of_ranks_is_there(rows):
    assert {row["structure"] for row in rows} == set(STRUCTURES)
    assert {(row["stage"], row["precision"], row["world"]) for row in rows} >= {
        (stage, precision, world) for stage in range(4) for precision in ("bf16", "fp32") for world in (1, 2)}


def test_what_was_measured_is_what_was_predicted(rows):
    """Never much more than predicted, which would be out of memory; states alone almost exactly. In fp32 DeepSpeed holds its
    last bucket beside the new one now and then: 20 MB, of no weight outside of these small models. What two ranks hold at
    one time differs from run to run, by a sixth where states are all there is."""
    for row in rows:
        second_bucket = 20_000_000 if row["precision"] == "fp32" and row["stage"] in (1, 2) else 0
        assert row["ratio"] >= 0.82, row
        most = 1.11 if row["world"] == 1 else 1.2
        assert row["measured_bytes"] <= most * row["predicted_bytes"] + second_bucket, row
    within = sum(0.9 <= row["ratio"] <= 1.1 for row in rows)
    assert within >= 0.9 * len(rows)
    exact = [row["ratio"] for row in rows if row["size"] == "states" and row["stage"] in (0, 2) and row["world"] == 1]
    assert exact == pytest.approx([1.0] * 4, abs=0.01)
