"""The profile of a step puts every operation's own time where it belongs, and leaves rows, a CSV and a picture behind."""

import csv
import json
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from scbench.errors import UserError

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
TINY = ["--widths", "32", "--layers", "1", "--heads", "4", "--genes", "20", "--vocabulary-size", "300", "--batch-cells", "3",
        "--warmup", "1", "--steps", "3"]


@pytest.fixture
def step_profile(monkeypatch):
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    monkeypatch.setattr(__import__("machine"), "PEAK_SHAPES", ((256, 256, 256),))
    found = __import__("step_profile")
    monkeypatch.setattr(found, "RESERVE", 1)
    return found


def event(name, seconds, *children):
    found = SimpleNamespace(name=name, self_cpu_time_total=seconds * 1e6, cpu_children=list(children), cpu_parent=None)
    for child in children:
        child.cpu_parent = found
    return found


def test_where_time_belongs(step_profile):
    node = "autograd::engine::evaluate_function: "
    step = event("step", 1,
        event("forward", 2, event("CpuSelfAttention", 4), event("aten::mul", 8), event("_Linear", 16, event("aten::mm", 32))),
        event(f"{node}CpuAddNormBackward", 64, event("CpuAddNormBackward", 128)),
        event(f"{node}_LinearBackward", 0, event("_LinearBackward", 256, event("aten::mm", 512))),
        event(f"{node}torch::autograd::AccumulateGrad", 1024, event("aten::copy_", 2048)),
        event("Optimizer.step#AdamW.step", 4096, event("aten::_fused_adamw_", 8192), event("aten::mm", 16384)),
    )  # fmt: skip
    parts, operations = step_profile.step_of(step)
    assert parts == {"products": 4 + 32 + 512, "passes": 8 + 16 + 64 + 128 + 256, "between": 3,
                     "parameters": 1024 + 2048 + 4096 + 8192 + 16384}
    assert operations["aten::mm"] == 32 + 512 + 16384 and sum(operations.values()) == sum(parts.values())


def test_medians_over_steps(step_profile):
    found = step_profile.medians([{"a": 1.0, "b": 5.0}, {"a": 3.0}, {"a": 2.0, "b": 4.0}])
    assert list(found.items()) == [("b", 4.0), ("a", 2.0)]


def test_a_profile_of_tiny_steps(step_profile, tmp_path, capsys):
    structures, path = ["transformer", "linear", "mamba"], tmp_path / "out.json"
    step_profile.main([*TINY, "--structures", *structures, "--json", str(path), "--plots", str(tmp_path / "plots")])
    rows = json.loads(path.read_text())
    assert [row["structure"] for row in rows] == structures
    for row in rows:
        assert set(row["seconds_of"]) == set(step_profile.PARTS) and min(row["seconds_of"].values()) > 0
        assert len(row["longest_seconds"]) == step_profile.NAMED
        assert max(row["longest_seconds"].values()) < row["step_seconds"]["median"]
        rate = row["needed_flops"] / row["seconds_of"]["products"]
        assert row["products_of_peak"] == pytest.approx(rate / row["settings"]["peak_flops_per_second"])
    with open(path.with_suffix(".csv"), newline="") as file:
        assert {line["metric"] for line in csv.DictReader(file)} >= {"seconds_of.products", "products_of_peak"}
    assert (tmp_path / "plots" / "profile.png").stat().st_size > 1000
    said = capsys.readouterr().out
    assert "MFU = needed FLOPs" in said and all(f"{name}: the longest operations" in said for name in structures)


def test_no_profile_of_a_gpu(step_profile, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    with pytest.raises(UserError, match="CUDA_VISIBLE_DEVICES"):
        step_profile.main(TINY)
