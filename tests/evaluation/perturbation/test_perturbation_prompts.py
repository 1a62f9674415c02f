"""Prompts on a frozen network against a plain re-statement on the reference's dense forward pass."""

import importlib.util
import json
from pathlib import Path

import anndata
import numpy as np
import pandas as pd
import pytest
import scipy.sparse
import torch
from scipy import stats
from torch import nn

from scbench.cli import main
from scbench.config import ModelConfig
from scbench.config.model import STRUCTURES
from scbench.data.batch import CellBatch
from scbench.data.cells import CellTokens, content_hash
from scbench.data.vocabulary import Vocabulary
from scbench.errors import UserError
from scbench.evaluation.external import ExternalEmbedding
from scbench.evaluation.perturbation import prompt_report
from scbench.evaluation.perturbation import prompts as prompts_module
from scbench.evaluation.perturbation.prompts import (
    PromptCells,
    benchmark_prompts,
    benchmark_prompts_of,
    read_prompt_cells,
    split_perturbed,
)
from scbench.kernels import random
from scbench.kernels.random import Stream
from scbench.models.import_reference import import_reference
from scbench.models.model import ExpressionModel

_path = Path(__file__).parents[3] / "benchmarks" / "reference_model.py"
_spec = importlib.util.spec_from_file_location("reference_model", _path)
reference = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(reference)

VOCABULARY = Vocabulary.build(f"GENE{i:02d}" for i in range(60))
MAX_GENES, WIDTH = 15, 16
PERTURBED = [-1, 7, 31, 50]
NAMES = {-1: "NT", 7: "GENE07", 31: "GENE31", 50: "GENE50"}


@pytest.fixture
def networks(tmp_path):
    """The reference's network of a structure, and ours with its weights."""

    def make(structure="transformer", theirs="transformer"):
        oracle = reference.ReferenceModel(theirs, VOCABULARY.size, VOCABULARY.pad, width=WIDTH, layers=1, heads=2)
        torch.save(oracle.randomize().eval().state_dict(), tmp_path / "best_model.pt")
        return oracle, import_reference(tmp_path / "best_model.pt", VOCABULARY, structure, max_genes=MAX_GENES, heads=2)

    return make


@pytest.fixture
def cells() -> PromptCells:
    """60 cells of 10 to 20 genes; one perturbation raises all counts, one lowers them."""
    generator = np.random.default_rng(1)
    perturbed = np.resize(PERTURBED, 60)
    lengths = generator.integers(10, 21, 60)
    genes = [np.sort(generator.choice(60, length, replace=False)) for length in lengths]
    rates = [{7: 60, 31: 0.5}.get(gene, 5) for gene in perturbed]
    counts = [1 + generator.poisson(rate, length) for rate, length in zip(rates, lengths, strict=True)]
    offsets = np.concatenate([[0], np.cumsum(lengths)])
    genes, counts = np.concatenate(genes).astype(np.uint32), np.concatenate(counts).astype(np.uint32)
    tokens = CellTokens(genes, counts, offsets, np.add.reduceat(counts, offsets[:-1]).astype(np.int64))
    return PromptCells("planted", tokens, content_hash(genes, counts, offsets), perturbed)


def answers(oracle, ids: torch.Tensor, prompts: torch.Tensor | None) -> torch.Tensor:
    """What the reference predicts at every position when no value is fed, [B, S]."""
    gene_states = oracle.emb_trans(oracle.embedding(ids))
    x = gene_states.clone()
    if prompts is not None:
        x[:, 0] = x[:, 0] + prompts
    if oracle.structure == "transformer":
        return oracle.decoder(oracle.encoder(x, src_key_padding_mask=ids == VOCABULARY.pad))[..., 0]
    return (oracle.gene2query(gene_states) * oracle.encoder(x)[:, None]).sum(-1)


def dense(genes: list[np.ndarray], values: list[np.ndarray]) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Ids, values and which positions are genes, [B, S]."""
    ids = torch.full((len(genes), MAX_GENES + 1), VOCABULARY.pad)
    truth, real = torch.zeros(ids.shape), torch.zeros(ids.shape, dtype=torch.bool)
    ids[:, 0] = VOCABULARY.cls
    for i, (g, v) in enumerate(zip(genes, values, strict=True)):
        ids[i, 1 : len(g) + 1], truth[i, 1 : len(g) + 1] = torch.from_numpy(g.astype(np.int64)), torch.from_numpy(v)
        real[i, 1 : len(g) + 1] = True
    return ids, truth, real


@pytest.mark.parametrize(("structure", "theirs"), [("transformer", "transformer"), ("cnn", "cnn_base")])
def test_prompted_predictions_and_their_gradient_are_the_references(networks, structure, theirs):
    oracle, model = networks(structure, theirs)
    generator = np.random.default_rng(0)
    genes = [np.sort(generator.choice(60, n, replace=False)) for n in (15, 4, 11)]
    values = [generator.uniform(0.5, 3, len(g)).astype(np.float32) for g in genes]
    prompts = torch.from_numpy(generator.normal(size=(3, WIDTH)).astype(np.float32))
    ours, others = prompts.clone().requires_grad_(), prompts.clone().requires_grad_()
    batch = CellBatch.from_lists(genes, values, [np.ones(len(g), bool) for g in genes], pad_to=MAX_GENES)
    squares, predictions = model.prompted(batch, ours)
    squares.backward()
    ids, truth, real = dense(genes, values)
    expected = answers(oracle, ids, others)
    (expected - truth)[real].square().sum().backward()
    torch.testing.assert_close(predictions, expected[real].detach(), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(ours.grad, others.grad, rtol=1e-3, atol=1e-4)
    with torch.no_grad():
        torch.testing.assert_close(model.prompted(batch)[1], answers(oracle, ids, None)[real], rtol=1e-4, atol=1e-5)
        other_values = batch._replace(values=torch.rand(len(batch.values)))
        assert torch.equal(model.prompted(other_values)[1], model.prompted(batch)[1]), "no value is fed"


@pytest.mark.parametrize("structure", STRUCTURES)
def test_every_structure_takes_prompts(structure):
    model = ExpressionModel(ModelConfig(vocabulary_size=VOCABULARY.size, structure=structure, width=WIDTH, layers=1, heads=2,
                                        max_genes=MAX_GENES, mvc=True), VOCABULARY).eval()
    genes = [np.arange(9), np.arange(4, 12)]
    batch = CellBatch.from_lists(genes, [np.ones(len(g)) for g in genes], [np.ones(len(g), bool) for g in genes])
    prompts = torch.zeros(2, WIDTH, requires_grad=True)
    squares, plain = model.prompted(batch, prompts)
    squares.backward()
    changed = model.prompted(batch, torch.ones(2, WIDTH))[1]
    assert torch.isfinite(plain).all()
    told = structure != "linear"  # whose tokens never hear of <cls>
    assert (changed != plain).any() == told
    assert (prompts.grad != 0).any() == told


def drawn(cells: PromptCells, key: int) -> tuple[list[np.ndarray], list[np.ndarray]]:
    """Genes and values of each cell as a trial shows them."""
    genes, values = [], []
    for i, (start, stop) in enumerate(zip(cells.tokens.offsets[:-1], cells.tokens.offsets[1:], strict=True)):
        g, v = cells.tokens.genes[start:stop], np.log1p(cells.tokens.counts[start:stop])
        if len(g) > MAX_GENES:
            words = random.bits(random.bits(random.key(key, Stream.SUBSET), cells.hashes[i]), g)
            clocks = -np.log(random.uniform(words)) / (v - v.min() + 1e-5)
            shown = np.sort(np.argsort(clocks)[:MAX_GENES])
            g, v = g[shown], v[shown]
        genes.append(g)
        values.append(v.astype(np.float32))
    return genes, values


def restated(oracle, cells: PromptCells, trial_key: int) -> dict[str, float]:
    """One trial, in plain torch. 60 cells: an epoch is one step."""
    split, draw, base_order, prompt_order, start = (random.fold(trial_key, part) for part in range(5))
    del base_order, prompt_order  # a batch has no order
    order = np.argsort(random.bits(split, cells.hashes))
    train, test = order[:42], order[42:]
    ids, truth, real = dense(*drawn(cells, draw))
    oracle.requires_grad_(False)

    def loss(rows, prompts):
        rows = torch.from_numpy(np.array(rows))
        return nn.functional.mse_loss(answers(oracle, ids[rows], prompts)[real[rows]], truth[rows][real[rows]])

    controls = [i for i in train if cells.perturbed[i] == -1]
    treated = [i for i in train if cells.perturbed[i] != -1]
    asked = [i for i in test if cells.perturbed[i] != -1]
    base = torch.zeros(WIDTH, requires_grad=True)
    optimizer = torch.optim.Adam([base], lr=5e-3)
    for _ in range(50):
        optimizer.zero_grad()
        loss(controls, base.expand(len(controls), -1)).backward()
        optimizer.step()
    base = base.detach()
    linear = nn.Linear(WIDTH, WIDTH)
    generator = torch.Generator().manual_seed(start >> 1)
    linear.weight.data.uniform_(-(WIDTH**-0.5), WIDTH**-0.5, generator=generator)
    linear.bias.data.copy_(base)
    optimizer = torch.optim.Adam(linear.parameters(), lr=5e-3)

    def prompts(rows):
        return linear(oracle.emb_trans(oracle.embedding(torch.from_numpy(cells.perturbed[rows]))))

    for _ in range(50):
        optimizer.zero_grad()
        loss(treated, prompts(treated)).backward()
        optimizer.step()
    with torch.no_grad():
        found = {
            "prompt": float(loss(asked, prompts(asked))),
            "base prompt only": float(loss(asked, base.expand(len(asked), -1))),
            "no prompt": float(loss(asked, None)),
        }
    shown = {gene: [] for gene in range(60)}
    for i in treated:
        for gene, value in zip(ids[i][real[i]].tolist(), truth[i][real[i]].tolist(), strict=True):
            shown[gene].append(value)
    everything = np.mean([value for values in shown.values() for value in values])
    pairs = [(gene, value) for i in asked
             for gene, value in zip(ids[i][real[i]].tolist(), truth[i][real[i]].tolist(), strict=True)]
    means = [(np.mean(shown[gene]) if shown[gene] else everything) - value for gene, value in pairs]
    return {**found, "gene mean": float(np.mean(np.square(means)))}


def test_every_trial_equals_a_plain_restatement(networks, cells, monkeypatch):
    monkeypatch.setattr(prompts_module, "TRIALS", 2)
    oracle, model = networks()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    table = benchmark_prompts(model, cells, seed=4)
    expected = [restated(oracle, cells, random.key(4, Stream.EVALUATION, 21, trial)) for trial in range(2)]
    for name in ("prompt", "base prompt only", "no prompt", "gene mean"):
        trials = next(t["mse"] for t in table.details["trials"] if t["model"] == name)
        np.testing.assert_allclose(trials, [e[name] for e in expected], rtol=1e-3, err_msg=name)
        row = next(r for r in table.rows if r["model"] == name)
        assert (row["mse"], row["mse_sd"]) == pytest.approx((np.mean(trials), np.std(trials)), abs=1e-12)
    assert expected[0]["prompt"] < expected[0]["base prompt only"] < expected[0]["no prompt"], "something was learnt"
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items()), "the network is frozen"
    assert all(p.requires_grad for p in model.parameters())
    assert not model.training


def test_a_planted_effect_is_learnt_and_shuffled_perturbations_are_not(networks, cells, monkeypatch):
    monkeypatch.setattr(prompts_module, "TRIALS", 2)
    monkeypatch.setattr(prompts_module, "LEARNING_RATE", 0.3)  # 42 cells are one step an epoch
    model, shuffled = networks("cnn", "cnn_base")[1], cells.perturbed.copy()
    treated = np.flatnonzero(shuffled != -1)
    shuffled[treated] = np.random.default_rng(0).permutation(shuffled[treated])
    found = []
    for perturbed in (cells.perturbed, shuffled):
        found.append({r["model"]: r["mse"] for r in benchmark_prompts(model, cells._replace(perturbed=perturbed)).rows})
    assert found[0]["prompt"] < 0.3 * found[0]["base prompt only"], found
    assert found[0]["prompt"] < 0.3 * found[0]["gene mean"], found
    assert found[1]["prompt"] > 0.9 * found[1]["base prompt only"], found


def test_intervals_and_comparisons_take_the_variance_of_repeated_splits():
    errors = {"prompt": [1.0, 2.0, 4.0, 3.0, 5.0], "no prompt": [2.0, 2.5, 4.5, 4.0, 6.0], "gene mean": [9.0] * 5}
    row = prompt_report.row("prompt", errors["prompt"], "unseen")
    half = stats.t.ppf(0.975, 4) * np.sqrt((1 / 5 + 3 / 7) * np.var(errors["prompt"], ddof=1))
    assert (row["mse"], row["mse_low"], row["mse_high"]) == pytest.approx((3, 3 - half, 3 + half))
    (first,) = prompt_report.comparisons(errors)
    assert (first["baseline"], first["verdict"]) == ("no prompt", "beats")
    assert [one["baseline"] for one in prompt_report.differences(errors)] == ["no prompt", "gene mean"]
    assert first["difference"] == prompt_report.differences(errors)[0]["mse"] == pytest.approx(-0.8)
    half = stats.t.ppf(0.975, 4) * np.sqrt((1 / 5 + 3 / 7) * np.var([1, 0.5, 0.5, 1, 1], ddof=1))
    assert first["high"] == pytest.approx(-0.8 + half)
    assert "beats the best baseline, no prompt (-0.8000" in first["sentence"]
    assert prompt_report.sentences(errors, {}, True, False)[0] == first["sentence"]
    silent = prompt_report.sentences({**errors, "no prompt": errors["prompt"]}, {}, False, True)
    assert any("no gene hears of <cls>" in sentence for sentence in silent)
    assert any("Errors are of bins" in sentence for sentence in silent)


def test_what_is_held_out(cells):
    for key in range(20):
        train, test = split_perturbed(cells, True, key)
        assert len(train) + len(test) == 60
        genes = set(cells.perturbed[test])
        assert len(genes) == 1, "one of three"
        assert -1 not in genes
        assert not genes & set(cells.perturbed[train])
        train, test = split_perturbed(cells, False, key)
        assert len(train) == 42
        assert not set(train) & set(test)
        assert len(test) == 18 - (cells.perturbed[np.setdiff1d(np.arange(60), train)] == -1).sum()
    held_out = {int(cells.perturbed[split_perturbed(cells, True, key)[1]][0]) for key in range(20)}
    assert held_out == {7, 31, 50}


def test_unseen_perturbations_and_the_sentences(networks, cells, monkeypatch):
    monkeypatch.setattr(prompts_module, "TRIALS", 1)
    monkeypatch.setattr(prompts_module, "EPOCHS", 2)
    table = benchmark_prompts(networks()[1], cells, unseen=True)
    assert {row["split"] for row in table.rows} == {"unseen"}
    assert table.details["test_cells"] == [15]
    assert "no zero is ever scored" in table.sentences[1]
    assert "| prompt |" in table.markdown()


@pytest.fixture
def write_pt(cells, tmp_path):
    def write(**labels) -> Path:
        edges = list(zip(cells.tokens.offsets[:-1], cells.tokens.offsets[1:], strict=True))
        genes = [cells.tokens.genes[a:b].tolist() for a, b in edges]
        values = [np.log1p(cells.tokens.counts[a:b]).astype(np.float32).tolist() for a, b in edges]
        torch.save({"genes": genes, "expressions": values, **labels}, tmp_path / "cells.pt")
        return tmp_path / "cells.pt"

    return write


def test_the_cells_of_a_pt_file(networks, cells, write_pt):
    read = read_prompt_cells(networks()[1], write_pt(single_ctrl=cells.perturbed.tolist()))
    np.testing.assert_array_equal(read.hashes, cells.hashes)
    np.testing.assert_array_equal(read.perturbed, cells.perturbed)
    np.testing.assert_array_equal(read.tokens.genes, cells.tokens.genes)
    assert (read.name, read.overlap) == ("cells.pt", "not checkable")


def as_anndata(cells, names: dict) -> anndata.AnnData:
    shape = (len(cells.hashes), len(VOCABULARY.names))
    matrix = scipy.sparse.csr_matrix((cells.tokens.counts, cells.tokens.genes, cells.tokens.offsets), shape)[:, :60]
    obs = pd.DataFrame({"condition": [names[int(gene)] for gene in cells.perturbed]}, index=[f"c{i}" for i in range(60)])
    return anndata.AnnData(matrix, obs=obs, var=pd.DataFrame(index=VOCABULARY.names[:60]))


def test_the_cells_of_an_anndata(networks, cells):
    model = networks()[1]
    names = {-1: "NT", 7: "GENE07+ctrl", 31: "GENE31", 50: "GENE50"}
    read = read_prompt_cells(model, as_anndata(cells, names), "condition", "NT")
    np.testing.assert_array_equal(read.perturbed, cells.perturbed)
    np.testing.assert_array_equal(read.hashes, cells.hashes)
    odd = read_prompt_cells(model, as_anndata(cells, names | {31: "GENE31+GENE01", 50: "NOBODY"}), "condition", "NT")
    assert odd.left_out == {"GENE31+GENE01": 15, "NOBODY": 15}
    np.testing.assert_array_equal(odd.perturbed, cells.perturbed[(cells.perturbed != 31) & (cells.perturbed != 50)])
    with pytest.raises(UserError, match="no cell of AnnData is called 'NTC'"):
        read_prompt_cells(model, as_anndata(cells, names), "condition", "NTC")


def test_the_verb(networks, cells, write_pt, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(prompts_module, "TRIALS", 2)
    monkeypatch.setattr(prompts_module, "EPOCHS", 1)
    model = networks()[1]
    model.save_pretrained(tmp_path / "model", model.provenance)
    path = write_pt(single_ctrl=cells.perturbed.tolist())
    arguments = ["benchmark", "perturbation", str(tmp_path / "model"), str(path), "-o", str(tmp_path / "out"), "--unseen",
                 "--protocol", "aaai2025", "--json"]
    main(arguments)
    printed = json.loads(capsys.readouterr().out)
    assert printed == json.loads((tmp_path / "out" / "results.json").read_text())
    assert (tmp_path / "out" / "forest.png").exists()
    kinds = [(row["model"], row["kind"], row["split"], row["values"], row["task"]) for row in printed["rows"]]
    assert kinds == [
        (name, kind, "unseen", "as_is", "perturbation") for name, kind in
        [("prompt", "model"), ("base prompt only", "baseline"), ("no prompt", "baseline"), ("gene mean", "baseline")]
    ]
    table = benchmark_prompts_of(model, as_anndata(cells, NAMES), "condition", "NT", unseen=True)
    assert [row["mse"] for row in table.rows] == [row["mse"] for row in printed["rows"]]
    for changed, message in [
        (["--control", "NT"], "implies --perturbation-column and --control"), (["--folds", "4"], "--folds is no part of"),
        (["--total-counts-column", "n"], "--total-counts-column is no part of"),
    ]:
        with pytest.raises(SystemExit) as stop:
            main([*arguments[:4], "-o", str(tmp_path / "again"), "--protocol", "aaai2025", *changed])
        assert stop.value.code == 2
        assert message in capsys.readouterr().err


def test_bad_input_is_one_sentence(networks, cells, write_pt):
    model = networks()[1]
    few = PromptCells("few", *(cells[1:3]), np.where(np.arange(60) == 0, -1, 7))
    for message, call in [
        ("has no column 'single_ctrl' in obs", lambda: read_prompt_cells(model, write_pt(cls_name=["a"] * 60))),
        ("--perturbation-column and --control must be given", lambda: benchmark_prompts_of(model, as_anndata(cells, NAMES))),
        ("X_other is none: give a model directory", lambda: benchmark_prompts_of(ExternalEmbedding("obsm:X_other"), "a.pt")),
        ("planted has no control cell", lambda: benchmark_prompts(model, cells._replace(perturbed=np.full(60, 7)))),
        ("planted has 0 perturbed genes", lambda: benchmark_prompts(model, cells._replace(perturbed=np.full(60, -1)))),
        ("few has 1 perturbed genes, and two are needed", lambda: benchmark_prompts(model, few, unseen=True)),
    ]:
        with pytest.raises(UserError, match=message) as error:
            call()
        assert "\n" not in str(error.value)
