"""The count-splitting benchmark on planted cells: what the numbers must be, who may take part, what is refused."""

import json
import os
from pathlib import Path

import anndata
import numpy as np
import pandas as pd
import pytest
import scipy.sparse

from scbench.cli import main
from scbench.config import ModelConfig
from scbench.data.cells import content_hash, to_tokens
from scbench.data.gene_identity import map_genes
from scbench.data.sources.anndata import AnnDataSource
from scbench.data.vocabulary import Vocabulary
from scbench.errors import UserError
from scbench.evaluation import embed, embedding_files
from scbench.evaluation.counts import benchmark
from scbench.evaluation.counts.benchmark import benchmark_counts
from scbench.evaluation.counts.predictors import deviance
from scbench.evaluation.counts.thinning import read_halves
from scbench.evaluation.external import ExternalEmbedding
from scbench.evaluation.folds import fold_parts
from scbench.evaluation.split_files import read_split
from scbench.models.model import ExpressionModel

ONCE = {"seeds": 1, "folds": 3}
MODEL, MEAN = ("trained model", "log-linear"), ("depth-scaled gene mean", "none")


def rows_of(table) -> dict:
    return {(row["model"], row["probe"]): row for row in table.rows}


def halves_of(cells, seed: int = 0):
    with AnnDataSource(cells) as source:
        return read_halves(source, seed)


def planted(cells: int = 300, genes: int = 40, seed: int = 0) -> tuple[anndata.AnnData, np.ndarray, np.ndarray]:
    """Deep Poisson counts, log-linear in two hidden directions: cells, these directions, and the rates of a whole cell."""
    generator = np.random.default_rng(seed)
    hidden = generator.normal(size=(cells, 2))
    rates = np.exp(hidden @ generator.normal(0, 0.3, (2, genes)) + generator.normal(0, 1, genes))
    rates *= generator.uniform(1000, 3000, (cells, 1)) / rates.sum(axis=1, keepdims=True)
    x = scipy.sparse.csr_matrix(generator.poisson(rates).astype(np.int32))
    names = pd.DataFrame(index=[f"GENE{i}" for i in range(genes)])
    return anndata.AnnData(x, pd.DataFrame(index=[f"cell {i}" for i in range(cells)]), names), hidden, rates


@pytest.fixture(scope="module")
def table_of_cells(planted_cells):
    """One table that several tests look at, its cells and its model."""
    cells = planted_cells(120)
    model = _model(cells)
    return benchmark_counts(model, cells, **ONCE), cells, model


def test_rows_and_their_fields(table_of_cells):
    table = table_of_cells[0]
    names = ["trained model", "untrained model", "PCA (16)", "PCA (50)"]
    assert list(rows_of(table)) == [
        *((name, probe) for name in names for probe in ("log-linear", "k-NN")), ("half A, smoothed", "none"), MEAN,
    ]
    for row in table.rows:
        assert (row["task"], row["dataset"], row["label"], row["protocol"]) == ("counts", "AnnData", None, "default")
        assert (row["values"], row["seeds"], row["folds"], row["cells"], row["groups"]) == ("counts", 1, 3, 120, None)
        assert row["kind"] == ("model" if row["model"] == "trained model" else "baseline")
        assert row["pretraining_seeds"] == (1 if row["kind"] == "model" else None)
        assert row["genes"] == 80
        assert row["poisson_deviance_low"] < row["poisson_deviance"] < row["poisson_deviance_high"]
        expected = 1 - row["poisson_deviance"] / rows_of(table)[MEAN]["poisson_deviance"]
        assert row["deviance_explained"] == pytest.approx(expected, abs=1e-12)
    mean = rows_of(table)[MEAN]
    assert [mean[f"deviance_explained{end}"] for end in ("", "_low", "_high")] == [0, 0, 0]
    assert rows_of(table)["PCA (16)", "log-linear"]["deviance_explained_low"] > 0.05
    assert {row["overlap"] for row in table.rows} == {"not checkable", "unseen"}
    assert any("cannot be checked" in sentence for sentence in table.sentences)


def test_the_order_of_the_file_does_not_matter_and_the_seed_does(table_of_cells):
    table, cells, model = table_of_cells
    shuffled = cells[np.random.default_rng(0).permutation(cells.n_obs)].copy()
    again = benchmark_counts(model, shuffled, **ONCE)
    assert again.rows == table.rows
    assert again.details["split_sha256"] == table.details["split_sha256"]
    assert benchmark_counts(model, cells, **ONCE, seed=1).rows[0] != table.rows[0]


def test_a_model_that_knows_the_rates_reaches_the_oracle(monkeypatch):
    cells, hidden, rates = planted()
    model = _model(cells)
    halves = halves_of(cells)
    encode = embed.encode
    monkeypatch.setattr(
        embed, "encode", lambda net, *rest, **o: hidden[halves.rows] if net is model else encode(net, *rest, **o)
    )
    table = benchmark_counts(model, cells, **ONCE)
    oracle = deviance(halves.unseen, rates[halves.rows] / 2).mean()
    found = rows_of(table)
    mean = found[MEAN]["poisson_deviance"]
    assert found[MODEL]["poisson_deviance"] - oracle < 0.1 * (mean - oracle)
    assert max(found, key=lambda method: found[method]["deviance_explained"]) == MODEL
    assert table.sentences[0].startswith("The trained model with a log-linear law explains")
    assert "beats the best baseline" in table.sentences[0]
    assert "beats an untrained model" in table.sentences[0]
    best = max((row for row in table.rows if row["kind"] == "baseline"), key=lambda row: row["deviance_explained"])
    difference = next(
        one for one in table.details["differences"] if (one["model"], one["probe"]) == MODEL
        and (one["baseline"], one["baseline_probe"]) == (best["model"], best["probe"])
    )
    expected = found[MODEL]["deviance_explained"] - best["deviance_explained"]
    assert difference["deviance_explained"] == pytest.approx(expected, abs=1e-12)
    assert 0 < difference["deviance_explained_low"] < expected < difference["deviance_explained_high"]
    (compared,) = table.details["comparisons"]
    assert [compared[name] for name in ("model", "probe", "baseline", "baseline_probe")] == [
        *MODEL, best["model"], best["probe"],
    ]
    assert [compared[name] for name in ("difference", "low", "high")] == [
        difference[f"deviance_explained{end}"] for end in ("", "_low", "_high")
    ]
    assert compared["sentence"] == table.sentences[0]


def test_half_b_of_test_cells_decides_nothing():
    cells, hidden, _ = planted(120)
    halves = halves_of(cells)
    parts = fold_parts(np.arange(120) % 4, 0, 4)
    values = benchmark.baselines.log_normalise(halves.seen)
    totals = np.asarray(halves.seen.sum(axis=1)).ravel()
    order = np.arange(120)
    order[parts.test] = np.random.default_rng(0).permutation(parts.test)
    found = []
    for one in (halves, halves._replace(unseen=halves.unseen[order])):
        methods = benchmark._methods(one, {"model": hidden}, [10], values, totals, np.arange(40), parts)
        found.append(dict(methods))
    assert [choice.strength for choice in found[0].values()] == [choice.strength for choice in found[1].values()]
    assert all((one.deviance != found[1][method].deviance).any() for method, one in found[0].items())


def test_cells_of_pretraining_are_left_out(table_of_cells):
    cells, model = table_of_cells[1], _model(table_of_cells[1])
    source = AnnDataSource(cells)
    tokens = to_tokens(source.read(0, 120), map_genes(source.identity, model.vocabulary, "cells"))
    hashes = content_hash(tokens.genes, tokens.counts, tokens.offsets)
    model.training_cells = np.sort(hashes[:40])
    with pytest.raises(UserError, match=r"trained or validated on 40 of the 120 cells .*--max-overlap 1"):
        benchmark_counts(model, cells, **ONCE)
    table = benchmark_counts(model, cells, max_overlap=1, **ONCE)
    assert {(row["overlap"], row["cells"]) for row in table.rows} == {("unseen", 80)}
    assert table.details["cells"]["overlapping"] == 40
    assert any("40 that a model was trained or validated on" in sentence for sentence in table.sentences)
    assert table.details["split_sha256"] == table_of_cells[0].details["split_sha256"]  # the others' folds don't change
    kept = benchmark_counts(model, cells, allow_overlap=True, **ONCE)
    assert {(row["overlap"], row["cells"]) for row in kept.rows} == {("transductive", 120)}


def test_whole_groups_are_held_out(table_of_cells):
    cells, model = table_of_cells[1].copy(), table_of_cells[2]
    cells.obs["donor"] = [None, *(f"d{i % 4}" for i in range(1, 120))]
    table = benchmark_counts(model, cells, group="donor", seeds=2, folds=5)
    assert {(row["groups"], row["folds"], row["cells"]) for row in table.rows} == {(4, 4, 119)}
    assert table.details["cells"]["ungrouped"] == 1
    assert any("resample the 4 held-out groups: with so few they are rough" in sentence for sentence in table.sentences)
    cells.obs["donor"] = np.where(cells.obs["type"] == "alpha", "x", "y")
    with pytest.raises(UserError, match="2 groups in column 'donor' hold cells, and 3 are needed"):
        benchmark_counts(model, cells, group="donor")
    with pytest.raises(UserError, match="choose --group among"):
        benchmark_counts(model, cells, group="patient")


def test_a_split_file_fixes_the_folds(table_of_cells, tmp_path):
    table, cells, model = table_of_cells
    table.write(tmp_path / "out")
    assert {path.name for path in (tmp_path / "out").iterdir()} >= {"results.json", "results.csv", "split.json"}
    split = read_split(tmp_path / "out" / "split.json")
    assert (split.task, split.unit, split.repetitions, split.folds) == ("counts", "cell", 1, 3)
    assert benchmark_counts(model, cells, split=split).rows == table.rows
    with pytest.raises(UserError, match=r"has no fold for 40 of 120 cells"):
        benchmark_counts(model, cells, split=split._replace(fold=dict(list(split.fold.items())[:80])))
    with pytest.raises(UserError, match="not 'group'"):
        benchmark_counts(model, cells, split=split._replace(label="type"), group="type")


def test_embeddings_from_elsewhere_must_be_of_half_a(table_of_cells, tmp_path):
    table, cells, model = table_of_cells
    path = tmp_path / "cells.h5ad"
    cells.write_h5ad(path)
    main(["benchmark", "thin", str(path), "-o", str(tmp_path / "half.h5ad"), "--json"])
    half = anndata.read_h5ad(tmp_path / "half.h5ad")
    for name, of in [("half", half), ("whole", cells)]:
        values = embed.embed(model, of)
        embedding_files.write_alone(tmp_path / f"{name}.npz", of.obs_names.to_numpy(), values, {})
    external = benchmark_counts(ExternalEmbedding(tmp_path / "half.npz"), path, **ONCE)
    assert "untrained model" not in {row["model"] for row in external.rows}
    ours, theirs = rows_of(table), rows_of(external)
    for probe in ("log-linear", "k-NN"):
        for end in ("", "_low", "_high"):
            field = f"deviance_explained{end}"
            assert theirs["half", probe][field] == pytest.approx(ours["trained model", probe][field], abs=1e-4)
    assert theirs["half", "k-NN"]["overlap"] == "not checkable"
    cells.obsm["X_other"] = np.ones((120, 3), dtype=np.float32)
    cells.write_h5ad(path)
    for spec, seed in [(tmp_path / "whole.npz", 0), ("obsm:X_other", 0), (tmp_path / "half.npz", 1)]:
        with pytest.raises(UserError, match=r"no embedding of this half .* has seen what is to be predicted: .* thin"):
            benchmark_counts(ExternalEmbedding(spec), path, **ONCE, seed=seed)


def test_pretraining_seeds_share_a_row(table_of_cells):
    cells, first = table_of_cells[1:]
    second = _model(cells, seed=2)
    table = benchmark_counts({"ours": [first, second], "other": [second]}, cells, **ONCE)
    found = rows_of(table)
    seeds = next(one for one in table.details["pretraining_seeds"] if (one["model"], one["probe"]) == ("ours", "k-NN"))
    row, mean = found["ours", "k-NN"], found[MEAN]["poisson_deviance"]
    assert row["pretraining_seeds"] == 2
    assert row["poisson_deviance"] == pytest.approx(np.mean(seeds["poisson_deviance"]))
    assert seeds["poisson_deviance"][0] == rows_of(table_of_cells[0])["trained model", "k-NN"]["poisson_deviance"]
    assert seeds["poisson_deviance"][1] == found["other", "k-NN"]["poisson_deviance"]
    spread = np.std(1 - np.array(seeds["poisson_deviance"]) / mean, ddof=1)
    assert row["deviance_explained_pretraining_sd"] == pytest.approx(spread)
    assert found["other", "k-NN"]["deviance_explained_pretraining_sd"] is None
    assert ("ours, untrained model", "k-NN") in found and ("other, untrained model", "k-NN") in found
    assert table.sentences[1].startswith("other with")
    with pytest.raises(UserError, match="cannot be called 'PCA \\(50\\)'"):
        benchmark_counts({"PCA (50)": [first]}, cells, **ONCE)


def test_empty_and_nearly_empty_cells_and_copies(planted_cells):
    cells = planted_cells(120)
    x = cells.X.tolil()
    x[0], x[1] = 0, 0
    for row in (2, 3, 4, 5):
        x[row] = 0
        x[row, row] = 1
    x[6] = x[7]
    cells.X = x.tocsr()
    table = benchmark_counts(_model(cells), cells, **ONCE)
    assert table.details["cells"] == {"total": 120, "empty": 2, "ungrouped": 0, "duplicates": 1, "overlapping": 0}
    assert table.rows[0]["cells"] == 117
    assert all(np.isfinite(row["poisson_deviance"]) for row in table.rows)


def test_one_gene(planted_cells):
    cells = planted_cells(200)
    counts = np.random.default_rng(0).poisson(np.random.default_rng(1).gamma(1, 200, (200, 1))).astype(np.int32)
    one = anndata.AnnData(scipy.sparse.csr_matrix(counts), cells.obs, cells.var.iloc[:1])
    table = benchmark_counts(_model(cells), one, **ONCE)
    assert {row["genes"] for row in table.rows} == {1}
    assert all(abs(row["deviance_explained"]) < 0.5 for row in table.rows)


def test_too_little_is_refused(table_of_cells, tmp_path):
    cells, model = table_of_cells[1:]
    with pytest.raises(UserError, match="a fold has 10 cells to train on"):
        benchmark_counts(model, cells[:30].copy(), **ONCE)
    few = cells[:40].copy()
    few.X = scipy.sparse.csr_matrix(np.eye(40, 80, dtype=np.int32))
    with pytest.raises(UserError, match="no gene is expressed by 5 training cells"):
        benchmark_counts(model, few, seeds=1, folds=5)
    with pytest.raises(UserError, match="as_is"):
        benchmark_counts(model, cells, values="as_is")
    for options in (["--folds", "2"], ["--seeds", "0"], ["--max-overlap", "2"], ["--values", "as_is"],
                    ["--split-file", "split.json", "--folds", "4"]):
        with pytest.raises(SystemExit) as stop:
            main(["benchmark", "counts", "model", "in.h5ad", "-o", str(tmp_path / "out"), *options])
        assert stop.value.code == 2


def test_the_verb_writes_and_returns_the_table(table_of_cells, tmp_path, capsys):
    table, cells, model = table_of_cells
    cells.write_h5ad(tmp_path / "cells.h5ad")
    model.save_pretrained(tmp_path / "model", {})
    main(["benchmark", "counts", str(tmp_path / "model"), str(tmp_path / "cells.h5ad"), "-o", str(tmp_path / "out"),
          "--seeds", "1", "--folds", "3", "--json"])
    record = json.loads((tmp_path / "out" / "results.json").read_text())
    assert json.loads(capsys.readouterr().out) == record
    assert [row["poisson_deviance"] for row in record["rows"]] == [row["poisson_deviance"] for row in table.rows]


@pytest.mark.full
@pytest.mark.skipif("SCBENCH_TEST_DATA" not in os.environ, reason="SCBENCH_TEST_DATA does not name a folder of real cells")
def test_real_cells():
    path = Path(os.environ["SCBENCH_TEST_DATA"]) / "pbmc3k.h5ad"
    table = benchmark_counts(_model(anndata.read_h5ad(path, backed="r")), path, seeds=1)
    explained = {method: row["deviance_explained"] for method, row in rows_of(table).items()}
    assert table.rows[0]["cells"] == 2700
    assert table.rows[0]["genes"] == 2000
    assert 0.14 < explained["PCA (50)", "log-linear"] < 0.2  # L-BFGS in torch on halves by numpy's generator: .165
    assert 0.1 < explained["half A, smoothed", "none"] < explained["PCA (50)", "log-linear"]  # there: .127
    assert explained["untrained model", "k-NN"] < 0.05
    assert "loses to the best baseline, PCA" in table.sentences[0]


def _model(cells: anndata.AnnData, seed: int = 1) -> ExpressionModel:
    vocabulary = Vocabulary.build(cells.var_names)
    config = ModelConfig(vocabulary_size=vocabulary.size, width=16, layers=1, heads=2, max_genes=30)
    return ExpressionModel(config, vocabulary, seed=seed)
