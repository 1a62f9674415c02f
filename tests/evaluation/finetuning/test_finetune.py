"""Finetuning on planted cells: what is learnt, what stays as it was, what is written, what is refused."""

import hashlib
import json
import os
import signal
import subprocess
import sys

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from sklearn.metrics import accuracy_score

from scbench.config import FinetuneConfig, ModelConfig
from scbench.data.sources.anndata import AnnDataSource
from scbench.data.store import Store
from scbench.data.training_fingerprints import TrainingFingerprints
from scbench.errors import DivergedError, UserError
from scbench.evaluation import embed
from scbench.evaluation.finetuning.finetune import finetune, run_finetune
from scbench.evaluation.finetuning.predict import predict_labels
from scbench.evaluation.folds import draw_split
from scbench.evaluation.labelled_cells import choose_cells, read_labelled
from scbench.evaluation.leakage import find_seen_cells
from scbench.evaluation.split_files import Split
from scbench.models.model import ExpressionModel

QUICK = {"epochs": 12, "batch_cells": 16}


def weights(model) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def same(first: dict, second: dict) -> bool:
    return first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


def benchmark_split(cells, seed: int) -> Split:
    """What `scbench benchmark classification` draws by default."""
    read = read_labelled(AnnDataSource(cells), "type")
    return draw_split(*choose_cells(read, "type"), "type", None, 5, 1, seed)


def row(finetuned, name: str) -> dict:
    return next(row for row in finetuned.about["rows"] if row["model"] == name)


def test_types_are_learnt_by_the_whole_model_and_by_the_head_alone(model, planted_cells):
    """Clearly better than the majority class on 48 validation cells, and with a part of its errors on new ones."""
    before = weights(model)
    cells, new = planted_cells(240), planted_cells(90, seed=3)
    for train, epochs, part in [("all", 25, 1 / 3), ("head", 150, 1 / 2)]:  # the head stands on an untrained net
        finetuned = finetune(model, cells, "type", train=train, epochs=epochs, batch_cells=16)
        assert row(finetuned, "finetuned model")["accuracy_low"] > row(finetuned, "majority class")["accuracy_high"]
        predicted = predict_labels(finetuned.model, finetuned.classifier, finetuned.about, new)
        assigned = np.asarray(predicted.labels) != "unassigned"
        assert assigned.mean() > 0.8
        truth = new.obs["type"][assigned]
        majority = truth.value_counts(normalize=True).max()
        assert 1 - accuracy_score(truth, np.asarray(predicted.labels)[assigned]) < part * (1 - majority)
        assert same(weights(finetuned.model), before) == (train == "head")
    assert same(weights(model), before), "the given model stays as it is"


def test_shuffled_labels_give_chance(model, planted_cells):
    cells = planted_cells(300)
    cells.obs["type"] = np.random.default_rng(0).permutation(cells.obs["type"].to_numpy())
    finetuned = finetune(model, cells, "type", **QUICK)
    assert row(finetuned, "finetuned model")["accuracy"] < 0.55  # 1/3, of 60 cells
    assert finetuned.about["validation"]["loss"] == pytest.approx(np.log(3), abs=0.1), "it knows that it knows nothing"


def test_the_same_seed_gives_the_same_bits_in_any_order_of_cells(model, cells):
    first = finetune(model, cells, "type", seed=4, **QUICK)
    again = finetune(model, cells, "type", seed=4, **QUICK)
    assert same(weights(first.model), weights(again.model))
    assert same(weights(first.classifier), weights(again.classifier))
    assert first.about == again.about
    moved = finetune(model, cells[::-1].copy(), "type", seed=4, **QUICK)
    assert moved.about["split"] == first.about["split"]
    torch.testing.assert_close(moved.classifier.linear.weight, first.classifier.linear.weight, atol=1e-4, rtol=1e-3)
    other = finetune(model, cells, "type", seed=5, **QUICK)
    assert other.about["split"]["sha256"] != first.about["split"]["sha256"]
    assert not same(weights(first.classifier), weights(other.classifier))


def test_who_takes_part_and_the_split(model, cells):
    cells.obs["type"] = cells.obs["type"].astype(object)
    cells.obs.iloc[20:23, 0] = [None, "", "Unknown"]
    cells.obs.iloc[30:39, 0] = "rare"
    about = finetune(model, cells, "type", train="head", epochs=1).about
    assert about["classes"] == ["alpha", "beta", "gamma"]
    assert (about["cells"]["unlabelled"], about["cells"]["in_small_classes"]) == (3, 9)
    assert about["cells"]["dropped_classes"] == {"rare": 9}
    assert (about["split"]["train"], about["split"]["validation"]) == (86, 22)
    assert any("rare (9)" in sentence for sentence in about["sentences"])


def test_validation_cells_are_those_that_the_benchmark_tests_first(model, cells):
    about = finetune(model, cells, "type", train="head", epochs=1, seed=3).about
    fold = benchmark_split(cells, seed=3).fold
    lines = sorted((int(unit, 16), folds[0] == 0) for unit, folds in fold.items())
    digest = hashlib.sha256(np.array([unit for unit, _ in lines], dtype="<u8").tobytes())
    digest.update(np.array([held_out for _, held_out in lines], dtype="u1").tobytes())
    assert about["split"]["sha256"] == digest.hexdigest()


def test_the_kept_epoch_is_the_best_one(model, cells):
    """Labels that mean nothing: the loss on validation cells soon rises, and training stops."""
    cells.obs["type"] = np.random.default_rng(1).permutation(cells.obs["type"].to_numpy())
    about = finetune(model, cells, "type", epochs=50, batch_cells=8, lr=0.05).about
    assert about["epochs"] == about["best_epoch"] + 5 < 50


@pytest.fixture
def files(model, cells, tmp_path):
    model.save_pretrained(tmp_path / "model", {"sources": [{"name": "elsewhere", "cells": 7}]}, np.arange(5, dtype=np.uint64))
    cells.write_h5ad(tmp_path / "in.h5ad")
    paths = {"model": tmp_path / "model", "input": tmp_path / "in.h5ad", "output": tmp_path / "out"}
    return lambda **options: FinetuneConfig(**{**paths, "label": "type", **QUICK, **options})


def test_the_directory_is_a_model_with_a_classifier(files, tmp_path, capsys, cells):
    result = run_finetune(files())
    shown = capsys.readouterr().out
    assert "finetuned model" in shown
    assert "majority class" in shown
    assert {path.name for path in (tmp_path / "out").iterdir()} == {
        "model.safetensors", "config.json", "vocabulary.json", "training_cells.npy", "README.md",
        "classifier.safetensors", "classifier.json",
    }
    about = json.loads((tmp_path / "out" / "classifier.json").read_text())
    assert {**about, "output": result["output"]} == {**json.loads(json.dumps(result)), "format": 1}
    assert about["classes"] == ["alpha", "beta", "gamma"]
    assert load_file(tmp_path / "out" / "classifier.safetensors")["linear.weight"].shape == (3, 16)
    model = ExpressionModel.from_pretrained(tmp_path / "out")
    assert embed.fingerprint(model) == about["model_fingerprint"] != about["started_from"]
    assert model.embed(cells).shape == (120, 16)
    assert model.provenance["finetuning"]["label"] == "type"
    assert "on the column 'type' of in.h5ad" in (tmp_path / "out" / "README.md").read_text()
    assert model.provenance["sources"] == [{"name": "elsewhere", "cells": 7}]
    assert find_seen_cells(model, cells).seen.all(), "the guard knows the cells that it was finetuned on"
    run_finetune(files(output=tmp_path / "again", json=True))
    assert capsys.readouterr().out == ""
    for name in ("model.safetensors", "classifier.safetensors", "classifier.json", "training_cells.npy"):
        first, second = ((tmp_path / folder / name).read_bytes() for folder in ("out", "again"))
        assert hashlib.sha256(first).digest() == hashlib.sha256(second).digest(), name


def test_the_head_alone_leaves_the_models_file_bit_for_bit(files, tmp_path):
    run_finetune(files(train="head", json=True))
    assert (tmp_path / "out" / "model.safetensors").read_bytes() == (tmp_path / "model" / "model.safetensors").read_bytes()


def test_the_guard_still_knows_pretraining_by_copies(small_store, cells_file, make_cells, tmp_path):
    """A model with fingerprints: after finetuning, cells of both trainings are known without one gene and in other numbers."""
    store = Store.open(small_store)
    config = ModelConfig(vocabulary_size=store.vocabulary.size, width=16, layers=1, heads=2)
    splits = [store.split("train")]
    hashes = splits[0].cells(["content_hash"])["content_hash"].to_numpy()
    network = ExpressionModel(config, store.vocabulary)
    network.save_pretrained(tmp_path / "model", {}, hashes, TrainingFingerprints.of_store(store, splits).save)
    labelled = make_cells(seed=5)
    labelled.write_h5ad(tmp_path / "in.h5ad")
    run_finetune(FinetuneConfig(model=tmp_path / "model", input=tmp_path / "in.h5ad", label="cell_type", train="head",
                                epochs=1, output=tmp_path / "out", json=True))
    first, after = (find_seen_cells(tmp_path / folder, cells_file) for folder in ("model", "out"))
    assert 0 < first.seen.sum() < 300
    assert (after.stage == first.stage).all()
    assert after.checked == first.checked
    assert find_seen_cells(tmp_path / "out", labelled).seen.all()
    assert not find_seen_cells(tmp_path / "model", labelled).seen.any()


def test_bad_input_is_one_sentence_and_leaves_nothing(files, tmp_path, cells):
    for options, message in [
        ({"label": "typ"}, r"in\.h5ad has no column 'typ' in obs: choose --label among type, n"),
        ({"label": "n"}, "with 0 classes of at least 10 cells"),
        ({"model": tmp_path}, "not a model directory"),
        ({"input": tmp_path / "no.h5ad"}, "there is no file"),
        ({"layer": "nope"}, "no layer 'nope'"),
    ]:
        with pytest.raises(UserError, match=message):
            run_finetune(files(**options))
    for options, message in [({"epochs": 0}, "--epochs is 0"), ({"lr": 0.0}, "--lr is 0"), ({"coverage": 0.0}, "--coverage"),
                             ({"batch_cells": 0}, "--batch-cells is 0")]:
        with pytest.raises(UserError, match=message):
            files(**options)
    cells.obs["type"] = [name.replace("alpha", "unassigned") for name in cells.obs["type"]]
    cells.write_h5ad(tmp_path / "named.h5ad")
    with pytest.raises(UserError, match="has a class 'unassigned'"):
        run_finetune(files(input=tmp_path / "named.h5ad"))
    assert {path.name for path in tmp_path.iterdir()} == {"model", "in.h5ad", "named.h5ad"}
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine").write_text("")
    with pytest.raises(UserError, match="exists already"):
        run_finetune(files())


def test_a_loss_that_is_no_number_stops_it(model, cells, monkeypatch):
    monkeypatch.setattr("scbench.evaluation.finetuning.calibration.cross_entropy", lambda *_: float("nan"))
    with pytest.raises(DivergedError, match="give a lower --lr"):
        finetune(model, cells, "type", train="head", epochs=1)


def test_a_killed_run_leaves_no_directory(files, tmp_path):
    """Killed while the classifier is written, the last of the files."""
    config = files(train="head", epochs=1)
    code = (
        "import sys, time; from scbench.models import classifier; from scbench.cli import main\n"
        "save = classifier.save\n"
        "def slow(*rest):\n    save(*rest)\n    print('written', flush=True)\n    time.sleep(60)\n"
        "classifier.save = slow\nmain(sys.argv[1:])"
    )
    arguments = ["finetune", config.model, config.input, "--label", "type", "-o", config.output, "--train", "head",
                 "--epochs", "1"]
    process = subprocess.Popen([sys.executable, "-c", code, *map(str, arguments)], stdout=subprocess.PIPE, text=True,
                               env={**os.environ, "OMP_NUM_THREADS": "1"})
    assert process.stdout.readline() == "written\n"
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert not (tmp_path / "out").exists()
    assert {path.name for path in tmp_path.iterdir() if not path.name.startswith(".")} == {"model", "in.h5ad"}
