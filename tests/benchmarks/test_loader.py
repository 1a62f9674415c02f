"""The benchmark of loaders runs as users run it, gives no number to what loses, repeats or changes a cell, and says who is
absent."""

import csv
import itertools
import json
import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

ROOT = Path(__file__).parents[2]
BENCHMARKS = ROOT / "benchmarks"
SMALL = ["--cells", "300", "--vocabulary-size", "3000", "--rounds", "1", "--seconds", "0.2", "--cores", "1",
         "--caches", "warm", "--loaders", "scbench", "memmap", "reference"]
FIELDS = {"loader", "sampler", "stage", "cache", "cores", "status", "cells_per_second", "tokens_per_second", "peak_bytes",
          "settings"}


def run(*arguments) -> subprocess.CompletedProcess:
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, *map(str, arguments)]
    return subprocess.run(command, cwd=BENCHMARKS, capture_output=True, text=True, timeout=600, env=environment)


@pytest.fixture
def import_benchmark(monkeypatch):
    """Import a module of benchmarks/ the way its scripts do."""
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    return lambda name: __import__(name, fromlist=["x"])


def check_rows(path: Path, printed: str) -> None:
    """What the benchmark wrote of scbench, memmap and the reference on one core."""
    rows = json.loads(path.read_text())
    assert all(set(row) >= FIELDS for row in rows)
    measured = [row for row in rows if row["status"] == "ok"]
    for row in measured:
        assert row["cells_per_second"] > 0 and 10**7 < row["idle_bytes"] <= row["peak_bytes"] < 10**10
        assert row["cores"] == 1 and row["first_batch_seconds"] > 0 and row["settings"]["cells"] == 300
        if row["stage"] == "training":
            assert row["tokens_per_second"] / row["cells_per_second"] == pytest.approx(513, rel=0.05)
            assert row["disk_bytes_per_cell"] > 1000
        else:
            assert row["bytes_per_second"] >= 3 * row["tokens_per_second"]
    stages = {(row["loader"], row["stage"]) for row in measured}
    expected = {"scbench": ("training", "rows", "shuffled", "extents"), "memmap": ("training", "extents")}
    if find_spec("datasets"):
        expected["reference"] = ("training",)
    else:
        [absent] = [row for row in rows if row["loader"] == "reference"]
        assert absent["status"].startswith("absent: No module named 'datasets'") and absent["cells_per_second"] is None
        assert f"reference: {absent['status']}" in printed
    assert stages == {(name, stage) for name, stages in expected.items() for stage in stages}
    with open(path.with_suffix(".csv"), newline="") as file:
        lines = list(csv.DictReader(file))
    assert {line["loader"] for line in lines} == {"scbench", "memmap", "reference"} and all(line["revision"] for line in lines)
    assert path.with_suffix(".png").stat().st_size > 1000


@pytest.mark.skipif(not hasattr(os, "sched_setaffinity"), reason="it pins processes to cores")
def test_rows_of_those_that_are_here(import_benchmark, monkeypatch, tmp_path, capsys):
    """All in this process: most of the time would go into starting Python."""
    loader, rounds, task = (import_benchmark(name) for name in ("loader", "loaders.rounds", "loaders.run"))
    monkeypatch.setattr(rounds, "start", lambda python, asked, environment, cores: task.main(json.loads(json.dumps(asked))))
    loader.main([*SMALL, "--json", str(tmp_path / "out.json")])
    check_rows(tmp_path / "out.json", capsys.readouterr().out)


@pytest.mark.full
@pytest.mark.skipif(not hasattr(os, "sched_setaffinity"), reason="it pins processes to cores")
def test_the_script(tmp_path):
    process = run("loader.py", *SMALL, "--json", tmp_path / "out.json")
    assert process.returncode == 0, process.stderr[-3000:]
    check_rows(tmp_path / "out.json", process.stdout)


@pytest.mark.parametrize("wrong", [("--cores", "4000"), ("--python", "annbatch=none"), ("--cells", "1")])
def test_bad_options_are_one_sentence(import_benchmark, wrong):
    loader = import_benchmark("loader")
    with pytest.raises(loader.UserError, match=f"^{wrong[0]} {wrong[1]}[^\n]*$"):
        loader.main(list(wrong))


def test_a_loader_whose_process_fails_gets_no_number(import_benchmark, monkeypatch, tmp_path, capsys):
    loader, rounds = import_benchmark("loader"), import_benchmark("loaders.rounds")

    def start(python, asked, environment, cores):
        if asked["action"] == "build":
            return {"tried": [{}], "format": "none", "stages": ["training"]}
        raise rounds.TaskError("ValueError: no")

    monkeypatch.setattr(rounds, "start", start)
    loader.main([*SMALL, "--json", str(tmp_path / "out.json")])
    rows = json.loads((tmp_path / "out.json").read_text())
    assert {row["status"] for row in rows} == {"failed: ValueError: no"} and rows[0]["cells_per_second"] is None


@pytest.fixture
def cells(import_benchmark):
    """Raw cells of 5 to 60 genes, and their vocabulary."""
    vocabulary = import_benchmark("loaders.tokenise").Vocabulary.build(f"gene-{i:03d}" for i in range(100))
    rng = np.random.default_rng(0)
    lengths = rng.integers(5, 61, 300)
    genes = np.concatenate([np.sort(rng.choice(100, length, replace=False)) for length in lengths])
    extents = import_benchmark("scbench.data.extents")
    offsets = np.concatenate([[0], np.cumsum(lengths)])
    return extents.Cells(genes.astype(np.uint16), rng.geometric(0.5, len(genes)).astype(np.uint16), offsets), vocabulary


def pieces(cells, edges):
    """The cells in several batches."""
    for start, stop in itertools.pairwise(edges):
        row = slice(cells.offsets[start], cells.offsets[stop])
        yield type(cells)(cells.genes[row], cells.counts[row], cells.offsets[start : stop + 1] - cells.offsets[start])


def test_a_cell_that_is_lost_repeated_or_changed_is_a_failure(import_benchmark, cells):
    task, tokenise, law = (import_benchmark(f"loaders.{name}") for name in ("run", "tokenise", "law"))
    cells, vocabulary = cells
    expected = np.sort(task.content_hash(*cells))

    def verdict(raw, max_genes=60):
        make = tokenise.Tokeniser(vocabulary, law.Law(batch_cells=64, max_genes=max_genes))
        return task._check(SimpleNamespace(), (batch for part in raw for batch in make(part)), expected)

    assert verdict(pieces(cells, [0, 100, 300])) is None
    assert verdict(pieces(cells, [0, 100, 299])) == "failed: an epoch delivered 299 cells of 300, 1 of them never"
    repeated = [*pieces(cells, [0, 299]), *pieces(cells, [0, 1])]
    assert verdict(repeated) == "failed: an epoch delivered 300 cells of 300, 1 of them never"
    changed = cells._replace(counts=cells.counts + (np.arange(len(cells.counts)) == 7).astype(np.uint16))
    assert verdict([changed]) == "failed: 1 cells differ from the source"
    assert "cells differ" in verdict([cells], max_genes=59)  # what is not shown cannot be vouched for


def test_the_references_pipeline(import_benchmark, cells):
    """Draws, masks and pads as it is said to; at full length its cells are the source's."""
    reference, task, law = (import_benchmark(f"loaders.{name}") for name in ("reference", "run", "law"))
    cells, vocabulary = cells
    table = [{"genes": part.genes.astype(np.float32).tolist(), "expressions": np.log1p(part.counts).tolist()}
             for part in pieces(cells, range(301))]
    torch.manual_seed(0)

    def batches(max_genes):
        asked = law.Law(batch_cells=50, max_genes=max_genes)
        dataset, collate = reference.ReferenceCells(table, asked), reference.Collate(vocabulary, asked)
        return torch.utils.data.DataLoader(dataset, batch_size=50, shuffle=True, collate_fn=collate)

    assert task._check(reference, batches(60), np.sort(task.content_hash(*cells))) is None
    masked = shown = 0
    for batch in batches(20):
        assert batch.genes.shape == batch.values.shape == (50, 21) and (batch.genes[:, 0] == vocabulary.cls).all()
        assert not batch.values[batch.padding].any() and batch.n_cells == 50
        for genes, padding in zip(batch.genes, batch.padding, strict=True):
            assert len(genes[~padding].unique()) == (~padding).sum()
        masked += int((batch.values == -1).sum())
        shown += batch.n_tokens - 50
    lengths = np.diff(cells.offsets)
    assert shown == np.minimum(lengths, 20).sum() and masked / shown == pytest.approx(0.4, abs=0.03)
    # a weighted draw never takes a count of 1 as long as there are larger ones, a uniform one does: half of the draws each
    cell = int(np.argmax(lengths))
    part = next(pieces(cells, [cell, cell + 1]))
    many = int((part.counts > 1).sum())
    drawn = [reference.ReferenceCells(table, law.Law(max_genes=many))[cell][2] for _ in range(400)]
    weighted = np.mean([bool((values > np.log(2) + 1e-6).all()) for values in drawn])
    assert weighted == pytest.approx(0.5, abs=0.1)


TOKENISE = """
import sys
if sys.argv[1] == "without":
    sys.modules["torch"] = None
import hashlib
import numpy as np
from loaders.tokenise import Cells, Tokeniser, Vocabulary
from loaders.law import Law
rng = np.random.default_rng(0)
genes = np.concatenate([np.sort(rng.choice(100, 60, replace=False)) for _ in range(40)]).astype(np.uint16)
cells = Cells(genes, rng.geometric(0.5, len(genes)), np.arange(41) * 60)
for batch in Tokeniser(Vocabulary.build(f"gene-{i:03d}" for i in range(100)), Law(max_genes=30))(cells):
    arrays = [np.asarray(x) for x in batch if not isinstance(x, (int, bool))]
    print(type(batch.genes).__name__, hashlib.sha256(b"".join(x.tobytes() for x in arrays)).hexdigest())
"""


def test_batches_without_torch_are_the_same():
    made = {how: run("-c", TOKENISE, how) for how in ("with", "without")}
    assert all(process.returncode == 0 for process in made.values()), made
    (kind, digest), (other_kind, other_digest) = (made[how].stdout.split() for how in ("with", "without"))
    assert (kind, other_kind) == ("Tensor", "ndarray") and digest == other_digest


def test_thinned_cells(import_benchmark, cells):
    """Copies differ, have no genes or counts that their cells lack, and about as many genes as asked for."""
    corpus = import_benchmark("loaders.corpus")
    rng = np.random.default_rng(1)
    genes = np.sort(rng.choice(30_000, (5, 4000)), axis=1).astype(np.uint16)
    base = type(cells[0])(genes.reshape(-1), rng.geometric(0.3, 20_000).astype(np.uint16), np.arange(6) * 4000)
    thinned = list(corpus._thinned(base, 40, rng))
    for i, (kept, counts) in enumerate(thinned):
        row = slice(4000 * (i % 5), 4000 * (i % 5 + 1))
        assert set(kept.tolist()) <= set(base.genes[row].tolist()) and counts.min() > 0 and counts.max() <= base.counts.max()
    assert np.median([len(kept) for kept, _ in thinned]) == pytest.approx(1500, rel=0.1)
    assert len({(kept.tobytes(), counts.tobytes()) for kept, counts in thinned}) == 40


def test_ratios_against_the_goals(import_benchmark):
    tables = import_benchmark("loader_tables")

    def row(loader, sampler, stage, cores, rate):
        return {"loader": loader, "sampler": sampler, "stage": stage, "cache": "warm", "cores": cores, "status": "ok",
                "cells_per_second": rate, "bytes_per_second": rate}

    rows = [row("scbench", "native", "training", 1, 50_000), row("scbench", "numpy", "training", 1, 19_000),
            row("reference", None, "training", 1, 2_000), row("scbench", "native", "shuffled", 1, 60),
            row("memmap", "native", "extents", 1, 100)]
    lines = [line.split(" | ") for line in tables.ratios_table(rows)[2:]]
    assert [(line[2], line[3], line[4], line[5].rstrip(" |")) for line in lines] == [
        ("reference", "25.00", "20", "yes"), ("reference", "9.50", "10", "no"), ("memmap", "0.60", "0.6", "yes")]


def test_the_published_rows_are_of_all_loaders():
    rows = json.loads((ROOT / "docs" / "results" / "loader" / "loader.json").read_text())
    assert {row["loader"] for row in rows} >= {"scbench", "reference", "scdataset", "annbatch", "anndata", "memmap"}
    assert all(row["status"] == "ok" or row["status"].startswith("absent: ") for row in rows)
    assert all(row["settings"]["cells"] == 100_000 and row["settings"]["data"] for row in rows)
