"""Labels of new cells: known types by name, an unknown type mostly unassigned, nothing else in the copy changed."""

import json
import shutil

import anndata
import numpy as np
import pandas as pd
import pytest
import torch
from safetensors.torch import load_file

from scbench.config import ModelConfig, PredictConfig
from scbench.data.vocabulary import Vocabulary
from scbench.errors import UserError
from scbench.evaluation import embed
from scbench.evaluation.finetuning.finetune import finetune
from scbench.evaluation.finetuning.predict import load_classifier, predict_labels, run_predict
from scbench.models.model import ExpressionModel


@pytest.fixture(scope="module")
def directory(tmp_path_factory, planted_cells):
    """A model that was finetuned, whole, on 300 cells of three types."""
    cells = planted_cells(300)
    vocabulary = Vocabulary.build(cells.var_names)
    config = ModelConfig(vocabulary_size=vocabulary.size, width=16, layers=1, heads=2, max_genes=30)
    path = tmp_path_factory.mktemp("finetuned") / "model"
    finetune(ExpressionModel(config, vocabulary, seed=1), cells, "type", epochs=40, batch_cells=16).save(path)
    return path


def fourth_type(found: anndata.AnnData) -> anndata.AnnData:
    """Other cells in place of planted ones: they turn up the 20 genes that no planted type does."""
    generator = np.random.default_rng(4)
    rates = np.full(found.shape, 0.5)
    rates[:, 60:] *= 6
    found.X = generator.poisson(rates * generator.lognormal(0, 0.5, (found.n_obs, 1))).astype(np.float32)
    return found


@pytest.fixture
def config(directory, planted_cells, tmp_path):
    planted_cells(60, seed=3).write_h5ad(tmp_path / "new.h5ad")
    paths = {"model": directory, "input": tmp_path / "new.h5ad", "output": tmp_path / "out.h5ad"}
    return lambda **options: PredictConfig(**{**paths, **options})


def test_known_types_are_named_and_an_unknown_one_is_mostly_unassigned(directory, planted_cells):
    model, classifier, about = load_classifier(directory)
    known = planted_cells(150, seed=3)
    labels = np.asarray(predict_labels(model, classifier, about, known).labels)
    assigned = labels != "unassigned"
    assert assigned.mean() > 0.8
    assert (labels == known.obs["type"])[assigned].mean() > 0.95
    unknown = predict_labels(model, classifier, about, fourth_type(planted_cells(100)))
    assert unknown.counts()["unassigned"] > 60


def test_the_files_numbers_are_the_classifiers(directory, config, planted_cells):
    """Against a few lines on the files that finetuning left."""
    result = run_predict(config())
    new = anndata.read_h5ad(result["output"])
    about = json.loads((directory / "classifier.json").read_text())
    weights = load_file(directory / "classifier.safetensors")
    values = torch.from_numpy(embed.embed(ExpressionModel.from_pretrained(directory), planted_cells(60, seed=3)))
    state = (values - weights["mean"]) / weights["scale"]
    logits = state @ weights["linear.weight"].T + weights["linear.bias"]
    best, code = torch.softmax(logits.double() / about["temperature"], 1).max(1)
    distance = (state @ weights["whitening"])[:, None].sub(weights["centres"]).square().sum(2).sqrt().min(1).values
    far = (best < about["threshold"]) | (distance > about["largest_distance"])
    expected = np.where(far, "unassigned", np.array(about["classes"])[code])
    assert new.obs["scbench_label"].tolist() == expected.tolist()
    np.testing.assert_allclose(new.obs["scbench_probability"], best, atol=1e-4)
    assert new.obs["scbench_label"].cat.categories.tolist() == ["alpha", "beta", "gamma", "unassigned"]
    assert result["labels"] == pd.Series(expected).value_counts().to_dict()


def test_nothing_else_in_the_copy_changes_and_older_labels_go(config, tmp_path, capsys):
    run_predict(config())
    shown = capsys.readouterr().out
    assert "60 cells labelled in a copy of new.h5ad" in shown
    assert "95% of validation cells assigned" in shown
    before, after = anndata.read_h5ad(tmp_path / "new.h5ad"), anndata.read_h5ad(tmp_path / "out.h5ad")
    assert list(after.obs) == ["type", "n", "scbench_label", "scbench_probability"]
    pd.testing.assert_frame_equal(after.obs[["type", "n"]], before.obs)
    assert (after.X != before.X).nnz == 0
    assert json.loads(after.uns["scbench_predict"])["label"] == "type"
    after.obs["scbench_label"] = "old"
    after.write_h5ad(tmp_path / "old.h5ad")
    run_predict(config(input=tmp_path / "old.h5ad", output=tmp_path / "again.h5ad", json=True))
    assert capsys.readouterr().out == ""
    again = anndata.read_h5ad(tmp_path / "again.h5ad")
    assert list(again.obs) == ["type", "n", "scbench_label", "scbench_probability"]
    assert again.obs["scbench_label"].tolist() == anndata.read_h5ad(tmp_path / "out.h5ad").obs["scbench_label"].tolist()


def test_bad_input_is_one_sentence_and_leaves_nothing(config, directory, model, tmp_path):
    model.save_pretrained(tmp_path / "plain", {})
    shutil.copytree(directory, tmp_path / "mixed")
    shutil.copy(tmp_path / "plain" / "model.safetensors", tmp_path / "mixed" / "model.safetensors")
    shutil.copytree(directory, tmp_path / "damaged")
    (tmp_path / "damaged" / "classifier.safetensors").write_bytes(b"no")
    shutil.copytree(directory, tmp_path / "edited")
    about = json.loads((directory / "classifier.json").read_text())
    (tmp_path / "edited" / "classifier.json").write_text(json.dumps({**about, "threshold": None}))
    shutil.copytree(directory, tmp_path / "newer")
    (tmp_path / "newer" / "classifier.json").write_text(json.dumps({**about, "format": 99}))
    there = {path.name for path in tmp_path.iterdir()}
    for options, message in [
        ({"model": tmp_path / "plain"}, r"has no classifier \(classifier.json\): make a model with one by `scbench finetune`"),
        ({"model": tmp_path / "mixed"}, "was trained on another model"),
        ({"model": tmp_path / "damaged"}, "is damaged or not scbench's"),
        ({"model": tmp_path / "edited"}, "is damaged or not scbench's"),
        ({"model": tmp_path / "newer"}, "upgrade scbench"),
        ({"model": tmp_path / "nothing"}, "not a model directory"),
        ({"input": tmp_path / "no.h5ad"}, "there is no file"),
        ({"output": tmp_path / "out.csv"}, "is no .h5ad file"),
        ({"layer": "nope"}, "no layer 'nope'"),
    ]:
        with pytest.raises(UserError, match=message):
            run_predict(config(**options))
    with pytest.raises(UserError, match="--batch-cells is 0"):
        config(batch_cells=0)
    assert {path.name for path in tmp_path.iterdir()} == there
    (tmp_path / "out.h5ad").write_bytes(b"mine")
    with pytest.raises(UserError, match="exists already"):
        run_predict(config())
