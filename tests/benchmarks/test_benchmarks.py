"""The benchmarks of speed: they refuse to time what computes something else, count FLOPs as torch does, and leave rows, a CSV
and pictures behind."""

import csv
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from scbench.config import STRUCTURES
from scbench.errors import UserError

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
TINY = ["--batch-cells", "3", "--widths", "32", "--layers", "2", "--heads", "4", "--steps", "2", "--warmup", "1"]
SYNTHETIC = ["--genes", "20", "--vocabulary-size", "300"]
FIELDS = {"implementation", "structure", "task", "status", "cells_per_second", "tokens_per_second", "mfu", "peak_bytes",
          "loss", "step_seconds", "flops_per_second", "settings"}


@pytest.fixture
def import_benchmark(monkeypatch):
    """Import a module of benchmarks/ the way its scripts do; the machine's matrix rate is measured on small shapes."""
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    monkeypatch.setattr(__import__("machine"), "PEAK_SHAPES", ((256, 256, 256),))
    return __import__


def case(options, structure: str, **more):
    """A small case; the reference's convolutions need an even number of tokens."""
    genes = 19 if structure.startswith("cnn") else 20
    return options.Options(structure=structure, width=32, layers=2, heads=4, genes=genes, batch_cells=4,
                           vocabulary_size=300, **more)


def assert_measured(row: dict) -> None:
    assert row["status"] == "ok" and set(row) >= FIELDS
    assert row["cells_per_second"] > 0 and row["mfu"] > 0
    assert (row["loss"] is None) == (row["task"] == "embedding")
    assert row["mfu"] == row["flops_per_second"] / row["settings"]["peak_flops_per_second"]
    timing = row["step_seconds"]
    assert timing["p20"] <= timing["median"] <= timing["p80"]


def test_throughput(import_benchmark, tmp_path, capsys):
    path = tmp_path / "out.json"
    how = ["--structures", "linear", "--precisions", "fp32", "--deepspeed", "zero0", "--genes", "10", "20",
           "--vocabulary-size", "300", "--json", str(path), "--plots", str(tmp_path / "plots")]
    import_benchmark("throughput").main([*TINY, *how])
    rows = json.loads(path.read_text())
    assert [(row["task"], row["settings"]["genes"], row["settings"]["deepspeed"]) for row in rows] == [
        ("training", 10, "zero0"), ("embedding", 10, None), ("training", 20, "zero0"), ("embedding", 20, None)]
    for row in rows:
        assert_measured(row)
        assert row["tokens_per_second"] == pytest.approx((row["settings"]["genes"] + 1) * row["cells_per_second"])
        assert 0 <= row["wait_share"] <= 1
        if sys.platform == "linux":
            assert 10**8 < row["peak_bytes"] < 10**10
        parts = {name for name in row if name.endswith("_seconds")} - {"step_seconds"}
        training = {"data_seconds", "forward_seconds", "backward_seconds", "optimizer_seconds", "communication_seconds"}
        assert parts == (training if row["task"] == "training" else {"data_seconds", "forward_seconds"})
        assert all(row[part]["p20"] >= 0 for part in parts)
    printed = capsys.readouterr().out
    assert "linear:" in printed and "4 d^2 per token and layer" in printed and "mamba" not in printed
    with open(path.with_suffix(".csv"), newline="") as file:
        lines = list(csv.DictReader(file))
    assert float(next(line["value"] for line in lines if line["metric"] == "cells_per_second")) == rows[0]["cells_per_second"]
    assert all(line["revision"] and line["torch"] and line["processor"] and line["threads"] for line in lines)
    assert {file.name for file in (tmp_path / "plots").iterdir()} == {"parts.png", "by_genes.png"}


def test_throughput_on_a_store_waits_for_its_loader(import_benchmark, small_store, tmp_path):
    path = tmp_path / "out.json"
    import_benchmark("throughput").main([*TINY, "--structures", "cnn", "--store", str(small_store), "--json", str(path)])
    training, embedding = json.loads(path.read_text())
    for row in (training, embedding):
        assert_measured(row)
        assert row["settings"]["store"] == str(small_store)
        assert row["tokens_per_second"] < 101 * row["cells_per_second"]  # 10 to 100 genes
    assert 0 < training["wait_share"] < 1 and training["data_seconds"]["median"] > 0


def test_rivals(import_benchmark, monkeypatch, tmp_path, capsys):
    """Cells of different lengths; what a process of its own takes is another test's."""
    rivals, path = import_benchmark("rivals"), tmp_path / "out.json"
    monkeypatch.setattr(import_benchmark("memory"), "measure", lambda name, task, options: 10**9)
    mixed = [*TINY, *SYNTHETIC, "--median-genes", "12"]
    rivals.main([*mixed, "--structures", "cnn", "--json", str(path), "--plots", str(tmp_path)])
    rows = json.loads(path.read_text())
    names = ["reference", "plain_padded", "plain_bucketed", "plain_matmul", "scbench"]
    assert [(row["task"], row["implementation"]) for row in rows] == [
        (task, name) for task in ("training", "embedding") for name in names]
    for row in rows:
        assert row["settings"]["genes"] == 19 and row["peak_bytes"] in (None, 10**9)
        if row["implementation"] == "plain_matmul":
            assert row["status"].startswith("absent: ") and row["cells_per_second"] is None
            continue
        assert_measured(row)
        ratio = row["scbench_ratio"]
        assert ratio["p20"] <= ratio["median"] <= ratio["p80"]
        assert (ratio["median"] == 1) == (row["implementation"] == "scbench")
        assert row["settings"]["precision"] == ("fp32" if row["implementation"] == "reference" else "bf16")
    printed = capsys.readouterr().out
    assert "scbench is x as fast" in printed and "cnn, training, plain_matmul: absent" in printed
    assert (tmp_path / "ratios.png").stat().st_size > 5000


@pytest.mark.parametrize("structure", STRUCTURES)
def test_all_implementations_agree(import_benchmark, structure):
    """Loss, gradient norm, and embeddings, on cells of different lengths."""
    check, cells, options = map(import_benchmark, ("check", "cells", "options"))
    small = case(options, structure, median_genes=12)
    names = ["reference", "plain_padded", "plain_bucketed", "plain_matmul", "scbench"]
    vocabulary, [batch] = cells.load_batches(small, 1)
    assert len(set(batch.lengths.tolist())) > 1
    absent = {"plain_matmul": structure not in ("transformer", "gnn"), "reference": structure == "mamba"}
    [to_embed] = cells.batches_to_embed(small, vocabulary, 1)
    for task, cells_of_it in (("training", batch), ("embedding", to_embed)):
        verdicts = check.check_all(names, task, small, vocabulary, cells_of_it)
        for name, (result, wrong) in verdicts.items():
            assert wrong is None or (absent.get(name) and wrong.startswith("absent: ")), (name, wrong)
            assert (result.embeddings is None) == (task == "training" or bool(absent.get(name)))


def test_what_computes_something_else_gets_no_number(import_benchmark, monkeypatch, capsys):
    """One weight of plain_bucketed doubled: the check must see it."""
    rivals, plain = map(import_benchmark, ("rivals", "plain"))
    step = plain.PlainStep.__init__

    def wrong_step(self, model, *arguments, bucketed, **more):
        if bucketed:
            model.mvc_head.linear3.weight.data *= 2
        step(self, model, *arguments, bucketed=bucketed, **more)

    monkeypatch.setattr(plain.PlainStep, "__init__", wrong_step)
    monkeypatch.setattr(import_benchmark("memory"), "measure", lambda *_: 1)
    rows = rivals.measure_all(rivals.RivalsOptions(
        structures=("linear",), tasks=("training",), widths=(32,), layers=(1,), genes=(20,), batch_cells=(3,), steps=1,
        vocabulary_size=300, implementations=("plain_padded", "plain_bucketed")))
    right, wrong = rows
    assert_measured(right)
    assert wrong["status"].startswith("failed: loss") and "in fp32" in wrong["status"]
    assert wrong["cells_per_second"] is None and wrong["mfu"] is None and wrong["peak_bytes"] is None
    rivals.report(rows)
    assert wrong["status"] in capsys.readouterr().out


def test_a_wrong_gradient_or_embedding_is_a_failure(import_benchmark):
    check = import_benchmark("check")
    right = check.Result(loss=1.0, gradient_norm=3.0)
    assert check.failure("fp32", right, right) is None
    assert "gradient norm" in check.failure("fp32", check.Result(1.0, 2.9), right)
    assert "loss" in check.failure("bf16", check.Result(float("nan"), 3.0), right)
    right = check.Result(embeddings=torch.ones(2, 3))
    assert check.failure("fp32", right, right) is None
    assert "embeddings" in check.failure("bf16", check.Result(embeddings=torch.ones(2, 3) * 1.1), right)
    assert "embeddings" in check.failure("bf16", check.Result(embeddings=torch.full((2, 3), torch.nan)), right)


def test_buckets_hold_every_cell_once_and_few_pads(import_benchmark):
    dense_batch, cells, options = map(import_benchmark, ("dense_batch", "cells", "options"))
    _, [batch] = cells.load_batches(case(options, "linear", median_genes=9), 1)
    found = dense_batch.buckets(batch, 299)
    assert sorted(torch.cat([rows for rows, _ in found]).tolist()) == list(range(4))
    assert sum(int((~dense.padding).sum()) for _, dense in found) == len(batch.genes)
    assert sum(len(dense.masked) for _, dense in found) == len(batch.masked)
    for rows, dense in found:
        assert torch.equal(dense.lengths, batch.lengths[rows].long())
        assert dense.genes.shape == (len(rows), int(dense.lengths.max()))
        assert dense.lengths.min() >= dense_batch.SHORTEST * dense.lengths.max()


def test_synthetic_cells_look_like_a_census(import_benchmark):
    cells, options = import_benchmark("cells"), import_benchmark("options")
    vocabulary, [batch] = cells.load_batches(options.Options(), 1)
    assert vocabulary.size == 60_697
    assert (batch.cell_offsets.diff() == 513).all()
    assert (batch.genes[batch.cell_offsets[:-1].long()] == vocabulary.cls).all()
    assert len(batch.masked) / (32 * 512) == pytest.approx(0.4, abs=0.02)
    _, [again] = cells.load_batches(options.Options(), 1)
    assert torch.equal(batch.genes, again.genes) and torch.equal(batch.values, again.values)
    raw = [cells.raw_cell(options.Options(median_genes=1500), 60_694, sample) for sample in range(64)]
    counts = np.concatenate([c for _, c in raw])
    assert 0.6 < (counts == 1).mean() < 0.75 and 0.005 < (counts > 10).mean() < 0.06
    assert 1000 < np.median([len(g) for g, _ in raw]) < 2000
    assert all((np.diff(g) > 0).all() for g, _ in raw)
    _, [short] = cells.load_batches(options.Options(median_genes=300), 1)
    assert 150 < np.median(short.lengths) < 500 and short.lengths.max() <= 513


def test_ranks_share_a_batch(import_benchmark):
    cells, options = import_benchmark("cells"), import_benchmark("options")
    small = case(options, "transformer", median_genes=12)
    vocabulary, batches = cells.load_batches(small, 2)
    shares = [cells.synthetic_batch(small, vocabulary, 1, rank, 2) for rank in range(2)]
    assert torch.equal(torch.cat([share.genes for share in shares]), batches[1].genes)
    assert torch.equal(torch.cat([share.samples for share in shares]), batches[1].samples)
    with pytest.raises(UserError, match="3 ranks"):
        cells.synthetic_batch(small, vocabulary, 0, 0, 3)


@pytest.mark.parametrize("structure", STRUCTURES)
def test_flops_are_those_that_torch_counts(import_benchmark, structure):
    """Dense forward of the plain models, forward and backward of the transformer: every product, the attention's included."""
    flops, dense_batch, plain, options = map(import_benchmark, ("flops", "dense_batch", "plain", "options"))
    width, cells, n_masked = 64, 3, 40
    small = options.Options(structure=structure, width=width, layers=3, heads=4, genes=64, vocabulary_size=100)
    config, length = small.model(100), 65
    rng = np.random.default_rng(0)
    genes = torch.from_numpy(rng.integers(0, 100, (cells, length)))
    masked = torch.from_numpy(np.sort(rng.choice(cells * length, n_masked, replace=False)))
    batch = dense_batch.DenseBatch(genes, torch.rand(cells, length), torch.rand(cells, length), genes < 0,
                                   torch.full((cells,), length), masked, masked // length, torch.rand(n_masked),
                                   torch.tensor(float(n_masked)))
    model = plain.PlainModel(config, "matmul")
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, 0, 0.05)
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as forward:
        loss = model(batch, False)
    counted = {name.split(".")[-1]: sum(operations.values()) for name, operations in forward.get_flop_counts().items()}
    sizes = (config, np.full(cells, length), n_masked, n_masked)  # every masked gene has its own query here
    encoder, heads = flops.forward_flops(*sizes)
    if structure == "mamba":  # of the scan's 9 operations torch sees 2, the output's product; a padded convolution is longer
        scan = 3 * cells * length * 7 * 4 * 2 * width
        assert counted["encoder"] == pytest.approx(encoder - scan, rel=2e-3)
    elif structure == "linear_mixer":  # the plain one mixes channels first, of the positions that there were: 65, 32, 16
        assert counted["encoder"] == encoder + 2 * width**2 * cells * ((65 - 32) + (32 - 16) + (16 - 1))
    else:
        assert counted["encoder"] == encoder
    assert counted.get("regression_head", 0) + counted["mvc_head"] == pytest.approx(heads, rel=0.01)  # without dot products
    if structure == "transformer":
        with FlopCounterMode(display=False) as backward:
            loss.backward()
        value_mlp = counted["PlainModel"] - encoder - counted["regression_head"] - counted["mvc_head"]
        whole = forward.get_total_flops() + backward.get_total_flops() - 3 * value_mlp
        assert flops.step_flops(*sizes) == pytest.approx(whole, rel=0.03)
    assert structure in flops.formula([structure])


def test_the_goal_costs_what_is_stated(import_benchmark):
    """A cell of 513 tokens, 6 layers x 256, heads at 205 masked genes: about 12.5 GFLOP."""
    flops, options = import_benchmark("flops"), import_benchmark("options")
    cost = flops.step_flops(options.Options().model(60_697), np.array([513]), 205, 205)
    assert cost == pytest.approx(12.5e9, rel=0.01)


def test_bad_options_are_one_sentence(import_benchmark):
    options = import_benchmark("options")
    for wrong, said in [({"genes": 400, "vocabulary_size": 300}, "--genes 400"), ({"steps": 0}, "--steps is 0"),
                        ({"median_genes": 5, "store": Path("x")}, "--median-genes 5")]:
        with pytest.raises(UserError, match=said):
            options.Options(**wrong)


def run(*arguments) -> str:
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}
    done = subprocess.run(list(map(str, arguments)), capture_output=True, text=True, timeout=600, env=environment)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


@pytest.mark.full
def test_two_ranks_under_the_launcher(tmp_path):
    path = tmp_path / "out.json"
    launcher = Path(sys.executable).parent / "deepspeed"
    command = [launcher, "--num_accelerators", "2", "--master_port", "29683", "--no_local_rank", BENCHMARKS / "throughput.py"]
    run(*command, *TINY[2:], "--batch-cells", "4", *SYNTHETIC, "--structures", "transformer", "--deepspeed", "zero1", "zero3",
        "--json", path)
    rows = json.loads(path.read_text())
    assert [(row["task"], row["settings"]["deepspeed"]) for row in rows] == [("training", "zero1"), ("training", "zero3")]
    for row in rows:
        assert_measured(row)
        assert row["settings"]["ranks"] == 2 and row["communication_seconds"]["median"] > 0
    assert rows[0]["loss"] == pytest.approx(rows[1]["loss"], rel=1e-2)


@pytest.mark.full
def test_memory_of_a_process_of_its_own(tmp_path):
    path = tmp_path / "out.json"
    printed = run(sys.executable, BENCHMARKS / "rivals.py", *TINY, *SYNTHETIC, "--structures", "mamba", "--tasks", "training",
                  "--implementations", "reference", "plain_padded", "scbench", "--json", path)
    reference, *others = json.loads(path.read_text())
    assert reference["status"].startswith("absent: ") and reference["status"] in printed
    for row in others:
        assert_measured(row)
        if sys.platform == "linux":
            assert 10**8 < row["peak_bytes"] < 10**10
