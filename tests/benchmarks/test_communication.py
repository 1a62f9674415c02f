"""What ranks send each other: what is counted is what `scbench plan` predicts, and what docs/training.md shows."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


@pytest.mark.full
def test_two_ranks_send_what_plan_predicts(tmp_path):
    command = [sys.executable, ROOT / "benchmarks" / "communication.py", "--worlds", "1", "2", "--width", "32",
               "--vocabulary-size", "500", "--json", tmp_path / "out.json"]
    subprocess.run(list(map(str, command)), check=True, timeout=600)
    rows = json.loads((tmp_path / "out.json").read_text())
    assert len(rows) == 16
    for row in rows:
        alone = row["world"] == 1
        assert row["seconds"] > 0 and (row["predicted_bytes"] == 0) == alone
        kept_whole = 0.2 if row["stage"] == 3 else 0  # small tensors, much of a model as small as this: they are not gathered
        least, most = (share * row["predicted_bytes"] for share in (0.98 - kept_whole, 1.02))
        assert row["sent_bytes"] == 0 if alone else least <= row["sent_bytes"] <= most, row


def test_the_page_shows_what_was_counted(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    communication = __import__("communication")
    rows = json.loads((ROOT / "docs" / "results" / "communication" / "communication.json").read_text())
    assert {row["world"] for row in rows} == {1, 2, 4} and len(rows) == 24
    assert communication.table(rows) in (ROOT / "docs" / "training.md").read_text(encoding="utf-8")
    for row in rows:
        assert row["sent_bytes"] == pytest.approx(row["predicted_bytes"], rel=0.02, abs=100)
