"""The counted training step is the one that a hand counts, and what is predicted from it keeps its order."""

import csv
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")
BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
WIDTH, GENES, CELLS, VOCABULARY, FACTORS = 16, 12, 3, 200, 128
TINY = ["--width", WIDTH, "--heads", 2, "--genes", GENES, "--vocabulary-size", VOCABULARY, "--layers", 1]

# Everything in one process: its imports take longest.
SCRIPT = """
import contextlib, io, json, runpy, sys
import predicted_step, step_work
from flops import step_flops
from options import Options
from scbench.config import STRUCTURES

shape, tiny, folder = json.loads(sys.argv[1]), json.loads(sys.argv[2]), sys.argv[3]
ratios, work = step_work.read_ratios(predicted_step.TRAFFIC), {}
batch = step_work.batch_of(shape["batch_cells"], shape["genes"], shape["vocabulary_size"])
facts = {"lengths": batch.lengths.tolist(), "masked": len(batch.masked), "queries": len(batch.query_genes)}
for structure in STRUCTURES:
    for layers in (1, 2):
        options = Options(structure=structure, layers=layers, **shape)
        needed = step_flops(options.model(shape["vocabulary_size"]), batch.lengths.numpy(), facts["masked"], facts["queries"])
        work[f"{structure} {layers}"] = {"needed": needed, "operations": step_work.model_work(options, ratios)}
options = Options(structure="transformer", layers=1, **shape)
from scbench.models.model import ExpressionModel
from cells import vocabulary_of
parameters = ExpressionModel(options.model(shape["vocabulary_size"]), vocabulary_of(options)).parameters()
update = {"parameters": sum(p.numel() for p in parameters), "operations": step_work.update_work(options)}
by_hand = predicted_step.bounds("h100", [
    step_work.Operation("read", 2.01e9, 0, 2, "bf16"), step_work.Operation("multiply", 1e6, 3.956e12, 1, "bf16"),
], 0.5)
files = ["--json", f"{folder}/out.json", "--plots", f"{folder}/plots"]
with contextlib.redirect_stdout(io.StringIO()) as printed:
    predicted_step.main([*tiny, "--structures", "transformer", "--batch-cells", "2", "3", *files])
refused = []
for words in (["--traffic", f"{folder}/nothing.json"], ["--json", "out.csv"]):
    sys.argv = ["predicted_step.py", *words]
    with contextlib.redirect_stderr(io.StringIO()) as said:
        try:
            runpy.run_path(predicted_step.__file__, run_name="__main__")
        except SystemExit as end:
            refused.append([end.code, said.getvalue()])
print("RESULT" + json.dumps({"facts": facts, "work": work, "update": update, "bounds": by_hand, "printed": printed.getvalue(),
                             "refused": refused}))
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """Where the script writes."""
    return tmp_path_factory.mktemp("predicted")


@pytest.fixture(scope="module")
def counted(folder) -> dict:
    """What the script found."""
    shape = {"width": WIDTH, "heads": 2, "genes": GENES, "batch_cells": CELLS, "vocabulary_size": VOCABULARY}
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(BENCHMARKS)}
    process = subprocess.run([sys.executable, "-c", SCRIPT, json.dumps(shape), json.dumps(list(map(str, TINY))), folder],
                             capture_output=True, text=True, timeout=900, env=environment)
    assert process.returncode == 0, process.stderr[-3000:]
    return json.loads(process.stdout.partition("RESULT")[2])


def launches(operations: list) -> dict[str, int]:
    """Of each name."""
    counts: dict[str, int] = {}
    for name, _, _, number, _ in operations:
        counts[name] = counts.get(name, 0) + number
    return counts


@pytest.mark.parametrize("structure", ["transformer", "cnn", "cnn_sorted", "linear", "linear_mixer", "mamba", "gnn"])
@pytest.mark.parametrize("layers", [1, 2])
def test_flops_are_those_that_the_formula_needs(counted, structure, layers):
    """But for: attention's scores again, once by flash-attn, twice by us, and then its values' product; MVC's queries come
    from a table that it does not train; which positions a linear mixer's cell has, mixed once, and its weights' gradient; the
    value MLP, which the formula leaves out."""
    facts, found = counted["facts"], counted["work"][f"{structure} {layers}"]
    pairs = sum(length**2 for length in facts["lengths"])
    again = {"transformer": WIDTH, "gnn": 2 * FACTORS + WIDTH}.get(structure, 0)
    expected = found["needed"] + layers * 2 * again * pairs - 2 * WIDTH**2 * facts["queries"]
    if structure == "linear_mixer":
        expected += 4 * (GENES + 1) * (1 if layers == 1 else (GENES + 1) // 2) * CELLS
    assert sum(flops for name, _, flops, *_ in found["operations"] if name != "gene_value_embedding") == expected


def test_products_are_the_tensor_cores_but_for_our_own_small_ones(counted):
    own = {"gene_value_embedding", "masked_regression", "mvc", "selective_scan", "causal_conv"}
    for found in counted["work"].values():
        for name, _, flops, _, precision in found["operations"]:
            assert not flops or (precision == "fp32") == (name in own), name


def test_launches_of_a_layer_by_hand(counted):
    """Of a transformer's: four linear layers (forward one launch, backward two products and the bias's sum), flash-attn,
    two norms (backward: the kernel, its sums, their rounding) and a ReLU, two sums of a state's two gradients. The dropout
    keys of all sites are made together."""
    one, two = (launches(counted["work"][f"transformer {layers}"]["operations"]) for layers in (1, 2))
    added = {name: two[name] - one.get(name, 0) for name in two}
    assert (added["addmm"], added["mm"], added["sum"]) == (4, 8, 4)
    assert (added["flash_attn"], added["add_norm"], added["relu_dropout"]) == (5, 2 * 4, 2)
    assert sum(added.values()) == 4 * 4 + 5 + 8 + 2 + 2


def test_every_layer_costs_the_same(counted):
    """The bytes of a second transformer layer, by hand: each operand of each launch once."""
    one, two = (counted["work"][f"transformer {layers}"]["operations"] for layers in (1, 2))
    states = CELLS * (GENES + 1) * WIDTH * 2
    weights = WIDTH * WIDTH * 2
    moved = {name: sum(x[1] for x in two if x[0] == name) - sum(x[1] for x in one if x[0] == name) for name in ("addmm", "mm")}
    assert moved["addmm"] == (4 + 2 + 2 + 2) * states + 6 * weights + 6 * WIDTH * 2  # q, k, v: one in, three out
    assert moved["mm"] == 2 * ((4 + 2 + 2 + 2) * states + 6 * weights)


def test_an_rms_norm_passes_over_its_states_twice_and_thrice(counted):
    operations = counted["work"]["mamba 1"]["operations"]
    states, numbers, weight = CELLS * (GENES + 1) * WIDTH * 2, CELLS * (GENES + 1) * 4, WIDTH * 2
    moved = [x[1] for x in operations if x[0] == "rms_norm"]  # the layer's and the last, there and back
    assert moved == [2 * states + numbers + weight] * 2 + [3 * states + numbers + 2 * weight] * 2
    assert not any(x[0] in ("pow", "rsqrt") for x in operations)


def test_adamw_reads_seven_and_writes_three_numbers_of_a_parameter(counted):
    """Weight, gradient and two moments in, all but the gradient out: 28 bytes."""
    update = counted["update"]
    moved = sum(x[1] for x in update["operations"] if x[0] == "_fused_adamw_")
    assert 28 * update["parameters"] <= moved <= 28 * update["parameters"] + 200  # groups are padded, steps are counted
    assert not any(flops for _, _, flops, *_ in update["operations"])


def test_bounds_by_hand(counted):
    """H100: 3.35e12 bytes/s and 989e12 FLOP/s; so 2.01e9 bytes take 1 ms at 60 %, 3.956e12 FLOPs 10 ms at 40 %."""
    bounds = counted["bounds"]
    assert bounds["seconds_of"] == pytest.approx({"memory": 1e-3, "products": 1e-2, "launches": 15e-6, "host": 0.5}, rel=1e-3)
    assert bounds["seconds_upper"] == pytest.approx(0.511015, rel=1e-3) and bounds["bound_low"] == "host"
    assert bounds["seconds_lower"] == pytest.approx(1e-2, rel=1e-3) and bounds["bound_high"] == "products"
    assert list(bounds["longest_seconds"]) == ["multiply", "read"]


def test_rows_pictures_and_words(counted, folder):
    rows = json.loads((folder / "out.json").read_text())
    assert [(row["batch_cells"], row["gpu"]) for row in rows] == [(2, "a100"), (2, "h100"), (3, "a100"), (3, "h100")]
    for row in rows:
        assert row["status"] == "predicted, not measured" and row["host_seconds"] > 0
        assert 0 < row["seconds_lower"] < row["seconds_upper"] == pytest.approx(sum(row["seconds_of"].values()))
        assert row["cells_per_second_low"] == pytest.approx(row["batch_cells"] / row["seconds_upper"])
        assert row["cells_per_second_high"] == pytest.approx(row["batch_cells"] / row["seconds_lower"])
    few, many = rows[0], rows[2]  # more cells: more bytes and FLOPs by the same operations
    assert few["launches"] == many["launches"] and few["bytes"] < many["bytes"] and few["flops"] < many["flops"]
    assert rows[1]["seconds_lower"] < few["seconds_lower"]  # the H100's
    with open(folder / "out.csv", newline="") as file:
        lines = list(csv.DictReader(file))
    assert {line["metric"] for line in lines} >= {"seconds_lower", "seconds_of.host", "cells_per_second_low"}
    assert all(line["status"] == "predicted, not measured" for line in lines)
    assert (folder / "plots" / "predicted.png").read_bytes().startswith(b"\x89PNG")
    assert "Predicted, not measured" in counted["printed"]


def test_bad_input_is_one_sentence(counted):
    assert [code for code, _ in counted["refused"]] == [2, 2]
    assert all(text.strip().count("\n") == 0 for _, text in counted["refused"])
    assert "traffic.py" in counted["refused"][0][1] and "out.csv" in counted["refused"][1][1]
