"""The soak's short version: a few kills of one run, and what it makes of a run that lost something."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

SOAK = Path(__file__).parents[2] / "benchmarks" / "soak.py"


@pytest.mark.full
@pytest.mark.parametrize("more", [[], ["--changing"], ["--changing", "--precision", "bf16"]])
def test_nothing_is_lost_in_six_kills(more, small_store, tmp_path):
    command = [sys.executable, SOAK, small_store, tmp_path / "soak", "--cycles", "6", "--steps", "40", *more]
    done = subprocess.run(list(map(str, command)), capture_output=True, text=True, timeout=1500)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-3000:]
    result = json.loads((tmp_path / "soak" / "soak.json").read_text())
    assert result["nothing_lost"] and len(result["history"]) == 6
    if not more:
        assert result["difference"] == {"rows": 0, "weights": 0}
