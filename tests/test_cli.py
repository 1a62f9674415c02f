"""Bad input through the command line: exit code 2, one clear sentence, and nothing left that looks whole."""

import json
import os
import shutil
import subprocess
import sys

import anndata
import numpy as np
import pytest

from scbench.cli import main


@pytest.fixture
def cells(make_cells):
    return make_cells(n_cells=40, n_genes=60)


def refused(capsys, *arguments) -> str:
    """The one sentence that `scbench arguments` refuses with."""
    with pytest.raises(SystemExit) as stop:
        main([str(a) for a in arguments])
    captured = capsys.readouterr()
    assert stop.value.code == 2, captured.err
    assert captured.err.startswith("scbench: ")
    assert captured.err.count("\n") == 1, "one sentence, one line"
    assert "Traceback" not in captured.err
    return captured.err


def assert_nothing_left(folder, *inputs) -> None:
    """Only what went in is there; hidden working directories are allowed, they can't be taken for an output."""
    assert {p.name for p in folder.iterdir() if not p.name.startswith(".")} == set(inputs)


def write(cells, path, values=None):
    if values is not None:
        cells.X = values
    cells.write_h5ad(path)
    return path


def dense(cells):
    return cells.X.toarray()


@pytest.mark.parametrize(("content", "said"), [
    (None, "there is no file"),
    (b"", "empty"),
    (b"this is not HDF5" * 100, "h5ad"),
])
def test_files_that_are_no_h5ad(tmp_path, capsys, content, said):
    path = tmp_path / "cells.h5ad"
    if content is not None:
        path.write_bytes(content)
    message = refused(capsys, "prepare", path, "-o", tmp_path / "store")
    assert said in message.lower()
    assert "cells.h5ad" in message
    assert_nothing_left(tmp_path, *(["cells.h5ad"] if content is not None else []))


def test_a_truncated_file(tmp_path, capsys, cells):
    path = write(cells, tmp_path / "cells.h5ad")
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    assert "cells.h5ad" in refused(capsys, "prepare", path, "-o", tmp_path / "store")
    assert_nothing_left(tmp_path, "cells.h5ad")


def broken_value(value):
    def change(cells):
        values = dense(cells)
        values[7, 3] = value
        return values

    return change


@pytest.mark.parametrize(("change", "said"), [
    (broken_value(-1.0), "negative"),
    (broken_value(np.nan), "nan"),
    (broken_value(np.inf), "infinite"),
    (broken_value(2.5), "fraction"),
    (lambda cells: np.log1p(dense(cells) / dense(cells).sum(1, keepdims=True) * 1e4), "counts"),
    (lambda cells: np.zeros_like(dense(cells)), "no "),
])
def test_values_that_are_no_counts(tmp_path, capsys, cells, change, said):
    path = write(cells, tmp_path / "cells.h5ad", change(cells))
    message = refused(capsys, "prepare", path, "-o", tmp_path / "store")
    assert said in message.lower()
    assert_nothing_left(tmp_path, "cells.h5ad")


def test_an_output_that_exists_is_never_touched(tmp_path, capsys, cells):
    path = write(cells, tmp_path / "cells.h5ad")
    (tmp_path / "store").mkdir()
    (tmp_path / "store" / "mine.txt").write_text("mine")
    assert "exists already" in refused(capsys, "prepare", path, "-o", tmp_path / "store")
    assert (tmp_path / "store" / "mine.txt").read_text() == "mine"


@pytest.mark.parametrize(("options", "said"), [
    (["--split-by", "nonsense"], "nonsense"),
    (["--keep-obs", "nonsense"], "nonsense"),
    (["--layer", "nonsense"], "nonsense"),
    (["--genes-column", "nonsense"], "nonsense"),
    (["--split", ".5,.6,.1"], "--split"),
    (["--split", "a,b"], "--split"),
    (["--vocabulary", "nonsense.json"], "nonsense.json"),
    (["--min-genes", "1000"], "min-genes"),
])
def test_options_of_prepare_that_make_no_sense(tmp_path, capsys, cells, options, said):
    path = write(cells, tmp_path / "cells.h5ad")
    assert said in refused(capsys, "prepare", path, "-o", tmp_path / "store", *options)
    assert_nothing_left(tmp_path, "cells.h5ad")


def test_a_group_column_with_one_value(tmp_path, capsys, cells):
    cells.obs["lab"] = "ours"
    path = write(cells, tmp_path / "cells.h5ad")
    assert "lab" in refused(capsys, "prepare", path, "-o", tmp_path / "store", "--split-by", "lab")


def test_genes_that_no_vocabulary_knows(tmp_path, capsys, cells, small_store):
    cells.var_names = [f"Unheard-of-{i}" for i in range(60)]
    path = write(cells, tmp_path / "cells.h5ad")
    message = refused(capsys, "prepare", path, "-o", tmp_path / "store", "--vocabulary", small_store / "vocabulary.json")
    assert "gene" in message


@pytest.fixture
def damaged_store(small_store, tmp_path):
    shutil.copytree(small_store, tmp_path / "store")
    return tmp_path / "store"


@pytest.mark.parametrize("damage", ["flipped byte", "missing shard", "no manifest", "newer format", "no store"])
def test_damaged_stores(damaged_store, capsys, tmp_path, damage):
    if damage == "flipped byte":
        file = next(p for p in (damaged_store / "shard-00000" / "counts").rglob("*") if p.is_file() and p.name != "zarr.json")
        content = bytearray(file.read_bytes())
        content[len(content) // 2] ^= 4
        file.write_bytes(content)
    elif damage == "missing shard":
        shutil.rmtree(damaged_store / "shard-00000")
    elif damage == "no manifest":
        (damaged_store / "manifest.json").unlink()
    elif damage == "newer format":
        manifest = damaged_store / "manifest.json"
        content = json.loads(manifest.read_text())
        content = {k: (v + 1 if "format" in k and isinstance(v, int) else v) for k, v in content.items()}
        manifest.write_text(json.dumps(content))
    else:
        shutil.rmtree(damaged_store)
    small = ["--width", "16", "--heads", "2", "--layers", "1", "--steps", "30", "--batch-cells", "32"]
    for verb in (["verify", damaged_store], ["pretrain", damaged_store, "-o", tmp_path / "run", *small]):
        message = refused(capsys, *verb)
        assert "store" in message or "shard" in message
    assert not (tmp_path / "run" / "model").exists()


@pytest.mark.parametrize(("options", "said"), [
    (["--width", "100", "--heads", "8"], "--width 100 is not divisible by --heads 8"),
    (["--steps", "-3"], "--steps is -3"),
    (["--batch-cells", "0"], "--batch-cells"),
    (["--deepspeed", "nonsense.json"], "nonsense.json"),
])
def test_options_of_pretrain_that_make_no_sense(small_store, tmp_path, capsys, options, said):
    assert said in refused(capsys, "pretrain", small_store, "-o", tmp_path / "run", *options)


@pytest.mark.parametrize("arguments", [["prtrain"], ["pretrain", "store", "-o", "run", "--structure", "perceiver"],
                                       ["pretrain", "store", "-o", "run", "--wdth", "8"], ["prepare"]])
def test_unknown_words_exit_with_2(arguments, capsys):
    with pytest.raises(SystemExit) as stop:
        main(arguments)
    assert stop.value.code == 2


@pytest.mark.parametrize("verb", [["embed"], ["benchmark", "classification"]])
def test_a_directory_that_is_no_model(tmp_path, capsys, cells, verb):
    path = write(cells, tmp_path / "cells.h5ad")
    (tmp_path / "empty").mkdir()
    rest = [tmp_path / "out.h5ad"] if verb == ["embed"] else ["--label", "cell_type", "-o", tmp_path / "out"]
    assert "not a model directory" in refused(capsys, *verb, tmp_path / "empty", path, *rest)
    assert_nothing_left(tmp_path, "cells.h5ad", "empty")


def test_json_is_all_that_json_prints(tmp_path, capsys, cells):
    path = write(cells, tmp_path / "cells.h5ad")
    main(["prepare", str(path), "-o", str(tmp_path / "store"), "--json", "--workers", "1"])
    json.loads(capsys.readouterr().out)
    main(["info", str(tmp_path / "store"), "--json"])
    assert json.loads(capsys.readouterr().out)
    main(["verify", str(tmp_path / "store"), "--json"])
    json.loads(capsys.readouterr().out)


def test_the_launchers_local_rank_before_the_verb_is_understood(small_store, capsys):
    main(["--local_rank=0", "info", str(small_store)])
    assert "cells" in capsys.readouterr().out


def test_debug_shows_the_traceback(tmp_path, capsys):
    with pytest.raises(SystemExit):
        main(["info", str(tmp_path / "nothing"), "--debug"])
    assert "Traceback" in capsys.readouterr().err


def test_real_anndata_survives(tmp_path, cells):
    """The fixture itself is sound: what these tests break was whole."""
    path = write(cells, tmp_path / "cells.h5ad")
    main(["prepare", str(path), "-o", str(tmp_path / "store"), "--workers", "1"])
    assert anndata.read_h5ad(path).shape == (40, 60)


def test_output_that_nobody_reads_is_no_traceback(small_store):
    """As in `scbench info STORE | head -0`."""
    reader, writer = os.pipe()
    os.close(reader)
    command = [sys.executable, "-m", "scbench", "info", str(small_store)]
    done = subprocess.run(command, stdout=writer, stderr=subprocess.PIPE, text=True, check=False)
    os.close(writer)
    assert (done.returncode, done.stderr) == (141, "")
