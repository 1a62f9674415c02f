"""Protocol aaai2025 against a plain re-statement of it, from the dense forward pass to the last trial's accuracy."""

import importlib.util
import json
from collections import Counter
from pathlib import Path

import anndata
import numpy as np
import pytest
import torch
from planted_tables import row

from scbench.config import ClassificationConfig
from scbench.data.cells import content_hash
from scbench.data.vocabulary import Vocabulary
from scbench.errors import UserError
from scbench.evaluation.classification import aaai2025
from scbench.evaluation.classification.aaai2025 import benchmark_aaai2025
from scbench.evaluation.classification.benchmark import benchmark_classification, run_classification
from scbench.kernels import random
from scbench.kernels.random import Stream
from scbench.models.import_reference import import_reference

_path = Path(__file__).parents[3] / "benchmarks" / "reference_model.py"
_spec = importlib.util.spec_from_file_location("reference_model", _path)
reference = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(reference)

VOCABULARY = Vocabulary.build(f"GENE{i}" for i in range(80))  # the genes of the planted cells
MAX_GENES, CLASSES = 30, ["alpha", "beta", "gamma"]


@pytest.fixture(scope="module")
def oracle():
    network = reference.ReferenceModel("transformer", VOCABULARY.size, VOCABULARY.pad, width=16, layers=1, heads=4)
    return network.randomize().eval()


@pytest.fixture
def imported(oracle, tmp_path):
    """The oracle's weights, by way of a checkpoint."""
    torch.save(oracle.state_dict(), tmp_path / "best_model.pt")
    return import_reference(tmp_path / "best_model.pt", VOCABULARY, "transformer", max_genes=MAX_GENES, heads=4)


def lists(cells: anndata.AnnData) -> tuple[list[np.ndarray], list[np.ndarray]]:
    """Token ids and counts of each cell."""
    ids = np.array([VOCABULARY.tokens[name] for name in cells.var_names])
    rows = [cells.X[i] for i in range(cells.n_obs)]
    return [ids[row.indices] for row in rows], [row.data for row in rows]


@pytest.fixture(autouse=True)
def fewer_trials(request, monkeypatch):
    """Two will do, but where all are restated."""
    if "restatement" not in request.node.name:
        monkeypatch.setattr(aaai2025, "TRIALS", 2)


@pytest.fixture
def write_pt(tmp_path):
    def write(cells, scale=1.0, **labels) -> Path:
        genes, counts = lists(cells)
        values = [np.log1p(c * scale).astype(np.float32).tolist() for c in counts]
        torch.save({"genes": [g.tolist() for g in genes], "expressions": values, **labels}, tmp_path / "cells.pt")
        return tmp_path / "cells.pt"

    return write


def draw(genes: np.ndarray, counts: np.ndarray, words: np.ndarray) -> np.ndarray:
    """Which genes of a cell are shown: exponential clocks of rate value − smallest value + 1e-5."""
    if len(genes) <= MAX_GENES:
        return np.arange(len(genes))
    values = np.log1p(counts)
    uniform = [((int(word) >> 12) + 0.5) / 2**52 for word in words]
    return np.argsort(-np.log(uniform) / (values - values.min() + 1e-5))[:MAX_GENES]


def dense_embedding(oracle, genes: list, counts: list, hashes: np.ndarray, key: int) -> np.ndarray:
    """The reference's forward pass over padded cells, one draw each."""
    ids = torch.full((len(genes), MAX_GENES + 1), VOCABULARY.pad)
    inputs = torch.zeros(ids.shape)
    ids[:, 0] = VOCABULARY.cls
    for i, (g, c) in enumerate(zip(genes, counts, strict=True)):
        shown = draw(g, c, random.bits(random.bits(random.key(key, Stream.SUBSET), hashes[i]), g))
        ids[i, 1 : len(shown) + 1] = torch.from_numpy(g[shown])
        inputs[i, 1 : len(shown) + 1] = torch.from_numpy(np.log1p(c[shown]).astype(np.float32))
    with torch.no_grad():
        return oracle(ids, inputs).cell_embedding.numpy()


def nearest(train: np.ndarray, classes: np.ndarray, test: np.ndarray) -> np.ndarray:
    """The most frequent class of the ten nearest cells, the first of equally frequent ones."""
    found = []
    for cell in test:
        near = np.argsort(np.linalg.norm(train - cell, axis=1))[:10]
        votes = Counter(classes[near].tolist())
        found.append(max(sorted(votes), key=lambda name: votes[name]))
    return np.array(found)


def adam_looks(train, classes, test, truth, key) -> list[float]:
    """Softmax regression by Adam, written out, in float64."""
    generator, width = torch.Generator().manual_seed(key >> 1), train.shape[1]
    start = [torch.empty(shape).uniform_(-(width**-0.5), width**-0.5, generator=generator) for shape in ((3, width), (3,))]
    parameters = np.column_stack([start[0].numpy(), start[1].numpy()]).astype(np.float64)
    x, held_out = (np.column_stack([part, np.ones(len(part))]).astype(np.float64) for part in (train, test))
    mean, square, step, looks = np.zeros_like(parameters), np.zeros_like(parameters), 0, []
    for epoch in range(1, 51):
        order = np.argsort(random.bits(random.fold(key, epoch), np.arange(len(x))), kind="stable")
        for begin in range(0, len(x), 64):
            rows = order[begin : begin + 64]
            logits = x[rows] @ parameters.T
            likely = np.exp(logits - logits.max(1, keepdims=True))
            likely /= likely.sum(1, keepdims=True)
            gradient = (likely - np.eye(3)[classes[rows]]).T @ x[rows] / len(rows)
            step += 1
            mean, square = 0.9 * mean + 0.1 * gradient, 0.999 * square + 0.001 * gradient**2
            parameters = parameters - 5e-3 * (mean / (1 - 0.9**step)) / (np.sqrt(square / (1 - 0.999**step)) + 1e-8)
        if epoch % 5 == 0:
            looks.append(float(np.mean((held_out @ parameters.T).argmax(1) == truth)))
    return looks


def trials_of(table, model: str, probe: str) -> dict:
    return next(t for t in table.details["trials"] if (t["model"], t["probe"]) == (model, probe))


def test_every_trial_equals_a_plain_restatement(imported, oracle, cells):
    seed = 3
    table = benchmark_aaai2025(imported, cells, "type", seed=seed)
    genes, counts = lists(cells)
    lengths = [len(g) for g in genes]
    assert min(lengths) < MAX_GENES < max(lengths), "cells are padded, and cells are drawn"
    order = [np.argsort(g) for g in genes]
    hashes = content_hash(
        np.concatenate([g[o] for g, o in zip(genes, order, strict=True)]).astype(np.uint32),
        np.concatenate([c[o] for c, o in zip(counts, order, strict=True)]).astype(np.uint32),
        np.concatenate([[0], np.cumsum(lengths)]),
    )
    truth = np.array([CLASSES.index(name) for name in cells.obs["type"]])
    expected = {"k-NN": [], "linear": [], "last": []}
    for trial in range(5):
        keys = [random.key(seed, Stream.EVALUATION, 20, trial, part) for part in range(3)]
        order = np.argsort(random.bits(keys[0], hashes))
        train, test = order[:84], order[84:]  # 70 % of 120
        embedding = dense_embedding(oracle, genes, counts, hashes, keys[1])
        found = nearest(embedding[train], truth[train], embedding[test])
        looks = adam_looks(embedding[train], truth[train], embedding[test], truth[test], keys[2])
        expected["k-NN"].append(float(np.mean(found == truth[test])))
        expected["linear"].append(max(looks))
        expected["last"].append(looks[-1])
    assert trials_of(table, "trained model", "k-NN")["accuracy"] == expected["k-NN"]
    assert trials_of(table, "trained model", "linear")["accuracy"] == expected["linear"]
    assert trials_of(table, "trained model", "linear")["accuracy_last"] == expected["last"]
    assert len(set(expected["linear"])) > 1, "trials differ"
    for probe in ("k-NN", "linear"):
        mean = sum(expected[probe]) / 5
        deviation = (sum((x - mean) ** 2 for x in expected[probe]) / 5) ** 0.5
        result = row(table, "trained model", probe)
        assert (result["accuracy"], result["accuracy_sd"]) == pytest.approx((mean, deviation), abs=1e-12)
    best = max((r for r in table.rows if r["kind"] == "baseline"), key=lambda r: r["accuracy"])
    for compared in table.details["comparisons"]:
        assert (compared["baseline"], compared["baseline_probe"]) == (best["model"], best["probe"])
        difference = row(table, "trained model", compared["probe"])["accuracy"] - best["accuracy"]
        assert (compared["difference"], compared["low"]) == (pytest.approx(difference), None)
        assert f"{difference:+.3f} accuracy apart from the best baseline, {best['model']}" in compared["sentence"]
        assert compared["sentence"] in table.sentences
    assert [compared["probe"] for compared in table.details["comparisons"]] == ["k-NN", "linear"]


def test_the_draw_goes_by_weight_whatever_the_model_was_trained_with(imported, cells, monkeypatch):
    """Genes of a cell's smallest count have a weight of 1e-5: none is drawn while there are others."""
    imported.provenance["training"] = {"weighted_sampling": False}
    deep = cells[np.asarray((cells.X > 1).sum(1)).ravel() >= MAX_GENES].copy()
    assert deep.n_obs > 5
    seen, encode = [], imported.encode
    monkeypatch.setattr(imported, "encode", lambda batch: (seen.append(batch.values), encode(batch))[1])
    genes, counts = lists(deep)
    offsets = np.concatenate([[0], np.cumsum([len(g) for g in genes])])
    tokens = aaai2025.CellTokens(np.concatenate(genes), np.concatenate(counts), offsets, np.zeros(deep.n_obs))
    hashes = np.arange(deep.n_obs, dtype=np.uint64)
    first = aaai2025.embed_draw(imported, tokens, hashes, 1)
    values = torch.cat(seen).view(deep.n_obs, MAX_GENES + 1)[:, 1:]
    assert (values > np.log1p(1) + 0.1).all()
    np.testing.assert_array_equal(aaai2025.embed_draw(imported, tokens, hashes, 1), first)
    assert not np.allclose(aaai2025.embed_draw(imported, tokens, hashes, 2), first), "a trial has a draw of its own"


def without(rows: list[dict]) -> list[dict]:
    return [{name: value for name, value in row.items() if name not in ("dataset", "label", "values")} for row in rows]


@pytest.mark.parametrize("benchmark", [benchmark_aaai2025, benchmark_classification])
def test_a_pt_file_of_log1p_counts_is_as_good_as_the_counts(imported, cells, write_pt, benchmark):
    path = write_pt(cells, cls_name=cells.obs["type"].tolist())
    cells.obs_names = [str(i) for i in range(cells.n_obs)]  # as the cells of a .pt file are called
    theirs, ours = benchmark(imported, path), benchmark(imported, cells, "type")
    assert theirs.rows[0]["label"] == "cls_name"
    scored = ("trained model", "untrained model", "majority class")  # PCA's columns come in another order
    theirs_rows, our_rows = (without([r for r in table.rows if r["model"] in scored]) for table in (theirs, ours))
    assert theirs_rows == our_rows
    source = {"name": "cells.pt", "layer": "expressions", "recovered_counts": None, "values": "as_is"}
    assert theirs.details["source"] == source
    assert any("as they are (as_is): all are log1p of whole counts" in sentence for sentence in theirs.sentences)


def test_values_of_a_pt_file_are_never_transformed(imported, cells, write_pt, monkeypatch):
    path = write_pt(cells, scale=0.37, cls_name=cells.obs["type"].tolist())
    written = {np.float32(v) for row in torch.load(path, weights_only=True)["expressions"] for v in row}
    seen, encode = set(), imported.encode
    monkeypatch.setattr(imported, "encode", lambda batch: (seen.update(batch.values.tolist()), encode(batch))[1])
    table = benchmark_aaai2025(imported, path)
    assert seen - {0.0} <= {float(v) for v in written}
    assert any("no log1p of whole counts" in sentence for sentence in table.sentences)


def test_perturbed_genes_as_classes_go_to_the_linear_probe_alone(imported, cells, write_pt):
    ids = {"alpha": -1, "beta": 7, "gamma": 50}
    table = benchmark_aaai2025(imported, write_pt(cells, single_ctrl=[ids[name] for name in cells.obs["type"]]))
    assert set(table.details["cells"]["classes"]) == {"control", VOCABULARY.names[7], VOCABULARY.names[50]}
    assert [(r["model"], r["probe"]) for r in table.rows] == [
        *((name, "linear") for name in ("trained model", "untrained model", "depth only", "PCA")),
        ("variable genes", "logistic regression"), ("majority class", "none"),
    ]
    assert row(table, "PCA", "linear")["accuracy"] > 0.9


def test_a_perfect_embedding_scores_one_and_a_constant_one_chance(imported, cells, monkeypatch):
    truth = np.array([CLASSES.index(name) for name in cells.obs["type"]])
    for values, expected in [(np.eye(3)[truth] * 9, 1.0), (np.ones((120, 3)), None)]:
        monkeypatch.setattr(aaai2025, "embed_draw", lambda *_, values=values: values.astype(np.float32))
        table = benchmark_aaai2025(imported, cells, "type")
        for probe in ("k-NN", "linear"):
            result = row(table, "trained model", probe)
            if expected:
                assert (result["accuracy"], result["accuracy_sd"]) == (expected, 0)
            else:
                assert result["accuracy"] < 0.45
    assert row(table, "trained model", "linear")["chosen_on"] == "the test part (optimistic)"
    assert row(table, "trained model", "k-NN")["chosen_on"] is None
    assert "Optimistic: the linear probe's epoch is chosen by the test cells' own labels" in table.sentences[0]


def test_shuffled_labels_give_chance(imported, planted_cells):
    cells = planted_cells(300)
    cells.obs["type"] = np.random.default_rng(0).permutation(cells.obs["type"].to_numpy())
    for result in benchmark_aaai2025(imported, cells, "type").rows:
        assert result["accuracy"] < 0.45, result  # the best of ten looks at 90 cells is above a third


def test_the_order_of_the_cells_does_not_matter(imported, cells):
    first, turned = (benchmark_aaai2025(imported, c, "type") for c in (cells, cells[::-1].copy()))
    for probe in ("k-NN", "linear"):
        assert trials_of(first, "trained model", probe) == trials_of(turned, "trained model", probe)


def test_the_command(imported, cells, write_pt, tmp_path, capsys):
    imported.save_pretrained(tmp_path / "model", imported.provenance)
    path = write_pt(cells, cls_name=cells.obs["type"].tolist())
    paths = {"model": tmp_path / "model", "output": tmp_path / "out", "input": path}
    result = run_classification(ClassificationConfig(**paths, protocol="aaai2025"))
    record = json.loads((tmp_path / "out" / "results.json").read_text())
    assert record == json.loads(json.dumps(result))
    assert {r["protocol"] for r in record["rows"]} == {"aaai2025"}
    assert "| the test part (optimistic) |" in (tmp_path / "out" / "results.md").read_text()
    assert "not checkable" in capsys.readouterr().out


def test_bad_input_is_one_sentence(imported, model, cells, write_pt, tmp_path):
    path = write_pt(cells, cls_name=cells.obs["type"].tolist())
    both = {"cls_name": cells.obs["type"].tolist(), "single_ctrl": [-1] * 120}
    for message, call in [
        ("the model has another one: give a model made by scbench import-reference", lambda: benchmark_aaai2025(model, path)),
        ("--layer goes with AnnData", lambda: benchmark_aaai2025(imported, path, layer="X")),
        ("has no column 'type' in obs: choose --label among cls_name", lambda: benchmark_aaai2025(imported, path, "type")),
        ("--label is missing", lambda: benchmark_aaai2025(imported, cells)),
        ("--label is missing", lambda: benchmark_classification(imported, cells)),
        ("holds cls_name and single_ctrl: say with --label", lambda: benchmark_aaai2025(imported, write_pt(cells, **both))),
        ("with 1 classes of at least 10 cells", lambda: benchmark_aaai2025(imported, write_pt(cells, single_ctrl=[-1] * 120))),
        ("--seeds and --folds are no part of --protocol aaai2025",
         lambda: ClassificationConfig(model=path, input=path, output=path, protocol="aaai2025", seeds=4)),
    ]:
        with pytest.raises(UserError, match=message) as error:
            call()
        assert "\n" not in str(error.value)
