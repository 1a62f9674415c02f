"""Whether bf16 trains as fp32 does is judged right, on curves whose verdict is known; the script runs."""

import csv
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from scipy.stats import ttest_rel

SCRIPT = Path(__file__).parents[2] / "benchmarks" / "precision.py"
STEPS = np.arange(25, 401, 25)
TINY = ["--width", "16", "--layers", "1", "--heads", "2", "--genes", "30", "--batch-cells", "16", "--steps", "40",
        "--seeds", "2"]


@pytest.fixture
def precision(monkeypatch):
    monkeypatch.syspath_prepend(str(SCRIPT.parent))
    monkeypatch.delitem(sys.modules, "precision", raising=False)
    return __import__("precision")


def curves(seeds=5):
    """Falling losses of several seeds, which differ by a few hundredths."""
    rng = np.random.default_rng(0)
    return 1 + np.exp(-STEPS / 100) + 0.03 * rng.standard_normal((seeds, 1)) + 0.005 * rng.standard_normal((seeds, len(STEPS)))


def test_equal_curves_are_within_seed_noise(precision):
    fp32 = curves()
    found = precision.compare(STEPS, fp32, fp32, 40)
    assert found["verdict"] == "within seed noise" and found["largest_difference_in_spreads"] == 0
    rounding = fp32 + 0.004 * np.random.default_rng(1).standard_normal(fp32.shape)
    found = precision.compare(STEPS, fp32, rounding, 40)
    assert found["verdict"] == "within seed noise" and 0 < abs(found["largest_difference_in_spreads"]) < 1
    interval = ttest_rel(rounding[:, -1], fp32[:, -1]).confidence_interval()
    assert [found["end"][name] for name in ("difference_low", "difference_high")] == pytest.approx([*interval])
    assert found["end"]["spread"] == pytest.approx(fp32[:, -1].std() * (5 / 4) ** 0.5)


@pytest.mark.parametrize(("shift", "verdict"), [
    (0.9, "within seed noise"), (-0.9, "within seed noise"), (1.1, "bf16 is worse"), (-1.1, "bf16 is better")])
def test_a_shift_by_more_than_the_spread_is_seen(precision, shift, verdict):
    fp32 = curves()
    found = precision.compare(STEPS, fp32, fp32 + shift * fp32.std(0, ddof=1), 40)
    assert found["verdict"] == verdict
    assert found["largest_difference_in_spreads"] == pytest.approx(shift)


def test_one_place_is_enough_unless_the_rate_is_still_warming_up(precision):
    for place, verdict in ((0, "within seed noise"), (7, "bf16 is worse")):
        bf16 = curves()
        bf16[:, place] += 1
        found = precision.compare(STEPS, curves(), bf16, 40)
        assert found["verdict"] == verdict
        assert found["mean_difference"][int(STEPS[place])] == pytest.approx(1)
    assert found["largest_difference_step"] == STEPS[7]


def test_growth_is_counted_after_warm_up(precision):
    assert precision.growth({25: 1, 50: 5, 75: 9, 100: 9}, 40) == 4
    assert precision.growth({25: None, 50: None, 75: None}, 40) is None


def test_a_run_that_fails_is_no_result(precision, monkeypatch, small_store, tmp_path, capsys):
    def run(store, options):
        if options["precision"] == "bf16":
            return {"status": "failed: no"}
        return {"status": "ok", "validation_loss": {24: 2.0, 48: 1.0}, "training_loss": {24: 2.0, 48: 1.0},
                "peak_bytes": {24: 500_000_000, 48: 600_000_000}}

    monkeypatch.setattr(precision, "run", run)
    output = tmp_path / "out.json"
    assert precision.main(["--store", str(small_store), *TINY, "--json", str(output), "--plots", str(tmp_path / "plots")]) == 1
    rows = json.loads(output.read_text())
    assert [(row["precision"], row["seed"]) for row in rows] == [
        ("fp32", 0), ("bf16", 0), ("fp32", 1), ("bf16", 1), ("difference", None)]
    assert rows[-1]["status"].startswith("failed: ") and "verdict" not in rows[-1] and rows[0]["growth_bytes"] == 1e8
    assert "+100.0" in capsys.readouterr().out and not list((tmp_path / "plots").iterdir())


@pytest.mark.parametrize(("wrong", "said"), [
    ([], "h5ad file or as --store"), (["--store", "a", "--seeds", "1"], "--seeds is 1"),
    (["--store", "a", "--width", "20"], "width"), (["--store", "a", "--json", "a.csv"], "a.csv"),
    (["--store", "no-such-store"], "no-such-store")])
def test_bad_options_are_one_sentence(precision, wrong, said):
    with pytest.raises(precision.UserError, match=f"^[^\n]*{said}[^\n]*$"):
        precision.main(wrong)


@pytest.mark.full
def test_the_script(small_store, tmp_path):
    output = tmp_path / "out.json"
    command = [sys.executable, SCRIPT, "--store", small_store, *TINY, "--json", output, "--plots", tmp_path / "plots"]
    done = subprocess.run(list(map(str, command)), capture_output=True, text=True, timeout=900)
    assert done.returncode in (0, 1), done.stderr[-3000:]
    rows = json.loads(output.read_text())
    runs, whole = rows[:-1], rows[-1]
    assert {(row["precision"], row["seed"]) for row in runs} == {(name, seed) for name in ("fp32", "bf16") for seed in (0, 1)}
    for row in runs:
        assert row["status"] == "ok" and list(row["validation_loss"]) == [str(step) for step in range(4, 41, 4)]
        assert 10**8 < row["peak_bytes"]["40"] < 10**10
        assert row["training_loss"]["40"] < row["training_loss"]["4"]
    ends = {name: [row["validation_loss"]["40"] for row in runs if row["precision"] == name] for name in ("fp32", "bf16")}
    assert whole["end"]["difference"] == pytest.approx(np.mean(ends["bf16"]) - np.mean(ends["fp32"]))
    assert 0 < abs(whole["end"]["difference"]) < 0.05 * whole["end"]["fp32"]
    with open(output.with_suffix(".csv"), newline="") as file:
        lines = list(csv.DictReader(file))
    assert {"validation_loss.40", "peak_bytes.40", "verdict", "end.spread"} <= {line["metric"] for line in lines}
    assert (tmp_path / "plots" / "transformer.png").stat().st_size > 10_000
    assert whole["verdict"] in done.stdout
    wrong = subprocess.run([sys.executable, SCRIPT, "--store", "nowhere"], capture_output=True, text=True, timeout=300)
    assert wrong.returncode == 2 and wrong.stderr.count("\n") == 1 and wrong.stderr.startswith("precision.py: ")
