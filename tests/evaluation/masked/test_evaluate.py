"""Errors on masked genes: one law for every model, units that can be compared, numbers that loops confirm."""

import csv
import json
import math

import anndata
import numpy as np
import pandas as pd
import pytest
import scipy.sparse
import torch

from scbench import prepare
from scbench.cli import main
from scbench.config import OWN_POOLING, STRUCTURES, EvaluateConfig, ModelConfig
from scbench.data.store import Store
from scbench.data.values import quantile_bins
from scbench.errors import UserError
from scbench.evaluation import embed
from scbench.evaluation.masked.errors import GENES, SQUARED, bootstrap, error_sums, metrics
from scbench.evaluation.masked.evaluate import differences, evaluate_baselines, evaluate_model, run_evaluate
from scbench.evaluation.masked.genes import stored_cells
from scbench.evaluation.scores import resamples
from scbench.models.model import ExpressionModel

MAX_GENES = 30
MODELS = {
    **{f"{structure} {recipe}": {"structure": structure, "recipe": recipe,
                                 "pooling": "avg" if structure in ("linear", "mamba") else None}
       for structure in STRUCTURES for recipe in ("default", "aaai2025")},
    "bins": {"preprocess": "bin"},
    "the reference's bins": {"preprocess": "bin", "recipe": "aaai2025"},
    "per 10,000": {"normalize": "total"},
    "trained on more genes": {"max_genes": 50},
    "trained on fewer genes": {"max_genes": 20, "recipe": "aaai2025"},
}
MEANT = ("masked_genes", "mse", "value_weighted", "relative", "mse_count_1", "mse_count_2_10", "mse_count_over_10")


@pytest.fixture(scope="module")
def store(small_store) -> Store:
    return Store.open(small_store)


def make_model(store: Store, kind: type[ExpressionModel] = ExpressionModel, **options) -> ExpressionModel:
    settings = {"width": 8, "layers": 1, "heads": 2, "max_genes": MAX_GENES, **options}
    return kind(ModelConfig(vocabulary_size=store.vocabulary.size, **settings), store.vocabulary, seed=1).eval()


class Oracle(ExpressionModel):
    """Predicts what is true, plus its number `wrong`, in the units of its own values."""

    wrong = 0.0

    def forward(self, batch):
        return super().forward(batch)._replace(regression=batch.targets + self.wrong, mvc=batch.targets + 2 * self.wrong)


def whole(store: Store, split: str = "test") -> list[dict[int, int]]:
    """Every cell of a split as {gene: count}."""
    return [
        dict(zip(cells.genes.tolist(), cells.counts.tolist(), strict=True)) for _, cells in stored_cells(store.split(split), 1)
    ]


def shown(model: ExpressionModel, store: Store, **options) -> tuple[dict, dict]:
    """What a model is asked: for each draw, (cell, gene) → whether the gene is masked."""
    batches = []
    hook = model.register_forward_pre_hook(lambda _, arguments: batches.append(arguments[0]))
    evaluate_model(model, store, **{"max_genes": MAX_GENES, **options})
    hook.remove()
    asked: tuple[dict, dict] = ({}, {})
    for number, batch in enumerate(batches):
        hidden = set(batch.masked.tolist())
        for row, cell in enumerate(batch.cells.tolist()):
            first = int(batch.cell_offsets[row])
            for place in range(first + 1, first + int(batch.lengths[row])):  # behind <cls>, before pads
                asked[number % 2][cell, int(batch.genes[place])] = place in hidden
    return asked


@pytest.fixture(scope="module")
def reference(store) -> tuple[dict, dict]:
    return shown(make_model(store), store)


def test_the_law(store, reference):
    uniform, weighted = reference
    cells = whole(store)
    for asked in reference:
        for cell, counts in enumerate(cells):
            genes = {gene for number, gene in asked if number == cell}
            assert genes <= counts.keys()
            assert len(genes) == min(len(counts), MAX_GENES)
        assert sum(asked.values()) / len(asked) == pytest.approx(0.4, abs=0.05)
    assert uniform.keys() != weighted.keys()
    mean = [np.mean([math.log1p(cells[cell][gene]) for cell, gene in asked]) for asked in reference]
    assert mean[1] > mean[0] + 0.1  # by weight: larger counts
    short = [cell for cell, counts in enumerate(cells) if len(counts) <= MAX_GENES]
    assert short
    for place, hidden in uniform.items():
        if place in weighted:
            assert weighted[place] == hidden  # a mask is the gene's, not the draw's


@pytest.mark.parametrize("name", MODELS)
def test_every_model_is_asked_the_same(store, reference, name):
    model = make_model(store, **MODELS[name])
    assert shown(model, store) == reference


@pytest.mark.parametrize("name", MODELS)
def test_every_model_answers_with_the_heads_it_has(store, name):
    model = make_model(store, **MODELS[name])
    rows = evaluate_model(model, store, max_genes=MAX_GENES).rows()
    assert [row["method"] for row in rows] == (["mvc"] if model.config.structure in OWN_POOLING else ["regression", "mvc"])
    expected = evaluate_baselines(store, max_genes=MAX_GENES).rows()[0]
    for row in rows:
        assert (row["masked_genes"], row["weighted_masked_genes"]) == (
            expected["masked_genes"], expected["weighted_masked_genes"]
        )
        assert all(np.isfinite(row[f"{prefix}{name}"]) for name in MEANT for prefix in ("", "weighted_"))
        assert row["mse_low"] < row["mse"] < row["mse_high"]
    only = make_model(store, mvc=False)
    assert list(evaluate_model(only, store).errors) == ["regression"]


def test_seed_cells_and_length_decide_what_is_asked(store, reference):
    model = make_model(store)
    assert shown(model, store, seed=1) != reference
    some = shown(model, store, cells=20)
    for asked, all_asked in zip(some, reference, strict=True):
        assert asked == {place: hidden for place, hidden in all_asked.items() if place[0] < 20}
    assert shown(model, store, max_genes=None) == reference
    longer = shown(model, store, max_genes=60)
    assert all(longer[0][place] == hidden for place, hidden in reference[0].items())
    assert len(longer[0]) > len(reference[0])


@pytest.mark.parametrize("options", [{}, {"normalize": "total"}])
def test_a_perfect_model_has_no_error_and_a_wrong_one_what_it_earns(store, reference, options):
    model = make_model(store, Oracle, **options)
    for row in evaluate_model(model, store).rows():
        assert all(row[f"{prefix}{name}"] < 1e-9 for name in MEANT[1:] for prefix in ("", "weighted_"))
    model.wrong = 0.25
    evaluation = evaluate_model(model, store)
    cells = whole(store)
    for prefix, asked in zip(("", "weighted_"), reference, strict=True):
        counts = np.array([cells[cell][gene] for (cell, gene), hidden in asked.items() if hidden])
        totals = np.array([sum(cells[cell].values()) for (cell, _), hidden in asked.items() if hidden])
        truth = np.log1p(counts)
        for row, wrong in zip(evaluation.rows(), (0.25, 0.5), strict=True):
            error = np.full(len(truth), wrong)
            if options:
                error = np.log1p(np.expm1(np.log1p(counts * 1e4 / totals) + wrong) * totals / 1e4) - truth
            expected = {
                "masked_genes": len(truth), "mse": np.mean(error**2),
                "value_weighted": (truth * error**2).sum() / truth.sum(), "relative": np.mean((error / truth) ** 2),
            }
            for name, chosen in [("1", counts == 1), ("2_10", (counts > 1) & (counts < 11)), ("over_10", counts > 10)]:
                expected[f"mse_count_{name}"] = np.mean(error[chosen] ** 2)
            for name, value in expected.items():
                assert row[f"{prefix}{name}"] == pytest.approx(value, rel=1e-5), name


@pytest.fixture(scope="module")
def few_counts(tmp_path_factory) -> Store:
    """Cells of 150 genes whose counts are 1, 2, 5 or 20: a bin holds one count, and every count stays visible somewhere."""
    folder = tmp_path_factory.mktemp("few")
    counts = np.random.default_rng(0).choice([1, 2, 5, 20], (90, 150))
    var = pd.DataFrame(index=[f"ENSG{i:011d}" for i in range(1, 151)])
    anndata.AnnData(scipy.sparse.csr_matrix(counts.astype(np.float32)), var=var).write_h5ad(folder / "cells.h5ad")
    prepare([folder / "cells.h5ad"], folder / "store", split=".6,.1,.3", workers=1)
    return Store.open(folder / "store")


def test_bins_mean_the_counts_that_are_visible_in_them(few_counts):
    model = make_model(few_counts, Oracle, preprocess="bin", max_genes=100)
    evaluation = evaluate_model(model, few_counts)
    assert evaluation.effective_bins == 4
    for row in evaluation.rows():
        assert row["mse"] < 1e-9
        assert row["weighted_mse"] < 1e-9
    model.wrong = 100.0  # above every bin: the largest visible count is meant
    masked = [(cell, gene) for (cell, gene), hidden in shown(model, few_counts, max_genes=100)[0].items() if hidden]
    cells = whole(few_counts)
    error = np.log1p(20) - np.log1p([cells[cell][gene] for cell, gene in masked])
    assert evaluate_model(model, few_counts).rows()[0]["mse"] == pytest.approx(np.mean(error**2), rel=1e-5)


def test_effective_bins_are_the_distinct_ones_of_a_cell(store):
    distinct = []
    for _, cells in stored_cells(store.split("test"), 1):
        distinct.append(len(set(quantile_bins(cells.counts, cells.offsets).tolist())))
    assert evaluate_model(make_model(store, preprocess="bin"), store).effective_bins == pytest.approx(np.mean(distinct))
    reference = evaluate_model(make_model(store, preprocess="bin", recipe="aaai2025"), store)
    assert 1 < reference.effective_bins < MAX_GENES
    assert evaluate_model(make_model(store), store).effective_bins is None


def test_sums_of_errors_equal_loops():
    generator = np.random.default_rng(3)
    counts = np.array([1, 2, 10, 11, 1, 900, 3])
    cells = np.array([0, 0, 2, 2, 2, 3, 3])
    predicted = generator.normal(2, 1, 7)
    sums = error_sums(predicted, counts, cells, 5)
    expected = np.zeros((5, 9))
    for value, count, cell in zip(predicted, counts, cells, strict=True):
        column = 0 if count == 1 else 1 if count <= 10 else 2
        true, squared = math.log1p(count), (value - math.log1p(count)) ** 2
        expected[cell, column] += 1
        expected[cell, 3 + column] += squared
        expected[cell, 6:] += [true, true * squared, squared / true**2]
    np.testing.assert_allclose(sums, expected, rtol=1e-12)
    assert metrics(sums[:1])["mse_count_over_10"] is None


def test_intervals_are_of_resampled_cells_and_differences_are_paired(store):
    model = make_model(store, Oracle)
    model.wrong = 0.3
    evaluation, baselines = evaluate_model(model, store, seed=4), evaluate_baselines(store, max_genes=MAX_GENES, seed=4)
    ours, theirs = evaluation.errors["regression"]["uniform"], baselines.errors["gene mean"]["uniform"]
    weights = np.concatenate(list(resamples(len(ours), 4)))
    mse = [weights @ e[:, SQUARED].sum(1) / (weights @ e[:, GENES].sum(1)) for e in (ours, theirs)]
    np.testing.assert_allclose(bootstrap(evaluation.errors, 4)["regression", "uniform"], mse[0], rtol=1e-12)
    found = differences(evaluation, baselines)
    assert len(found) == 2 * 3 * 2
    row = next(d for d in found if (d["method"], d["baseline"], d["draw"]) == ("regression", "gene mean", "uniform"))
    low, high = np.percentile((mse[0] - mse[1])[1:], [2.5, 97.5])
    assert (row["mse"], row["mse_low"], row["mse_high"]) == pytest.approx(((mse[0] - mse[1])[0], low, high))
    for same in differences(evaluation, evaluation):
        if same["method"] == same["baseline"]:
            assert (same["mse"], same["mse_low"], same["mse_high"]) == (0, 0, 0)
    with pytest.raises(ValueError, match="different laws"):
        differences(evaluation, evaluate_baselines(store, max_genes=MAX_GENES))


def test_baselines_equal_loops_over_the_store(store, reference):
    train, test = whole(store, "train"), whole(store)
    logs: dict[int, list[float]] = {}
    for counts in train:
        for gene, count in counts.items():
            logs.setdefault(gene, []).append(math.log1p(count))
    means = {gene: np.mean(values) for gene, values in logs.items()}
    squared = {"gene mean": [], "gene mean + cell offset": []}
    for cell, counts in enumerate(test):
        genes = [gene for number, gene in reference[0] if number == cell]
        visible = [gene for gene in genes if not reference[0][cell, gene]]
        offset = np.mean([math.log1p(counts[gene]) - means[gene] for gene in visible]) if visible else 0.0
        for gene in set(genes) - set(visible):
            error = math.log1p(counts[gene]) - means[gene]
            squared["gene mean"].append(error**2)
            squared["gene mean + cell offset"].append((error - offset) ** 2)
    rows = {row["method"]: row for row in evaluate_baselines(store, max_genes=MAX_GENES).rows()}
    assert list(rows) == ["gene mean", "gene mean + cell offset", "truncated Poisson"]
    for name, errors in squared.items():
        assert rows[name]["mse"] == pytest.approx(np.mean(errors), rel=1e-9)


def test_cells_of_pretraining_are_told(store):
    model = make_model(store)
    hashes = store.split("test").cells()["content_hash"].to_numpy()
    for known, overlap, number in [(None, "not checkable", None), (np.sort(hashes[:5]), "transductive", 5),
                                   (np.array([1, 2], dtype=np.uint64), "unseen", 0)]:
        model.training_cells = known
        evaluation = evaluate_model(model, store)
        assert (evaluation.overlap, evaluation.overlapping) == (overlap, number)
        assert {row["overlap"] for row in evaluation.rows()} == {overlap}
    model.training_cells = np.sort(hashes[-5:])
    assert evaluate_model(model, store, cells=20).overlap == "unseen"


def test_the_same_numbers_twice_and_the_model_left_as_it_was(store):
    model = make_model(store, dropout=0.3).train()
    first, state = evaluate_model(model, store), torch.random.get_rng_state()
    again = evaluate_model(model, store)
    assert model.training
    assert torch.equal(state, torch.random.get_rng_state())
    np.testing.assert_array_equal(first.errors["mvc"]["weighted"], again.errors["mvc"]["weighted"])


@pytest.fixture
def files(store, tmp_path):
    """The options of a run on a saved model, with changes."""
    model = make_model(store)
    train = store.split("train").cells()["content_hash"].to_numpy()
    model.save_pretrained(tmp_path / "model", {}, train)
    return lambda **options: EvaluateConfig(**{"model": tmp_path / "model", "store": store.path, **options})


def test_run_evaluate_writes_and_shows_the_table(files, tmp_path, capsys):
    result = run_evaluate(files(output=tmp_path / "out"))
    record = json.loads((tmp_path / "out" / "results.json").read_text())
    assert record == json.loads(json.dumps(result))
    methods = ["regression", "mvc", "gene mean", "gene mean + cell offset", "truncated Poisson"]
    assert [row["method"] for row in record["rows"]] == methods
    assert {row["overlap"] for row in record["rows"]} == {"unseen"}
    assert record["law"]["cells"] == 60
    assert record["model"]["fingerprint"] == embed.fingerprint(embed.load_model(tmp_path / "model"))
    with open(tmp_path / "out" / "results.csv", newline="") as file:
        assert [row["mse"] for row in csv.DictReader(file)] == [str(row["mse"]) for row in record["rows"]]
    shown = capsys.readouterr().out
    for text in (shown, (tmp_path / "out" / "results.md").read_text()):
        assert "The regression head loses to gene mean + cell offset (mean squared error +" in text  # it is untrained
        assert "Masked genes of 60 test cells" in text
    main(["evaluate", str(tmp_path / "model"), str(files().store), "--split", "validation", "--cells", "10", "--json"])
    assert json.loads(capsys.readouterr().out)["law"]["split"] == "validation"


def test_what_a_model_is_told_is_said(store, tmp_path):
    for options, said in [({"normalize": "total"}, "is told each cell's total count"),
                          ({"library_size_offset": True}, "is told each cell's total count"),
                          ({"preprocess": "bin"}, "distinct ones in a cell")]:
        name = tmp_path / next(iter(options))
        make_model(store, **options).save_pretrained(name, {})
        sentences = run_evaluate(EvaluateConfig(model=name, store=store.path, cells=20, json=True))["sentences"]
        assert any(said in sentence for sentence in sentences)
        assert any("cannot be checked" in sentence for sentence in sentences)


def test_bad_input_is_one_sentence(files, store, few_counts, cells_file, tmp_path, capsys):
    prepare([cells_file], tmp_path / "untested", split=".9,.1,0", workers=1)
    (tmp_path / "taken").mkdir()
    (tmp_path / "taken" / "mine").write_text("")
    make_model(store, structure="linear_mixer").save_pretrained(tmp_path / "mixer", {})
    for options, message in [
        ({"model": tmp_path}, "not a model directory"),
        ({"store": tmp_path / "none"}, "there is no store"),
        ({"store": tmp_path / "untested"}, r"the test split of .*untested is empty: .*--split"),
        ({"store": few_counts.path}, "another vocabulary"),
        ({"output": tmp_path / "taken"}, "exists already"),
        ({"model": tmp_path / "mixer", "max_genes": 31}, "--max-genes is 31: this linear_mixer has weights for 30 genes only"),
        ({"cells": 1, "mask_ratio": 1e-9}, "no gene of the 1 evaluated cells was masked"),
    ]:
        with pytest.raises(UserError, match=message):
            run_evaluate(files(**options))
    for options, message in [({"cells": 0}, "--cells is 0"), ({"max_genes": 0}, "--max-genes is 0"),
                             ({"mask_ratio": 1.0}, "--mask-ratio is 1.0")]:
        with pytest.raises(UserError, match=message):
            files(**options)
    model = make_model(store)
    with torch.no_grad():
        model.regression_head.linear3.bias.fill_(math.nan)
    with pytest.raises(UserError, match="not finite"):
        evaluate_model(model, store)
    with pytest.raises(SystemExit) as stop:
        main(["evaluate", str(tmp_path), str(store.path)])
    assert stop.value.code == 2
    assert "not a model directory" in capsys.readouterr().err
