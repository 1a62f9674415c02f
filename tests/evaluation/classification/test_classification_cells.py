"""Who takes part in the classification benchmark: leaks, labels, groups, folds."""

import anndata
import numpy as np
import pytest
from planted_tables import ONCE, external, hashes_of, one_hot, row

from scbench.errors import UserError
from scbench.evaluation import embed
from scbench.evaluation.classification.benchmark import benchmark_classification
from scbench.evaluation.split_files import read_split


def test_cells_of_pretraining_are_left_out(model, cells, monkeypatch):
    hashes = hashes_of(model, cells)
    model.training_cells = np.sort(hashes[:60])
    used = []
    encode = embed.encode
    monkeypatch.setattr(embed, "encode", lambda *args, **options: (used.append(args[2]), encode(*args, **options))[1])
    table = benchmark_classification(model, cells, "type", max_overlap=1, **ONCE)
    assert {r["overlap"] for r in table.rows} == {"unseen"}
    assert set(used[0]) == set(hashes[60:])
    assert table.details["cells"]["overlapping"] == 60
    assert any("60 that a model was trained or validated on" in sentence for sentence in table.sentences)
    everything = benchmark_classification(model, cells, "type", allow_overlap=True, **ONCE)
    assert {r["overlap"] for r in everything.rows if r["kind"] == "model"} == {"transductive"}
    assert everything.rows[0]["cells"] == 120
    model.training_cells = None
    unknown = benchmark_classification(model, cells, "type", **ONCE)
    assert {r["overlap"] for r in unknown.rows if r["kind"] == "model"} == {"not checkable"}
    assert {r["overlap"] for r in unknown.rows if r["kind"] == "baseline"} == {"unseen"}
    assert any("cannot be checked" in sentence for sentence in unknown.sentences)


def test_a_leak_that_is_all_there_is_names_the_way_out(model, cells):
    model.training_cells = np.sort(hashes_of(model, cells))
    with pytest.raises(UserError, match=r"120 were removed because the model was trained or validated .*--allow-overlap"):
        benchmark_classification(model, cells, "type", max_overlap=1)
    model.training_cells = np.sort(hashes_of(model, cells)[:100])  # 7 cells a class stay
    with pytest.raises(UserError, match=r"20 labelled cells are left, with 0 classes .*--allow-overlap"):
        benchmark_classification(model, cells, "type", max_overlap=1)


def test_missing_labels_small_classes_and_duplicates_are_left_out_everywhere(model, cells):
    doubled = anndata.concat([cells, cells[:7]], index_unique="-")
    doubled.obs["type"] = doubled.obs["type"].astype(object)
    doubled.obs.iloc[20:23, 0] = [None, "", "Unknown"]
    doubled.obs.iloc[30:39, 0] = "rare"
    table = benchmark_classification(model, doubled, "type", **ONCE)
    counted = table.details["cells"]
    assert counted["total"] == 127
    assert (counted["unlabelled"], counted["duplicates"], counted["in_small_classes"], counted["used"]) == (3, 7, 9, 108)
    assert counted["dropped_classes"] == {"rare": 9}
    assert counted["classes"] == {"alpha": 36, "beta": 36, "gamma": 36}
    assert any("rare (9)" in sentence for sentence in table.sentences)


def test_classes_that_are_in_too_few_groups_are_named_and_left_out(model, cells):
    cells.obs["donor"] = [f"d{i % 8}" for i in range(120)]
    cells.obs.loc[cells.obs["type"] == "gamma", "donor"] = [f"d{i % 2}" for i in range(40)]
    cells.obs.iloc[:3, cells.obs.columns.get_loc("donor")] = ""
    table = benchmark_classification(model, cells, "type", group="donor", **ONCE)
    assert table.details["cells"]["dropped_classes"] == {"gamma": 39}
    assert table.details["cells"]["ungrouped"] == 3
    assert any("under 10 cells or in fewer than 3 groups, left out everywhere: gamma (39)" in said for said in table.sentences)
    assert any("with fewer than 10 they are rough" in said for said in table.sentences)
    with pytest.raises(UserError, match="with 0 classes of at least 10 cells in 3 groups in 'n'"):
        benchmark_classification(model, cells, "n", group="donor", **ONCE)
    with pytest.raises(UserError, match=r"no column 'donr' in obs: choose --group among"):
        benchmark_classification(model, cells, "type", group="donr", **ONCE)
    cells.obs["donor"] = ["x", "y"] * 60
    with pytest.raises(UserError, match=r"column 'donor' of AnnData holds 2 groups of labelled cells, and 3 are needed"):
        benchmark_classification(model, cells, "type", group="donor", **ONCE)


def test_a_planted_donor_effect_is_seen_by_a_group_split_alone(cells):
    """The embedding says which of 6 donors a cell is from, and each donor's cells are mostly of one type."""
    generator = np.random.default_rng(0)
    donor = np.arange(120) // 20
    kinds = np.where(generator.random(120) < 0.9, donor % 3, generator.integers(0, 3, 120))
    cells.obs["type"], cells.obs["donor"] = np.array(["a", "b", "c"])[kinds], [f"d{d}" for d in donor]
    model = external(cells, np.eye(6)[donor] * 9 + generator.normal(size=(120, 6)))
    by_cell, by_donor = (benchmark_classification(model, cells, "type", group=group) for group in (None, "donor"))
    for probe in ("k-NN", "linear"):
        one, other = row(by_cell, "X_other", probe), row(by_donor, "X_other", probe)
        assert one["accuracy_low"] > 0.7
        assert other["accuracy"] < one["accuracy_low"] - 0.2
        assert (other["protocol"], other["groups"], one["groups"]) == ("5-fold by donor", 6, None)
    assert "intervals come from resamples of the 6 groups; with fewer than 10 they are rough" in " ".join(by_donor.sentences)


def test_a_split_file_is_used_and_does_not_depend_on_the_model(model, cells, tmp_path):
    """Written by a run with one model, read by one with another, on the file in another order."""
    first = benchmark_classification(model, cells, "type", seeds=2, folds=3, seed=4)
    first.beside["split.json"](tmp_path / "split.json")
    split = read_split(tmp_path / "split.json")
    turned = cells[::-1].copy()
    model.training_cells = np.sort(hashes_of(model, cells)[:30])
    second = benchmark_classification(
        {"other": [external(turned, one_hot(turned))]}, turned, "type", split=split, seeds=9, folds=8, seed=4
    )
    assert (second.rows[0]["seeds"], second.rows[0]["folds"]) == (2, 3)
    for name, probe in [("PCA 50", "linear"), ("variable genes", "linear")]:
        assert row(first, name, probe) == row(second, name, probe)
    third = benchmark_classification(model, cells, "type", split=split, max_overlap=1, seed=4)
    assert third.details["split_sha256"] == first.details["split_sha256"] == second.details["split_sha256"]
    assert third.rows[0]["cells"] == 90
    with pytest.raises(UserError, match="of label 'type', not 'n'"):
        benchmark_classification(model, cells, "n", split=split)
    cells.obs["donor"] = ["x", "y", "z"] * 40
    with pytest.raises(UserError, match="of unit 'cell', not 'group'"):
        benchmark_classification(model, cells, "type", group="donor", split=split)


def test_the_same_seed_gives_the_same_table_in_any_order_of_cells(model, cells):
    first = benchmark_classification(model, cells, "type", **ONCE)
    turned = cells[np.random.default_rng(0).permutation(120)].copy()
    for again in (benchmark_classification(model, each, "type", **ONCE) for each in (cells, turned)):
        assert again.record() == first.record()
    other = benchmark_classification(model, cells, "type", seed=1, **ONCE)
    assert other.rows != first.rows
    assert other.details["cells_sha256"] == first.details["cells_sha256"]


def test_few_cells_are_too_few_for_ten_neighbours(model, cells):
    two = cells[cells.obs["type"] != "gamma"][:21].copy()
    two.obs["type"] = ["a", "b"] * 10 + ["a"]
    with pytest.raises(UserError, match="20 cells leave 6 to train on in a fold, fewer than the 10 that k-NN needs"):
        benchmark_classification(model, two[:20], "type", folds=3)
    assert benchmark_classification(model, two, "type", seeds=1, folds=7).rows
    with pytest.raises(UserError, match="2 folds cannot train, validate and test"):
        benchmark_classification(model, two, "type", folds=2)
