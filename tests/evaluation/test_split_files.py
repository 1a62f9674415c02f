"""Split files: the same units get the same folds whatever their order, and a changed file is found out."""

import hashlib
import json

import numpy as np
import pytest

from scbench.errors import UserError
from scbench.evaluation.split_files import Split, read_split, unique_ids, unit_hash

NAMES = ["cell b", "cell a", "ü"]
FOLD = np.array([[0, 1, 2], [2, 2, 0]])


def split(**changes) -> Split:
    return Split.of("classification", "cells.h5ad", "type", "3-fold", 3, "cell", NAMES, FOLD)._replace(**changes)


def test_a_split_comes_back_from_its_file(tmp_path):
    split(dataset="zellen ß.h5ad").write(tmp_path / "split.json")
    read = read_split(tmp_path / "split.json")
    assert read == split(dataset="zellen ß.h5ad")
    assert read.repetitions == 2
    held = json.loads((tmp_path / "split.json").read_text())
    assert held["fold"][hashlib.sha256(b"cell a").hexdigest()[:16]] == [1, 2]
    assert [path.name for path in tmp_path.iterdir()] == ["split.json"]


def test_the_digest_is_of_folds_and_not_of_order_or_file_name():
    line = {name: "\t".join([unit_hash(name), *map(str, FOLD[:, i])]) for i, name in enumerate(NAMES)}
    text = "classification\ttype\t3-fold\t3\tcell\n" + "".join(f"{one}\n" for one in sorted(line.values()))
    assert split().digest == hashlib.sha256(text.encode()).hexdigest()
    turned = Split.of("classification", "other", "type", "3-fold", 3, "cell", NAMES[::-1], FOLD[:, ::-1])
    assert turned.digest == split().digest
    moved = Split.of("classification", "cells.h5ad", "type", "3-fold", 3, "cell", NAMES, FOLD[::-1])
    assert len({one.digest for one in (moved, split(), split(label="kind"), split(folds=4), split(task="x"))}) == 5


def test_folds_by_name():
    np.testing.assert_array_equal(split().folds_of(["ü", "cell b"], "f.h5ad"), [[2, 0], [0, 2]])
    with pytest.raises(UserError, match=r"no fold for 1 of 2 cells of f\.h5ad \('cell c', say\)"):
        split().folds_of(["ü", "cell c"], "f.h5ad")


def test_a_split_of_something_else_is_refused():
    split().check("classification", "type", "cell")
    for asked, word in [
        (("perturbation", "type", "cell"), "task"), (("classification", "t", "cell"), "label"),
        (("classification", "type", "group"), "unit"),
    ]:
        with pytest.raises(UserError, match=f"of {word}"):
            split().check(*asked)


@pytest.mark.parametrize(("change", "said"), [
    (lambda held: held["fold"].popitem(), "SHA-256"),
    (lambda held: held.update(label="kind"), "SHA-256"),
    (lambda held: held["fold"].update(x=[3, 0]), r"unit x has the folds \[3, 0\]"),
    (lambda held: held["fold"].update(x=[0]), "differ in repetitions"),
    (lambda held: held["fold"].update(x="0"), "unit x"),
    (lambda held: held.update(fold={}), "no units"),
    (lambda held: held.update(folds="3"), "folds is '3'"),
    (lambda held: held.update(unit="planet"), "a field"),
    (lambda held: held.pop("task"), "no split file"),
    (lambda held: held.update(format="x"), "no split file"),
])
def test_a_changed_file_is_refused(tmp_path, change, said):
    split().write(tmp_path / "split.json")
    held = json.loads((tmp_path / "split.json").read_text())
    change(held)
    (tmp_path / "split.json").write_text(json.dumps(held))
    with pytest.raises(UserError, match=said):
        read_split(tmp_path / "split.json")


def test_a_file_that_is_no_split(tmp_path):
    with pytest.raises(UserError, match="cannot be read"):
        read_split(tmp_path / "none.json")
    (tmp_path / "text").write_bytes(b"\xff\xfe no JSON")
    with pytest.raises(UserError, match="no JSON"):
        read_split(tmp_path / "text")


def test_ids_of_cells_of_one_name():
    assert unique_ids(["a", "b", "a", "a", "b"]).tolist() == ["a", "b", "a#2", "a#3", "b#2"]
    assert unique_ids(["a", "a", "a#2", "a"]).tolist() == ["a", "a#3", "a#2", "a#4"]
    with pytest.raises(ValueError, match="share a name"):
        Split.of("t", "d", "l", "p", 2, "cell", ["a", "a"], np.zeros((1, 2), int))
