"""The traffic meter counts exactly what kernels and operations of known traffic move, and traffic.py writes its rows."""

import csv
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")
HERE = Path(__file__).parent
BENCHMARKS = HERE.parents[1] / "benchmarks"


def run(*arguments, **environment) -> subprocess.CompletedProcess:
    """In a process of its own: whether kernels are interpreted is decided when they are imported."""
    path = os.pathsep.join(map(str, (BENCHMARKS, HERE)))
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": path, **environment}
    return subprocess.run([sys.executable, *map(str, arguments)], capture_output=True, text=True, timeout=600, env=environment)


# Name: (what is made before the meter looks, what it counts). All run in one process.
COUNTED = {
    # 100 rows of 64 in tiles of 16, so that the last tile is cut
    "rows": ("x, weight, y = torch.randn(100, 64), torch.randn(64), torch.empty(100, 64)",
             "scale_kernel[(7,)](x, weight, y, 100, D=64, ROWS=16)"),
    "halves": ("x, weight, y = torch.randn(32, 64).half(), torch.randn(64), torch.empty(32, 64)",
               "scale_kernel[(2,)](x, weight, y, 32, D=64, ROWS=16)"),
    # 64 floats, one in each of 64 sectors of 32 bytes; then four in each of 16
    "sectors": ("x, y = torch.randn(1024), torch.empty(64)",
                "stride_kernel[(1,)](x, y, STRIDE=8, N=64); stride_kernel[(1,)](x, y, STRIDE=2, N=64)"),
    "atomic": ("x, counter = torch.randn(64), torch.zeros(64)", "add_kernel[(1,)](x, counter, N=64)"),
    "fits": ("x, y = torch.randn(29, 65536), torch.empty(65536)",  # 7.6 MB, three times
             "read_again_kernel[(1,)](x, y, 29, BLOCK=65536, TIMES=3)"),
    "large": ("x, y = torch.randn(31, 65536), torch.empty(65536)",  # 8.1 MB
              "read_again_kernel[(1,)](x, y, 31, BLOCK=65536, TIMES=3)"),
    "in_turn": ("x, y = torch.randn(48, 65536), torch.empty(65536)", "in_turn_kernel[(48,)](x, y, BLOCK=65536)"),
    "sum": ("x = torch.randn(100, 64)", "x.sum(0)"),
    "views": ("x = torch.randn(100, 64)", "x.t()[:5].expand(5, 100); x.view(-1).detach()"),
    "relu": ("x = torch.randn(100, 64)", "torch.relu(x)"),
    "in_place": ("x = torch.randn(100, 64)", "x.mul_(2)"),
    "factories": ("x = torch.randn(100, 64)", "torch.zeros(64); x.new_zeros(64); torch.empty(10**6)"),
    "gather": ("rows, table = torch.randint(0, 1000, (100,)), torch.randn(1000, 64)", "table.index_select(0, rows)"),
    "scatter": ("x, rows, table = torch.randn(100, 64), torch.randint(0, 1000, (100,)), torch.randn(1000, 64)",
                "table.index_add_(0, rows, x)"),
    "expanded": ("x, one = torch.randn(100, 64), torch.randn(1)", "x + one.expand(64)"),
    "copy": ("x, y = torch.randn(100, 64), torch.empty(100, 64)", "y.copy_(x)"),
}


@pytest.fixture(scope="module")
def counted() -> dict:
    """What the meter says of COUNTED, by name: launches (kernel, loads, stores, cached), operations, bytes in all."""
    script = f"""
import json, torch, meter
from tiny_kernels import *
results = {{}}
for name, (before, call) in {COUNTED!r}.items():
    exec(before)
    with meter.count() as counted:
        exec(call)
    results[name] = {{"launches": [[l.kernel, l.loaded, l.stored, l.cached] for l in counted.launches],
                     "operations": len(counted.operations), "moved": counted.moved, "cached": counted.cached}}
    if name == "rows":
        assert torch.equal(y, x * weight)
try:
    with meter.count():
        beyond_kernel[(1,)](torch.randn(64), torch.empty(64), N=64)
except Exception as error:
    results["error"] = str(error)
print(json.dumps(results))
"""
    process = run("-c", script, TRITON_INTERPRET="1")
    assert process.returncode == 0, process.stderr[-3000:]
    return json.loads(process.stdout)


def test_each_byte_of_a_kernel_is_counted(counted):
    """x and y once each, the weight once however many programs read it."""
    rows = 100 * 64 * 4
    assert counted["rows"]["launches"] == [["scale_kernel", {"x": rows, "weight": 64 * 4}, {"y": rows}, 2 * rows + 64 * 4]]
    assert counted["rows"]["operations"] == 0 and counted["rows"]["moved"] == 2 * rows + 64 * 4


def test_the_element_size_counts(counted):
    assert counted["halves"]["launches"][0][1:3] == [{"x": 32 * 64 * 2, "weight": 256}, {"y": 32 * 64 * 4}]


def test_a_sector_is_the_smallest_thing_that_moves(counted):
    assert [launch[1]["x"] for launch in counted["sectors"]["launches"]] == [64 * 32, 16 * 32]


def test_an_atomic_is_a_load_and_a_store(counted):
    assert counted["atomic"]["launches"][0][1:3] == [{"x": 256, "counter": 256}, {"counter": 256}]


def test_a_reused_operand_counts_once_only_if_it_fits_the_cache(counted):
    assert counted["fits"]["launches"][0][1]["x"] == 29 * 65536 * 4
    assert counted["large"]["launches"][0][1]["x"] == 3 * 31 * 65536 * 4
    assert counted["large"]["cached"] == counted["large"]["moved"]  # all of it waits at one time


def test_the_lenient_reading_counts_what_waits_at_one_time(counted):
    """12 MB, each block read twice in a row: all of it is reused, but never more than one block waits. y is written once."""
    assert counted["in_turn"]["launches"][0][1]["x"] == 2 * 48 * 65536 * 4
    assert counted["in_turn"]["cached"] == 48 * 65536 * 4 + 65536 * 4


def test_reading_outside_every_operand_is_an_error(counted):
    assert "beyond_kernel: a load at an address outside every operand" in counted["error"]


def test_plain_operations_by_hand(counted):
    rows, index = 100 * 64 * 4, 100 * 8
    expected = {
        "sum": rows + 256, "views": 0, "relu": 2 * rows, "in_place": 2 * rows, "factories": 2 * 256,
        "gather": index + 2 * rows,
        "scatter": index + rows + 2 * rows,  # each row of the table that is added to is read and written
        "expanded": 2 * rows + 4, "copy": 2 * rows,
    }
    assert {name: counted[name]["moved"] for name in expected} == expected


def test_traffic_writes_its_rows(tmp_path):
    path = tmp_path / "traffic.json"
    process = run(BENCHMARKS / "traffic.py", "--ops", "add_norm", "--dtypes", "fp32", "--batch", "2", "--tokens", "33",
                  "--json", path)
    assert process.returncode == 0, process.stderr[-3000:]
    forward, backward = json.loads(path.read_text())
    assert (forward["direction"], backward["direction"]) == ("forward", "backward")
    states = 66 * 256 * 4
    # Eager: dropout reads x, writes it and a mask of bytes; the sum reads two and writes one; LayerNorm reads and writes.
    assert forward["bytes_eager"] == 7 * states + 66 * 256 + 2 * 256 * 4 + 2 * 66 * 4
    assert 3 * states <= forward["bytes_moved"] <= forward["bytes_eager"] / 2
    assert forward["bytes_moved"] <= 1.15 * forward["bytes_required"]
    assert forward["triton_launches"] == 1
    assert "moved/required" in process.stdout
    with open(path.with_suffix(".csv"), newline="") as file:
        lines = list(csv.DictReader(file))
    values = {line["metric"]: line["value"] for line in lines if line["direction"] == "forward" and line["op"] == "add_norm"}
    assert int(values["bytes_moved"]) == forward["bytes_moved"] and all(line["torch"] for line in lines)


def test_checks_of_a_cpu_are_no_launches(tmp_path):
    path, ops = tmp_path / "traffic.json", ["attention", "selective_scan", "causal_conv"]
    which = ["--ops", *ops, "--dtypes", "fp32", "--batch", "2", "--tokens", "9", "--width", "16"]
    process = run(BENCHMARKS / "traffic.py", *which, "--json", path)
    assert process.returncode == 0, process.stderr[-3000:]
    assert [row["launches"] for row in json.loads(path.read_text()) if row["direction"] == "forward"] == [1, 1, 1]


def test_an_unknown_op_is_one_sentence():
    process = run(BENCHMARKS / "traffic.py", "--ops", "nothing")
    assert process.returncode == 2 and process.stderr.strip().count("\n") == 0 and "nothing" in process.stderr


@pytest.mark.full
def test_the_goal_of_the_memory_bound_ops(tmp_path):
    """At most 1.15 times what must move, on four cells of the goal's length."""
    path = tmp_path / "traffic.json"
    ops = ["dropout", "add_norm", "relu_dropout", "table_rows", "mvc", "masked_regression"]
    process = run(BENCHMARKS / "traffic.py", "--ops", *ops, "--batch", "4", "--json", path)
    assert process.returncode == 0, process.stderr[-3000:]
    for row in json.loads(path.read_text()):
        assert row["bytes_moved"] <= 1.15 * row["bytes_required"], row
