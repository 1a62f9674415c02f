"""The cost of telemetry is measured part by part."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[2] / "benchmarks" / "telemetry_cost.py"


@pytest.mark.full
def test_every_part_has_a_number(tmp_path):
    subprocess.run([sys.executable, SCRIPT, "--json", tmp_path / "out.json"], check=True, timeout=300)
    rows = {row["part"]: row["seconds"] for row in json.loads((tmp_path / "out.json").read_text())}
    assert rows.keys() == {"facts", "reduce", "row", "flush"}
    assert all(0 < seconds["p20"] <= seconds["median"] <= seconds["p80"] for seconds in rows.values())
