"""docs/fidelity.md promises a test for every row; the documents name no test file that does not exist."""

import ast
import json
import re
import subprocess
import sys
from functools import cache
from pathlib import Path

import pytest

from scbench.config import STRUCTURES

ROOT = Path(__file__).parents[1]
FIDELITY = ROOT / "docs" / "fidelity.md"
REFERENCE = re.compile(r"`(tests/[\w/]+\.py)::([\w:]+)`")
THIRD_OF_EAGER = {"attention", "gene_graph"}
EXCUSES = re.compile(r"not in this version|not tested: \w+")


@cache
def functions_in(file: str) -> frozenset[str]:
    """Names of a file's test functions, `Class::name` inside classes, without importing it."""
    found = set()
    for node in ast.parse((ROOT / file).read_text(encoding="utf-8")).body:
        if isinstance(node, ast.ClassDef):
            found |= {f"{node.name}::{inner.name}" for inner in node.body if isinstance(inner, ast.FunctionDef)}
        elif isinstance(node, ast.FunctionDef):
            found.add(node.name)
    return frozenset(name for name in found if name.split("::")[-1].startswith("test_"))


def rows(text: str) -> list[str]:
    """The rows of all tables whose last column is called Test."""
    found, inside = [], False
    for line in text.splitlines():
        if not line.startswith("|"):
            inside = False
        elif line.rstrip(" |").endswith("| Test"):
            inside = True
        elif inside and not re.fullmatch(r"[|\s:-]+", line):
            found.append(line)
    return found


def test_every_row_of_fidelity_has_a_test_or_says_why_not():
    promises = rows(FIDELITY.read_text(encoding="utf-8"))
    assert len(promises) > 60
    for row in promises:
        assert REFERENCE.search(row) or EXCUSES.search(row), row


def test_the_tests_that_fidelity_names_exist():
    named = REFERENCE.findall(FIDELITY.read_text(encoding="utf-8"))
    assert len(named) > 100
    missing = [f"{file}::{name}" for file, name in named if not (ROOT / file).is_file() or name not in functions_in(file)]
    assert not missing


@pytest.mark.parametrize("document", [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))], ids=lambda path: path.name)
def test_files_of_tests_that_documents_name_exist(document):
    for file in re.findall(r"tests/[\w/]+\.py", document.read_text(encoding="utf-8")):
        assert (ROOT / file).is_file(), f"{document.name} names {file}"


def test_the_kernels_page_shows_what_was_counted():
    """Its tables are those that the script makes of the numbers beside it, and those meet the goals."""
    results = ROOT / "docs" / "results" / "kernels"
    command = [sys.executable, ROOT / "benchmarks" / "kernel_tables.py", results]
    tables = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    assert len(tables.splitlines()) > 50
    assert not set(tables.splitlines()) - set((ROOT / "docs" / "kernels.md").read_text(encoding="utf-8").splitlines())
    traffic, compiled = (json.loads((results / f"{name}.json").read_text()) for name in ("traffic", "compile"))
    ops = {row["op"] for row in compiled} - {"attention_dropout"}  # counted as attention, and 8 bytes of keys a token
    assert {row["op"] for row in traffic} == ops and len(traffic) == 4 * len(ops) == 4 * 11
    for row in traffic:
        assert (row["width"], row["cells"], row["tokens"]) == (256, 32, 513)
        assert row["bytes_moved"] <= 1.15 * row["bytes_required"], row
        if row["op"] in THIRD_OF_EAGER or (row["op"], row["direction"]) == ("gene_value_embedding", "forward"):
            assert row["bytes_moved"] <= row["bytes_eager"] / 3, row
    assert all(row["spills"] == 0 and row["shared_bytes"] <= row["shared_limit"] for row in compiled)


def test_the_data_page_shows_what_was_measured():
    """Its tables are those that the script makes of the numbers in docs/results."""
    command = [sys.executable, ROOT / "benchmarks" / "data_tables.py", ROOT / "docs" / "results"]
    tables = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    assert len(tables.splitlines()) > 80
    assert not set(tables.splitlines()) - set((ROOT / "docs" / "data.md").read_text(encoding="utf-8").splitlines())


def test_the_performance_page_shows_what_was_measured():
    """Its tables are those that the script makes of the numbers in docs/results, every structure's."""
    command = [sys.executable, ROOT / "benchmarks" / "speed_tables.py", ROOT / "docs" / "results" / "throughput"]
    tables = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    page = (ROOT / "docs" / "performance.md").read_text(encoding="utf-8")
    sentence, _, rates, *lines = tables.splitlines()
    assert sentence in " ".join((ROOT / "README.md").read_text(encoding="utf-8").split())
    assert rates in page and len(lines) > 80
    assert not set(lines) - set(page.splitlines())
    assert all(tables.count(f"| {structure} |") >= 5 for structure in STRUCTURES)
