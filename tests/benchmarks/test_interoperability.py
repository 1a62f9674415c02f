"""Other people's packages read what scbench writes, and say of planted cells what is planted."""

import json
from importlib.util import find_spec
from pathlib import Path

import anndata
import numpy as np
import pandas as pd
import pytest
import scipy.sparse

ROOT = Path(__file__).parents[2]
IMPORTS = {"scib-metrics": "scib_metrics", "cz-benchmarks": "czbenchmarks", "cell-eval": "cell_eval"}
KINDS = np.arange(150) % 3


@pytest.fixture
def script(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    return __import__("interoperability")


@pytest.fixture
def run(script, tmp_path):
    def of(package: str, *arguments: object) -> dict[tuple[str, str], float]:
        if find_spec(IMPORTS[package]) is None:
            pytest.skip(f"{package} is not installed: its reading of our files is not shown")
        script.main([package, *map(str, arguments), "--json", str(tmp_path / "rows.json")])
        rows = json.loads((tmp_path / "rows.json").read_text())
        assert {row["package"] for row in rows} == {package}
        return {(row.get("embedding", row.get("context")), row["metric"]): row["value"] for row in rows}

    return of


@pytest.fixture
def embedded(tmp_path) -> Path:
    """Three types that the embedding tells apart and the counts don't; two batches."""
    generator = np.random.default_rng(0)
    obs = pd.DataFrame({"type": np.array(["a", "b", "c"])[KINDS], "batch": np.array(["x", "y"])[np.arange(150) // 3 % 2]},
                       index=[f"cell {i}" for i in range(150)])
    counts = scipy.sparse.csr_matrix(generator.poisson(3, (150, 40)).astype(np.int32))
    cells = anndata.AnnData(counts, obs=obs, var=pd.DataFrame(index=[f"G{i}" for i in range(40)]))
    cells.obsm["X_scbench"] = (8 * np.eye(3)[KINDS] @ np.eye(3, 5) + generator.normal(size=(150, 5))).astype(np.float32)
    cells.obs.loc["cell 0", "type"] = None
    cells.write_h5ad(tmp_path / "embedded.h5ad")
    return tmp_path / "embedded.h5ad"


def test_cz_benchmarks_predicts_the_labels_and_finds_the_clusters(run, embedded):
    values = run("cz-benchmarks", embedded, "--label", "type")
    assert values["X_scbench", "mean_fold_accuracy lr"] == 1
    assert values["PCA", "mean_fold_accuracy lr"] < 0.6
    assert values["X_scbench", "normalized_mutual_info"] > 0.6 > values["PCA", "normalized_mutual_info"]


@pytest.mark.full
def test_scib_metrics_finds_types_kept_and_batches_mixed(run, embedded):
    values = run("scib-metrics", embedded, "--label", "type", "--batch", "batch")
    assert values["X_scbench", "KMeans ARI"] == pytest.approx(1, abs=0.02)
    assert values["X_scbench", "Bio conservation"] > values["PCA", "Bio conservation"] + 0.2
    assert values["X_scbench", "iLISI"] > 0.7


def test_cell_eval_scores_perfect_and_useless_predictions(run, tmp_path):
    """Perfect ones are the cells' own means, by another few lines than the script's."""
    generator = np.random.default_rng(1)
    genes, names = [f"G{i}" for i in range(30)], ["control", "G1", "G2_G3", "G4"]
    rates = np.concatenate([np.full((1, 30), 5.0), generator.uniform(1, 15, (3, 30))])
    which = np.repeat(np.arange(4), 60)
    counts = generator.poisson(rates[which]).astype(np.int32)
    totals = counts.sum(axis=1) * 10.0
    obs = pd.DataFrame({"condition": np.array(names)[which], "line": "k", "total": totals})
    obs.index = [f"cell {i}" for i in range(240)]
    anndata.AnnData(counts, obs=obs, var=pd.DataFrame(index=genes)).write_h5ad(tmp_path / "cells.h5ad")
    means = np.stack([np.log1p(1e4 * counts / totals[:, None])[which == number].mean(axis=0) for number in range(4)])
    rows = pd.DataFrame({"perturbation": ["control", "G1", "G2+G3", "G4"] * 2, "repetition": [0] * 4 + [1] * 4, "fold": 0,
                         "context": "k"}, index=[f"row {i}" for i in range(8)])
    profiles = np.concatenate([means, means[[0, 2, 3, 1]]])
    anndata.AnnData(profiles, obs=rows, var=pd.DataFrame(index=genes)).write_h5ad(tmp_path / "predictions.h5ad")
    options = ["--real", tmp_path / "cells.h5ad", "--perturbation-column", "condition", "--control", "control",
               "--total-counts-column", "total", "--context", "line"]
    perfect = run("cell-eval", tmp_path / "predictions.h5ad", *options)
    assert perfect["k", "pearson_delta"] == pytest.approx(1, abs=1e-5)
    assert perfect["k", "mse"] == pytest.approx(0, abs=1e-9)
    assert perfect["k", "discrimination_score_l1"] == 1
    turned = run("cell-eval", tmp_path / "predictions.h5ad", *options, "--repetition", 1)
    assert turned["k", "mse"] > 0.01
    assert turned["k", "discrimination_score_l1"] < 1


def test_what_is_missing_is_said_in_a_sentence(script, embedded, monkeypatch):
    for label, key, said in [
        ("kind", "X_scbench", r"has no column 'kind' in obs \(there are: type, batch\)"),
        ("type", "X_pca", r"has no 'X_pca' in obsm \(there are: X_scbench\)"),
    ]:
        with pytest.raises(SystemExit, match=said):
            script.embedded_cells(embedded, label, [key])

    def absent(name: str) -> str:
        raise script.PackageNotFoundError(name)

    monkeypatch.setattr(script, "version", absent)
    with pytest.raises(SystemExit, match="cz-benchmarks is not installed here: pip install cz-benchmarks"):
        script.main(["cz-benchmarks", str(embedded), "--label", "type"])
