"""export: the model directory that pretrain leaves, from a checkpoint, in a process that never imports DeepSpeed."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from scbench import ExpressionModel, pretrain
from scbench.cli import main

SMALL = {"width": 16, "layers": 1, "heads": 2, "max_genes": 40, "batch_cells": 32, "steps": 6, "checkpoint_every": 4}


@pytest.fixture(scope="module")
def finished(small_store, tmp_path_factory) -> Path:
    """A run of six steps, with the checkpoints of the fourth and the last."""
    run = tmp_path_factory.mktemp("runs") / "run"
    pretrain(small_store, run, **SMALL, data_share=0.5)
    return run


@pytest.fixture
def run(finished, tmp_path) -> Path:
    """A copy of it, to be broken."""
    return shutil.copytree(finished, tmp_path / "run")


def files(directory: Path) -> dict[str, bytes]:
    return {str(p.relative_to(directory)): p.read_bytes() for p in directory.rglob("*") if p.is_file()}


def refused(capsys, *arguments) -> str:
    with pytest.raises(SystemExit) as stop:
        main(["export", *map(str, arguments)])
    captured = capsys.readouterr()
    assert stop.value.code == 2
    assert captured.err.startswith("scbench: ") and captured.err.count("\n") == 1, captured.err
    return captured.err


def test_a_run_exported_is_what_pretrain_left(finished, tmp_path):
    main(["export", str(finished), "-o", str(tmp_path / "model")])
    assert files(tmp_path / "model") == files(finished / "model")


def test_an_earlier_checkpoint(finished, tmp_path, capsys):
    path = finished / "checkpoints" / "step-00000004"
    main(["export", str(path), "-o", str(tmp_path / "model"), "--json"])
    said = json.loads(capsys.readouterr().out)
    assert (said["steps"], said["leakage_guard"]) == (4, True)
    model = ExpressionModel.from_pretrained(tmp_path / "model")
    master = load_file(path / "master.safetensors")
    assert all(torch.equal(tensor, master[name]) for name, tensor in model.state_dict().items())
    assert model.provenance["steps"] == 4
    assert model.provenance["validation"] == {}, "there was none after that step"
    left = ExpressionModel.from_pretrained(finished / "model")
    np.testing.assert_array_equal(model.training_cells, left.training_cells)


def test_no_deepspeed_is_needed(finished, tmp_path):
    code = ("import sys; sys.modules['deepspeed'] = None\n"
            f"from scbench.cli import main; main(['export', {str(finished)!r}, '-o', {str(tmp_path / 'model')!r}])")
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120)
    assert ExpressionModel.from_pretrained(tmp_path / "model").provenance["steps"] == 6


def test_without_its_store_the_model_says_that_it_is_not_checkable(run, small_store, tmp_path, capsys):
    config = json.loads((run / "config.json").read_text())
    (run / "config.json").write_text(json.dumps(config | {"store": str(tmp_path / "gone")}))
    main(["export", str(run), "-o", str(tmp_path / "model")])
    said = capsys.readouterr().err
    assert said.count("\n") == 1 and "not checkable" in said and "--store" in said and str(tmp_path / "gone") in said
    whole = files(run / "model")
    guard = {name for name in whole if name.startswith(("training_cells", "fingerprints"))}
    assert guard and files(tmp_path / "model") == {name: content for name, content in whole.items() if name not in guard}
    main(["export", str(run), "-o", str(tmp_path / "checkable"), "--store", str(small_store)])
    assert files(tmp_path / "checkable") == whole


def test_another_store_is_refused_where_it_was_given_and_left_alone_where_it_was_found(run, cells_file, tmp_path, capsys):
    from scbench import prepare

    other = prepare([cells_file], tmp_path / "other", split=(0.5, 0.2, 0.3), workers=1)
    said = refused(capsys, run, "-o", tmp_path / "model", "--store", other.path)
    assert "not the one" in said
    config = json.loads((run / "config.json").read_text())
    (run / "config.json").write_text(json.dumps(config | {"store": str(other.path)}))
    main(["export", str(run), "-o", str(tmp_path / "model")])
    assert "not the one" in capsys.readouterr().err
    assert not (tmp_path / "model" / "training_cells.npy").exists()


def test_the_newest_checkpoint_is_damaged(run, tmp_path, capsys):
    newest = run / "checkpoints" / "step-00000006"
    weights = newest / "master.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1] + b"?")
    assert "damaged" in refused(capsys, newest, "-o", tmp_path / "model")
    with pytest.warns(UserWarning, match="damaged"):
        main(["export", str(run), "-o", str(tmp_path / "model")])
    assert ExpressionModel.from_pretrained(tmp_path / "model").provenance["steps"] == 4


@pytest.mark.parametrize(("broken", "said"), [
    ("nothing there", "there is no checkpoint"),
    ("another folder", "neither a checkpoint"),
    ("no checkpoints yet", "no whole checkpoint yet"),
    ("no options", "not a run directory"),
    ("options of something else", "not a run directory"),
    ("no vocabulary", "vocabulary"),
    ("another vocabulary", "damaged or not of this run"),
    ("no data.json", "data.json"),
    ("a newer format", "upgrade scbench"),
    ("the output exists", "exists already"),
    ("no such store", "there is no store"),
])
def test_what_cannot_be_exported(run, tmp_path, capsys, broken, said):
    path, more, state = run, [], run / "checkpoints" / "step-00000006" / "state.json"
    if broken == "nothing there":
        path = tmp_path / "nothing"
    elif broken == "another folder":
        (path := tmp_path / "folder").mkdir()
    elif broken == "no checkpoints yet":
        for checkpoint in (run / "checkpoints").iterdir():
            shutil.rmtree(checkpoint)
    elif broken == "no options":
        (run / "config.json").unlink()
    elif broken == "options of something else":
        (run / "config.json").write_text("[1, 2]")
    elif broken == "no vocabulary":
        (run / "vocabulary.json").unlink()
    elif broken == "another vocabulary":
        (run / "vocabulary.json").write_text('{"<pad>": 0, "<cls>": 1, "<eoc>": 2, "A": 3}')
    elif broken == "no data.json":
        (run / "data.json").unlink()
    elif broken == "a newer format":
        state.write_text(json.dumps(json.loads(state.read_text()) | {"format": 99}))
    elif broken == "the output exists":
        (tmp_path / "model").mkdir()
        (tmp_path / "model" / "mine").touch()
    else:
        more = ["--store", tmp_path / "nothing"]
    assert said in refused(capsys, path, "-o", tmp_path / "model", *more)
    assert not (tmp_path / "model" / "config.json").exists()
