"""The whole perturbation benchmark on planted cells: what the numbers must be, and what is refused."""

import json
import os
from pathlib import Path

import numpy as np
import pytest

from scbench.config import ModelConfig, PerturbationConfig
from scbench.data.gene_identity import gene_keys
from scbench.data.sources.anndata import AnnDataSource
from scbench.data.vocabulary import Vocabulary
from scbench.errors import UserError
from scbench.evaluation.perturbation import scoring
from scbench.evaluation.perturbation.benchmark import benchmark_perturbation, run_perturbation
from scbench.evaluation.perturbation.cells import PANEL, name_cells, read_perturbed_cells
from scbench.evaluation.perturbation.fold import prepare_fold
from scbench.evaluation.perturbation.pooled import across_contexts, pooled_score, unmatched
from scbench.evaluation.perturbation.scoring import METRICS, score_fold
from scbench.evaluation.perturbation.splits import halves, make_folds
from scbench.models.model import ExpressionModel

SINGLES = [f"GENE{i}" for i in range(12)]
ONCE = {"seeds": 1, "folds": 3}


def run(model, cells, **options):
    return benchmark_perturbation(
        model, cells, "condition", "control", **{"context": ("line",), "total_counts_column": PANEL, **ONCE, **options}
    )


def rename(cells, old: str, new: str) -> None:
    cells.obs = cells.obs.assign(condition=cells.obs["condition"].astype(str).str.replace(old, new))


def row(table, name: str, stratum: str = "all") -> dict:
    return next(row for row in table.rows if (row["model"], row["stratum"]) == (name, stratum))


def test_embeddings_that_know_the_effects_win(model, planted):
    table = run(model, planted([f"GENE{i}" for i in range(24)], cells=30), folds=6)
    known, drawn = row(table, "trained model"), row(table, "random vectors")
    assert known["pearson_control"] > 0.9 * row(table, "other half of the cells")["pearson_control"]
    assert known["discrimination"] > 0.9
    assert known["mse"] < drawn["mse"]
    assert row(table, "trained model − random vectors")["mse_high"] < 0
    assert row(table, "trained model − random vectors")["pearson_control"] == pytest.approx(
        known["pearson_control"] - drawn["pearson_control"]
    )
    assert any("beats the best baseline" in sentence for sentence in table.sentences)
    ceiling = row(table, "other half of the cells")
    assert ceiling["discrimination"] > 0.95
    assert abs(ceiling["energy"]) < 0.1 * row(table, "no change")["energy"]
    assert {r["pairs"] for r in table.rows} == {24}


def test_a_predictor_of_the_train_mean_is_that_baseline(model, planted):
    model.embedding.table.data[:] = 1.0
    table = run(model, planted(SINGLES, cells=20, contexts=("a", "b")))
    mean, model_row = row(table, "train mean"), row(table, "trained model")
    for name in METRICS:
        assert model_row[name] == mean[name]
        assert (model_row[f"{name}_low"], model_row[f"{name}_high"]) == (mean[f"{name}_low"], mean[f"{name}_high"])
    assert mean["pearson_mean"] == 0


def held_out(cells, split):
    scored = halves(np.where(cells.controls, cells.context, -1), cells.hashes, 0, 0)
    return [prepare_fold(cells, fold, scored) for fold in make_folds(cells, split, 0, 0)]


def truth_of(held) -> np.ndarray:
    """The real change of the scored cells, by hand."""
    dense, cells = held.values.toarray().astype(np.float64), held.cells
    found = []
    for pair in held.fold.pairs:
        controls = cells.controls & held.scored_controls & (cells.context == cells.pair_context[pair])
        found.append(dense[held.fold.scored & (cells.pair == pair)].mean(axis=0) - dense[controls].mean(axis=0))
    return np.stack(found)


def test_a_perfect_predictor_gets_the_optimum_and_a_wrong_one_its_own_scores(planted, read, divide):
    file = planted(SINGLES, cells=20, contexts=("a", "b"))
    dense = file.X.toarray()
    for line in ("a", "b"):  # equal controls, so that both halves have one mean
        rows = ((file.obs["condition"] == "control") & (file.obs["line"] == line)).to_numpy()
        dense[rows] = dense[rows][0]
    file.X = type(file.X)(dense)
    cells = read(file)
    for held in held_out(cells, divide(file, "unseen-perturbation", 3)):
        truth = truth_of(held)
        wrong = np.roll(truth, 2, axis=0)  # of another perturbation in the same context
        for pair, _, scores in score_fold(held, {"perfect": truth, "wrong": wrong}, False, 0):
            perfect = dict(zip(METRICS, scores["perfect"][:, 0], strict=True))
            assert perfect["mse"] == pytest.approx(0, abs=1e-12)
            assert perfect["mse_top"] == pytest.approx(0, abs=1e-12)
            for name in ("pearson_control", "pearson_mean", "pearson_control_top", "pearson_mean_top"):
                assert perfect[name] == pytest.approx(1)
            assert perfect["discrimination"] == 1
            other = dict(zip(METRICS, scores["wrong"][:, 0], strict=True))
            place = held.fold.pairs.tolist().index(pair)
            own = int(cells.perturbations[cells.pair_perturbation[pair]][0][4:])
            keep = [gene for gene, column in enumerate(held.genes) if column != own]
            assert other["mse"] == pytest.approx(np.square(wrong - truth)[place, keep].mean())
            assert other["pearson_control"] == pytest.approx(np.corrcoef(wrong[place, keep], truth[place, keep])[0, 1])
            base = held.fitted.mean[cells.pair_context[pair]]
            reference = np.corrcoef((wrong[place] - base)[keep], (truth[place] - base)[keep])[0, 1]
            assert other["pearson_mean"] == pytest.approx(reference)
            assert other["discrimination"] < 0.95
            assert perfect["energy"] < other["energy"]


def test_the_first_sample_of_cells_is_the_plain_score(planted, read, divide):
    file = planted(SINGLES[:4], cells=24)
    held = held_out(read(file), divide(file, "unseen-cells", 3))[0]
    predictions = {"half": 0.5 * truth_of(held)}
    plain = {pair: scores["half"] for pair, _, scores in score_fold(held, predictions, False, 0)}
    for pair, _, scores in score_fold(held, predictions, True, 0):
        assert scores["half"].shape == (len(METRICS), 1 + scoring.RESAMPLES)
        np.testing.assert_allclose(scores["half"][:, :1], plain[pair], atol=1e-9)
        assert scores["half"][0, 1:].std() > 0


def test_perturbations_without_scored_cells_are_no_rivals(planted, read, divide):
    """A pair that lost its cells in a fold of cells cannot be taken for the right one."""
    file = planted(SINGLES[:4], cells=24)
    held = held_out(read(file), divide(file, "unseen-cells", 3))[0]
    gone = held.cells.pair == held.fold.pairs[0]
    fold = held.fold._replace(scored=held.fold.scored & ~gone, pairs=held.fold.pairs[1:], strata=held.fold.strata[1:])
    held = held._replace(fold=fold)
    for _, _, scores in score_fold(held, {"perfect": truth_of(held)}, False, 0):
        assert scores["perfect"][METRICS.index("discrimination"), 0] == 1


def test_the_order_of_the_file_moves_no_interval(model, planted):
    cells = planted(SINGLES[:4], cells=20)
    turned = cells[np.random.default_rng(0).permutation(cells.n_obs)].copy()
    first, second = (run(model, one, split="unseen-cells").rows for one in (cells, turned))
    for one, other in zip(first, second, strict=True):
        assert {name: value for name, value in other.items() if name != "dataset"} == {
            name: pytest.approx(value, abs=1e-6) if isinstance(value, float) else value
            for name, value in one.items() if name != "dataset"
        }


def test_pooled_controls_are_caught(model, planted, read):
    """Perturbations that do nothing, two in each of two lines that are far apart."""
    file = planted(["none1", "none2", "none3", "none4"], cells=40, contexts=("a", "b"), shift=0.7)
    of_a = file.obs["condition"].isin(["none1", "none2", "control"])
    of_b = file.obs["condition"].isin(["none3", "none4", "control"])
    file = file[np.where(file.obs["line"] == "a", of_a, of_b)].copy()
    matched, blind = read(file), read(file, context=())
    assert across_contexts(matched) > 0.95
    assert unmatched(blind, file.obs, {"condition"})[0] == "line"
    assert unmatched(blind, file.obs, {"condition"})[1] > 0.95
    assert unmatched(matched, file.obs, {"condition", "line"}) is None
    options = {"split": "unseen-cells", "seeds": 1, "folds": 2}
    rename(file, "none", "GENE")
    right, wrong = run(model, file, **options), run(model, file, context=(), **options)
    assert row(right, "no change")["pearson_control"] == 0
    assert abs(row(right, "own training mean")["pearson_control"]) < 0.3
    assert row(wrong, "own training mean")["pearson_control"] > 0.8
    assert any("give --context line too" in sentence for sentence in wrong.sentences)
    assert not any("too." in sentence for sentence in right.sentences)
    assert any("pooled, “no change” would score" in sentence for sentence in right.sentences)


@pytest.mark.skipif("SCBENCH_TEST_DATA" not in os.environ, reason="SCBENCH_TEST_DATA does not name a folder of real cells")
def test_pooled_controls_of_real_cell_lines_would_score_097_and_matched_ones_nothing():
    with AnnDataSource(Path(os.environ["SCBENCH_TEST_DATA"]) / "norman_mcfaline_500g.h5ad") as source:
        named = name_cells(source, "condition", "control", context=("cell_type",), study=())
        cells, = read_perturbed_cells(source, named, total_counts_column="ncounts").studies
    assert across_contexts(cells) == pytest.approx(0.97, abs=0.02)
    # matched ones, told apart further by what doesn't matter: nothing to gain
    half = np.random.default_rng(0).integers(2, size=len(cells.context))
    assert abs(pooled_score(cells, cells.context, 2 * cells.context + half)) < 0.1


def test_strata_and_the_additive_baseline(model, planted):
    combined = ["GENE0+GENE1", "GENE2+GENE3", "GENE4+GENE5", "GENE6+GENE7", "GENE8+GENE9", "GENE0+GENE20"]
    table = run(model, planted([*SINGLES, *combined], cells=20), split="unseen-combination", seeds=2)
    strata = list(dict.fromkeys(r["stratum"] for r in table.rows))
    assert strata[0] == "all"
    assert len(strata) >= 3
    additive = row(table, "additive")
    assert additive["pairs"] < row(table, "trained model")["pairs"] == 6
    assert additive["pearson_control"] > row(table, "train mean")["pearson_control"] + 0.3
    assert any("additive baseline is defined for" in sentence for sentence in table.sentences)


def test_contexts(model, planted):
    file = planted(["GENE0", "GENE1", "GENE2"], cells=20, contexts=("a", "b", "c", "d"), shift=0.3)
    table = run(model, file, split="unseen-context", predictor="context")
    assert [r["model"] for r in table.rows[:3]] == ["trained model", "untrained model", "PCA"]
    assert row(table, "matching mean")["pearson_control"] > 0.7
    assert row(table, "trained model")["units"] == 4
    one = run(model, file[(file.obs["condition"] != "GENE1") & (file.obs["condition"] != "GENE2")].copy(),
              split="unseen-context", predictor="context")
    assert row(one, "trained model")["discrimination"] is None  # nothing to be told from


def test_refused_targets_are_counted_and_named(model, planted):
    model.provenance = {"training": {"seed": 1, "optimizer": "adamw"}}  # rows of GENE24 and on are as seed 1 drew them
    file = planted([*SINGLES, "GENE30", "NOGENE", "GENE0+NOGENE"], cells=20)
    table = run(model, file)
    assert table.details["targets"]["refused"] == {"no token": ["NOGENE"], "never seen in training": ["GENE30"]}
    assert table.details["cells"]["of refused targets"] == 60
    assert row(table, "trained model")["pairs"] == 12
    assert any("never seen in training (1): GENE30" in sentence for sentence in table.sentences)


def test_studies_are_never_mixed(model, planted):
    file = planted(SINGLES, cells=20, contexts=("a", "b"))
    file.obs["perturbation_type"] = np.where(file.obs["line"] == "a", "CRISPRa", "CRISPRi")
    source = AnnDataSource(file)
    named = name_cells(source, "condition", "control", genes=set(SINGLES))
    studies = read_perturbed_cells(source, named, total_counts_column=PANEL).studies
    assert [cells.study for cells in studies] == ["CRISPRa", "CRISPRi"]
    assert all(set(file.obs["line"].iloc[cells.rows]) == {line} for cells, line in zip(studies, "ab", strict=True))
    table = run(model, file)
    assert (row(table, "trained model")["pairs"], row(table, "trained model")["units"]) == (24, 24)


def test_totals(planted):
    file = planted(["GENE0"], cells=20)
    file.obs["total"] = np.asarray(file.X.sum(axis=1)).ravel() * 10.0
    source = AnnDataSource(file)
    named = name_cells(source, "condition", "control", genes={"GENE0"})
    scaled = read_perturbed_cells(source, named, total_counts_column="total")
    whole = read_perturbed_cells(source, named, total_counts_column=PANEL)
    shares = file.X.toarray() / file.X.sum(axis=1)
    np.testing.assert_allclose(scaled.studies[0].values.toarray(), np.log1p(1e3 * shares), rtol=1e-5)
    np.testing.assert_allclose(whole.studies[0].values.toarray(), np.log1p(1e4 * shares), rtol=1e-5)
    assert (scaled.totals, whole.totals) == ("column total", "panel")
    with pytest.raises(UserError, match=r"has 80 genes only, whose sum is no cell's total: .* --total-counts-column panel"):
        read_perturbed_cells(source, named)


@pytest.mark.parametrize(("change", "options", "message"), [
    (lambda c: None, {"context": ("nope",)}, "has no column 'nope' in obs: choose --context among condition, line"),
    (lambda c: None, {"total_counts_column": "line"}, "holds values that are no totals"),
    (lambda c: c.obs.insert(0, "total", 1.0), {"total_counts_column": "total"}, "totals under the sum of a cell's counts"),
    (lambda c: rename(c, "control", "untreated"), {},
     "no cell is called 'control' in 'condition': choose --control among GENE0"),
    (lambda c: rename(c, "control", "ctrl"), {},  # a word for controls, but not the user's
     "no cell is called 'control' in 'condition': choose --control among ctrl, GENE0"),
    (lambda c: rename(c, "GENE", "drug"), {},
     r"none of the 4 targets \(drug0, .*\) is a gene that the model was trained on"),
    (lambda c: c.obs.__setitem__("line", [f"{i}" for i in range(c.n_obs)]), {}, "no perturbation with 20 cells in a context"),
    (lambda c: None, {"folds": 5}, "cannot be split by unseen-perturbation .*4 perturbations of one target, 5 are needed"),
    (lambda c: None, {"split": "unseen-combination"}, "0 combinations, 3 are needed"),
    (lambda c: None, {"split": "unseen-context"}, "no perturbation in two contexts"),
    (lambda c: None, {"split": "unseen-context", "context": ()}, "give --context"),
    (lambda c: None, {"predictor": "context"}, "add --split unseen-context"),
    (lambda c: setattr(c, "var_names", [f"{'OTHER' if i > 4 else 'GENE'}{i}" for i in range(80)]), {}, "of the counts of"),
])
def test_bad_input_is_one_sentence(model, planted, change, options, message):
    cells = planted(["GENE0", "GENE1", "GENE2", "GENE3"], cells=20)
    change(cells)
    with pytest.raises(UserError, match=message) as error:
        run(model, cells, **options)
    assert str(error.value).count(". ") == 0


def test_cells_of_pretraining_are_refused_or_left_out(model, planted, monkeypatch):
    cells = planted(SINGLES, cells=21)
    from scbench.evaluation import leakage

    stage = np.full(cells.n_obs, -1, dtype=np.int8)
    stage[40:52] = 0
    monkeypatch.setattr(leakage, "find_seen_cells", lambda *args, **options: leakage.SeenCells(stage, ("content",)))
    with pytest.raises(UserError, match="trained or validated on 12 of the 292 cells"):
        run(model, cells)
    with_out = run(model, cells, max_overlap=1)
    assert (with_out.details["cells"]["seen by the model"], row(with_out, "no change")["overlap"]) == (12, "unseen")
    kept = run(model, cells, allow_overlap=True)
    assert (kept.details["cells"]["seen by the model"], row(kept, "no change")["overlap"]) == (0, "transductive")


def test_run_perturbation_writes_the_table_twice_the_same(model, planted, tmp_path, capsys):
    model.save_pretrained(tmp_path / "model", {})
    planted(["GENE0", "GENE1", "GENE2", "GENE3"], cells=20).write_h5ad(tmp_path / "in.h5ad")
    options = {"model": tmp_path / "model", "input": tmp_path / "in.h5ad", "perturbation_column": "condition",
               "control": "control", "context": ("line",), "total_counts_column": PANEL, **ONCE}
    result = run_perturbation(PerturbationConfig(output=tmp_path / "out", **options))
    record = json.loads((tmp_path / "out" / "results.json").read_text())
    assert record == json.loads(json.dumps(result))
    assert "random vectors" in capsys.readouterr().out
    run_perturbation(PerturbationConfig(output=tmp_path / "again", json=True, **options))
    assert capsys.readouterr().out == ""
    assert (tmp_path / "again" / "results.json").read_bytes() == (tmp_path / "out" / "results.json").read_bytes()
    with pytest.raises(UserError, match="exists already"):
        run_perturbation(PerturbationConfig(output=tmp_path / "out", **options))


@pytest.mark.full
@pytest.mark.skipif("SCBENCH_TEST_DATA" not in os.environ, reason="SCBENCH_TEST_DATA does not name a folder of real cells")
@pytest.mark.parametrize(("file", "control", "options"), [
    ("schraivogel_tapseq_72g.h5ad", "non-targeting", {"perturbation_column": "perturbation", "total_counts_column": PANEL}),
    ("gbm_panobinostat_300g.h5ad", "ctrl", {
        "perturbation_column": "condition", "context": ("patient_id",), "split": "unseen-context", "predictor": "context",
        "total_counts_column": PANEL,
    }),
    ("norman_mcfaline_500g.h5ad", "control", {
        "perturbation_column": "condition", "context": ("cell_type",), "total_counts_column": "ncounts",
        "split": "unseen-combination",
    }),
])
def test_real_files(file, control, options):
    path = Path(os.environ["SCBENCH_TEST_DATA"]) / file
    with AnnDataSource(path) as source:
        keys = {key for key in gene_keys(source.identity) if key}
        targets = {target for name in source.obs[options["perturbation_column"]].unique() for target in name.split("+")}
    vocabulary = Vocabulary.build(keys | targets)
    model = ExpressionModel(ModelConfig(vocabulary_size=vocabulary.size, width=8, layers=1, heads=2), vocabulary)
    table = benchmark_perturbation(model, path, control=control, **options, **ONCE)
    ceiling, nothing = row(table, "other half of the cells"), row(table, "no change")
    assert nothing["pearson_control"] == 0
    assert ceiling["pearson_control"] > 0.25
    assert abs(ceiling["energy"]) < abs(nothing["energy"])
    if "norman" in file:  # what is known of combinations: they are nearly the sum of their parts
        assert row(table, "additive")["discrimination"] > row(table, "train mean")["discrimination"]
