"""The leakage guard: exact copies, filtered copies, copies counted again, and cells that are none of these."""

import json
import os
from importlib.resources import files
from pathlib import Path

import anndata
import numpy as np
import pandas as pd
import pytest
import scipy.sparse as sp

import scbench
from scbench.config import ModelConfig
from scbench.data.gene_table import gene_table
from scbench.data.training_fingerprints import TrainingFingerprints
from scbench.errors import UserError
from scbench.evaluation import leakage
from scbench.evaluation.classification.benchmark import benchmark_classification
from scbench.evaluation.leakage import find_seen_cells
from scbench.models.model import ExpressionModel

LIST = files("scbench.data").joinpath("gene_table", "fingerprint_human.txt").read_text().split()
CORE = [line.rstrip("*") for line in LIST if line.endswith("*")]
OTHERS = [line for line in LIST if not line.endswith("*")][:1800]
DATA = os.environ.get("SCBENCH_TEST_DATA")
real = pytest.mark.skipif(DATA is None, reason="SCBENCH_TEST_DATA does not name a folder of real cells")


def barcode(number: int) -> str:
    return "".join("ACGT"[number >> 2 * i & 3] for i in range(14))


def make(cells: int, seed: int, barcodes: bool = True) -> anndata.AnnData:
    """Cells with 20 % of 2,000 genes expressed, mostly once; nothing but the genes' rates ties them to each other."""
    generator = np.random.default_rng(seed)
    rates = generator.gamma(0.5, 0.6, len(CORE) + len(OTHERS))
    counts = generator.poisson(np.broadcast_to(rates, (cells, len(rates))))
    names = [f"{barcode(i)}-1" if barcodes else f"cell {i}" for i in range(cells)]
    obs = pd.DataFrame({"type": np.array(["a", "b"])[np.arange(cells) % 2]}, index=names)
    return anndata.AnnData(sp.csr_matrix(counts.astype(np.float32)), obs=obs, var=pd.DataFrame(index=CORE + OTHERS))


def change(cells: anndata.AnnData, share: float, seed: int = 5) -> anndata.AnnData:
    """Copies of which a share of the counts is one more or one less, and that of the first core gene always one more."""
    generator = np.random.default_rng(seed)
    changed = cells.copy()
    values = changed.X.data
    chosen = generator.random(len(values)) < share
    values[chosen] += generator.choice([-1, 1], int(chosen.sum()))
    changed.X.eliminate_zeros()
    first = sp.csr_matrix((np.arange(cells.n_vars) == 0).astype(np.float32))
    changed.X = (changed.X + sp.csr_matrix(np.ones((cells.n_obs, 1), dtype=np.float32)) @ first).tocsr()
    return changed


@pytest.fixture(scope="module")
def store(tmp_path_factory) -> scbench.Store:
    folder = tmp_path_factory.mktemp("leakage")
    make(60, 0).write_h5ad(folder / "a.h5ad")
    make(40, 1, barcodes=False)[:, 300:].copy().write_h5ad(folder / "b.h5ad")
    return scbench.prepare([folder / "a.h5ad", folder / "b.h5ad"], folder / "store", workers=1, split=".8,.1,.1")


def stages(seen) -> dict:
    return {stage: cells for stage, cells in seen.counts().items() if cells}


def test_the_same_cells_in_any_order_are_known_by_content(store):
    cells = make(60, 0)[::-1, ::-1].copy()
    cells.obs_names = [f"c{i}" for i in range(60)]
    assert stages(find_seen_cells(store, cells)) == {"content": 60}


def test_other_cells_are_not_known_even_with_the_same_barcodes(store):
    assert stages(find_seen_cells(store, make(60, 7))) == {}
    assert stages(find_seen_cells(store, make(60, 7, barcodes=False))) == {}


def test_copies_without_some_genes_or_under_symbols_are_known_by_their_core(store):
    cells = make(60, 0)
    cells.obs_names = [f"c{i}" for i in range(60)]
    filtered = cells[:, : len(CORE) + 700].copy()
    assert stages(find_seen_cells(store, filtered)) == {"core": 60}
    filtered.var_names = [gene_table("human").symbols[id_] for id_ in filtered.var_names]
    assert stages(find_seen_cells(store, filtered)) == {"core": 60}


def test_copies_counted_again_are_known_by_barcode_or_gene_set(store):
    changed = change(make(60, 0), 0.1)
    assert stages(find_seen_cells(store, changed)) == {"barcode": 60}
    changed.obs_names = [f"c{i}" for i in range(60)]
    assert stages(find_seen_cells(store, changed)) == {"gene set": 60}
    half = change(make(60, 0), 0.1)[:, ::2].copy()  # a barcode, and the genes that both measured
    assert stages(find_seen_cells(store, half)) == {"barcode": 60}


def test_genes_that_the_training_file_lacked_do_not_count(store):
    changed = change(make(40, 1), 0.1)  # 300 genes more than the training file had; it had no barcodes
    found = find_seen_cells(store, changed)
    assert set(stages(found)) == {"gene set"}
    assert found.seen.sum() >= 39


def test_empty_cells_and_cells_of_one_gene(tmp_path):
    cells = make(20, 3)
    counts = cells.X.toarray() * (np.arange(20) > 1)[:, None]
    counts[1, 0] = 1
    cells.X = sp.csr_matrix(counts)
    cells.write_h5ad(tmp_path / "c.h5ad")
    store = scbench.prepare(tmp_path / "c.h5ad", tmp_path / "store", workers=1, min_genes=0)
    asked = cells[:3].copy()  # empty, of one gene, and one as others
    asked.obs_names = ["c0", "c1", "c2"]
    assert find_seen_cells(store, asked).stage.tolist() == [-1, -1, 0]  # too little to be known by


def test_panels_are_not_asked_by_core_or_gene_set(tmp_path):
    """Cells that express most of 60 genes are alike: neither a barcode nor its absence makes copies of them."""
    panel = make(80, 3)[:, 200:260].copy()
    panel.X = sp.csr_matrix(np.random.default_rng(0).poisson(2, panel.shape).astype(np.float32))
    panel[:40].copy().write_h5ad(tmp_path / "panel.h5ad")
    store = scbench.prepare(tmp_path / "panel.h5ad", tmp_path / "store", workers=1)
    others = panel[40:].copy()
    others.obs_names = panel.obs_names[:40]
    assert find_seen_cells(store, others).counts() == {"content": 0, "barcode": 0}
    others.obs_names = [f"c{i}" for i in range(40)]
    assert find_seen_cells(store, others).counts() == {"content": 0}
    assert find_seen_cells(store, panel).counts()["content"] == 40


def test_more_sets_of_measured_genes_than_have_signatures_of_their_own(store, monkeypatch):
    monkeypatch.setattr(leakage, "NARROW_SETS", 0)
    changed = change(make(60, 0), 0.1)
    assert stages(find_seen_cells(store, changed)) == {"barcode": 60}
    changed.obs_names = [f"c{i}" for i in range(60)]
    assert stages(find_seen_cells(store, changed)) == {"gene set": 60}
    assert stages(find_seen_cells(store, make(60, 7, barcodes=False))) == {}


def test_fingerprints_on_another_list_of_genes_leave_the_contents(store):
    store = scbench.Store.open(store.path)
    store.manifest["fingerprints"]["genes"] = "another"
    found = find_seen_cells(store, make(60, 0))
    assert found.counts() == {"content": 60}


def model_of(store: scbench.Store, folder: Path, splits: tuple[str, ...] = ("train", "validation")) -> ExpressionModel:
    """An untrained model that carries what a trained one does."""
    config = ModelConfig(vocabulary_size=store.vocabulary.size, width=16, layers=1, heads=2, max_genes=64)
    model = ExpressionModel(config, store.vocabulary)
    parts = [store.split(name) for name in splits]
    hashes = np.concatenate([part.cells(["content_hash"])["content_hash"].to_numpy() for part in parts])
    model.save_pretrained(folder, {}, hashes, TrainingFingerprints.of_store(store, parts).save)
    return ExpressionModel.from_pretrained(folder)


def test_a_model_directory_carries_what_the_guard_needs(store, tmp_path):
    model = model_of(store, tmp_path / "model")
    assert isinstance(model.training_cells, np.memmap)
    changed = change(make(60, 0), 0.1)
    names = set(pd.concat([store.split(s).cells() for s in ("train", "validation")])["original_id"])
    expected = [name in names for name in changed.obs_names]
    for training in (model, tmp_path / "model"):
        assert find_seen_cells(training, changed).seen.tolist() == expected
    found = find_seen_cells(store, changed, splits=("train", "validation"))
    assert found.seen.tolist() == expected
    per_cell = sum(p.stat().st_size for p in (tmp_path / "model").rglob("*.npy") if p.name != "measured_genes.npy")
    assert per_cell < 92 * 90 + 3 * 300  # cells, and the headers of three files


def test_a_model_without_hashes_is_not_checkable_and_one_with_contents_alone_says_so(store, tmp_path):
    model = model_of(store, tmp_path / "model")
    model.training_fingerprints = None
    assert find_seen_cells(model, make(60, 0)).checked == ("content",)
    model.training_cells = None
    found = find_seen_cells(model, make(60, 0))
    assert found.checked == ()
    assert not found.seen.any()


def test_damaged_or_newer_fingerprints_are_one_sentence(store, tmp_path):
    model = model_of(store, tmp_path / "model")
    about = tmp_path / "model" / "fingerprints" / "about.json"
    facts = json.loads(about.read_text())
    about.write_text(json.dumps(facts | {"format": 99}))
    with pytest.raises(UserError, match="newer than this scbench reads"):
        find_seen_cells(model, make(5, 0))
    about.write_text(json.dumps(facts | {"cells": 7}))
    with pytest.raises(UserError, match="not those of the model's training cells"):
        find_seen_cells(model, make(5, 0))
    (about.parent / "core.npy").unlink()
    with pytest.raises(UserError, match="damaged"):
        find_seen_cells(model, make(5, 0))


def test_the_benchmark_refuses_above_one_percent_and_reports_every_stage(store, tmp_path):
    model = model_of(store, tmp_path / "model", ("train",))
    new = make(140, 9)
    new.obs_names = [f"new {i}" for i in range(140)]
    cells = anndata.concat([new, change(make(60, 0), 0.1)])
    seen = int(find_seen_cells(model, cells).seen.sum())
    with pytest.raises(UserError, match=rf"on {seen} of the 200 .*{seen} by barcode.*--max-overlap 1 .*--allow-overlap"):
        benchmark_classification(model, cells, "type", seeds=1, folds=3)
    table = benchmark_classification(model, cells, "type", seeds=1, folds=3, max_overlap=1)
    assert table.details["cells"]["overlapping"] == table.details["models"]["trained model"][0]["seen"]["barcode"] == seen
    assert table.details["cells"]["used"] == 200 - seen
    assert any(f"{seen} by barcode" in sentence for sentence in table.sentences)
    kept = benchmark_classification(model, cells, "type", seeds=1, folds=3, allow_overlap=True)
    assert kept.details["cells"]["used"] == 200
    assert kept.details["models"]["trained model"][0]["seen"]["barcode"] == seen


@real
@pytest.mark.full
def test_pbmc3k_counted_again_is_found_and_another_donor_is_not(tmp_path):
    folder = Path(DATA)
    for name, expected in [("pbmc_7datasets", 300), ("pbmc_donorA", 0)]:
        store = scbench.prepare(folder / f"{name}.h5ad", tmp_path / name, workers=1)
        assert find_seen_cells(store, folder / "pbmc3k.h5ad").seen.sum() == expected


@pytest.fixture(scope="module")
def pbmc3k(tmp_path_factory) -> tuple[scbench.Store, anndata.AnnData]:
    """A store of pbmc3k by symbols, and its cells by Ensembl ids with symbols in var, float32 counts."""
    folder = tmp_path_factory.mktemp("pbmc3k")
    cells = anndata.read_h5ad(Path(DATA) / "pbmc3k.h5ad")
    symbols = cells.copy()
    del symbols.var["gene_ids"]
    symbols.write_h5ad(folder / "symbols.h5ad")
    cells.var = pd.DataFrame({"symbol": cells.var_names}, index=cells.var["gene_ids"].astype(str).to_numpy())
    cells.X = cells.X.astype(np.float32)
    return scbench.prepare(folder / "symbols.h5ad", folder / "store", workers=1), cells


def without_barcodes(cells: anndata.AnnData) -> anndata.AnnData:
    renamed = cells.copy()
    renamed.obs_names = [f"c{i}" for i in range(cells.n_obs)]
    return renamed


def expressed_in(cells: anndata.AnnData, least: int) -> anndata.AnnData:
    scanpy = pytest.importorskip("scanpy", reason="scanpy, whose filters these are, is not installed")
    kept = cells.copy()
    scanpy.pp.filter_genes(kept, min_cells=least)
    return kept


def symbols_unlike(cells: anndata.AnnData, pattern: str) -> anndata.AnnData:
    return cells[:, ~cells.var["symbol"].str.match(pattern).to_numpy()].copy()


def most_variable(cells: anndata.AnnData, n: int, flavor: str) -> anndata.AnnData:
    import scanpy

    kept = expressed_in(cells, 3)
    logarithms = kept.copy()
    scanpy.pp.normalize_total(logarithms, target_sum=1e4)
    scanpy.pp.log1p(logarithms)
    scanpy.pp.highly_variable_genes(logarithms, n_top_genes=n, flavor=flavor)
    return kept[:, logarithms.var["highly_variable"].to_numpy()].copy()


@real
@pytest.mark.full
@pytest.mark.parametrize("filtered", [
    lambda cells: cells,
    lambda cells: expressed_in(cells, 3),
    lambda cells: expressed_in(cells[:600], 3),
    lambda cells: expressed_in(cells, 10),
    lambda cells: symbols_unlike(cells, "MT-"),
    lambda cells: symbols_unlike(expressed_in(cells, 3), "MT-|RPS|RPL"),
], ids=["none", "min_cells=3", "min_cells=3 of 600", "min_cells=10", "no MT", "min_cells=3, no MT, no RPS and RPL"])
def test_copies_of_pbmc3k_without_rare_or_named_genes_are_all_known(pbmc3k, filtered):
    store, cells = pbmc3k
    copies = filtered(without_barcodes(cells))
    found = find_seen_cells(store, copies)
    assert found.seen.all()
    assert found.counts()["content"] + found.counts()["core"] > 0.97 * copies.n_obs


@real
@pytest.mark.full
@pytest.mark.parametrize(("n", "flavor", "least"), [
    (1000, "seurat", 0.2), (2000, "seurat", 0.95), (2000, "cell_ranger", 0.3), (5000, "seurat", 1),
    (5000, "cell_ranger", 0.97),
])
def test_copies_of_pbmc3k_with_variable_genes_alone_are_known_by_their_barcodes_only(pbmc3k, n, flavor, least):
    store, cells = pbmc3k
    copies = most_variable(cells, n, flavor)
    assert find_seen_cells(store, copies).seen.mean() >= least
    without = find_seen_cells(store, without_barcodes(copies))
    assert not without.seen.any()
    assert without.checked == ("content",)  # and says that it could not look for them


@real
@pytest.mark.full
@pytest.mark.parametrize("name", ["celllines_multiplatform", "heart_san", "onek1k_1000g", "zheng_purified",
                                  "norman_mcfaline_500g", "schraivogel_tapseq_72g", "gbm_panobinostat_300g"])
def test_half_of_a_file_is_not_taken_for_the_other(tmp_path, name):
    cells = anndata.read_h5ad(Path(DATA) / f"{name}.h5ad")
    order = np.random.default_rng(0).permutation(cells.n_obs)
    half = cells.n_obs // 2
    cells[order[:half]].copy().write_h5ad(tmp_path / "half.h5ad")
    store = scbench.prepare(tmp_path / "half.h5ad", tmp_path / "store", workers=1, min_genes=0)
    others = cells[order[half:]].copy()
    found = find_seen_cells(store, others)
    assert not found.seen.any()
    assert not find_seen_cells(store, without_barcodes(others)).seen.any()
    ids = store.split("train").cells(["original_id"])["original_id"]
    others.obs_names = ids.sample(others.n_obs, replace=True, random_state=0).to_numpy()
    assert find_seen_cells(store, others).seen.mean() < 0.001  # even if each had the barcode of another
    panel = cells.n_vars <= 1000
    assert ("gene set" in found.checked) == ("core" in found.checked) == (not panel)
