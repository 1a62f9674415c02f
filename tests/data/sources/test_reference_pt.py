"""The reference's processed .pt files: every form that torch.save gives the lists, and everything that is refused."""

import os

import numpy as np
import pandas as pd
import pytest
import torch

from scbench.data.cells import to_tokens
from scbench.data.gene_identity import map_genes
from scbench.data.sources.reference_pt import ReferencePtSource
from scbench.data.vocabulary import Vocabulary
from scbench.errors import UserError

# two names that lead to one gene by the usual rules: here each id is itself
TWINS = ["ENSG00000283886.3", "ENSG00000283886"]
VOCABULARY = Vocabulary.build(["GENE0", "GENE1", "GENE2", *TWINS, *(f"ZZ{i}" for i in range(9))])
GENES = [[5, 2, 0], [1], [], [3, 1, 4]]
COUNTS = [[3, 1, 70_000], [2], [], [1, 9, 5]]
CLASSES = ["a", "b", "a", "b"]


def content(**changes) -> dict:
    values = [np.log1p(np.array(counts, dtype=np.float32)).tolist() for counts in COUNTS]
    return {"genes": GENES, "expressions": values, "cls_name": CLASSES} | changes


@pytest.fixture
def write(tmp_path):
    def save(what, **options):
        torch.save(what, tmp_path / "cells.pt", **options)
        return tmp_path / "cells.pt"

    return save


def as_read(source) -> list[dict]:
    counts = source.read(0, source.n_cells)
    ranges = zip(counts.offsets[:-1], counts.offsets[1:], strict=True)
    return [dict(zip(counts.columns[a:b].tolist(), counts.counts[a:b].tolist(), strict=True)) for a, b in ranges]


def lists_of(kind) -> dict:
    plain = content()
    return plain | {name: [kind(row) for row in plain[name]] for name in ("genes", "expressions")}


@pytest.mark.parametrize("what", [
    content(),
    lists_of(lambda row: np.array(row, dtype=np.float32)),
    lists_of(lambda row: torch.tensor(row, dtype=torch.float32)),
    lists_of(lambda row: tuple(np.float32(x) for x in row)),
    content(cls_name=np.array(CLASSES)),
    content(cls_name=np.array(CLASSES, dtype=object)),
    content(cls_name=[np.str_(name) for name in CLASSES]),
], ids=["lists", "arrays", "tensors", "numpy numbers", "names", "objects", "numpy names"])
@pytest.mark.parametrize("zipped", [True, False])
def test_every_form_of_the_lists_is_read(write, what, zipped):
    source = ReferencePtSource(write(what, _use_new_zipfile_serialization=zipped), VOCABULARY)
    assert as_read(source) == [dict(zip(g, c, strict=True)) for g, c in zip(GENES, COUNTS, strict=True)]
    assert source.obs["cls_name"].tolist() == CLASSES
    assert (source.whole, source.n_cells, source.name) == (True, 4, "cells.pt")


def test_the_names_that_numpy_1_writes_are_read(write):
    """numpy.core became numpy._core."""
    path = write(lists_of(np.array), _use_new_zipfile_serialization=False)
    old = path.read_bytes().replace(b"cnumpy._core.multiarray\n", b"cnumpy.core.multiarray\n")
    assert old != path.read_bytes()
    path.write_bytes(old)
    assert as_read(ReferencePtSource(path, VOCABULARY))[1] == {1: 2}


def test_each_id_is_its_own_token_and_parts_are_read_alike(write):
    source = ReferencePtSource(write(content()), VOCABULARY)
    gene_map = map_genes(source.identity, VOCABULARY, source.name)
    genes = sorted(set(VOCABULARY.tokens.values()) - {VOCABULARY.pad, VOCABULARY.cls, VOCABULARY.eoc})
    assert gene_map.tokens[genes].tolist() == genes
    assert gene_map.merged_columns == 0
    cells = to_tokens(source.read(1, 4), gene_map)
    assert cells.genes.tolist() == [1, 1, 3, 4]
    assert cells.counts.tolist() == [2, 9, 1, 5]
    assert cells.totals.tolist() == [2, 0, 15]


def test_values_that_are_no_log1p_of_counts_come_back_bit_by_bit(write):
    values = [np.float32([0.31, 2.7, 5.05]), np.float32([1e-6]), np.float32([]), np.float32([22.1, 0.2, 9.0])]
    source = ReferencePtSource(write(content(expressions=values)), VOCABULARY)
    assert not source.whole
    counts = source.read(0, 4).counts
    assert counts.dtype == np.float64
    np.testing.assert_array_equal(np.log1p(counts).astype(np.float32), np.concatenate(values))


def test_perturbed_genes_have_names_and_ids(write):
    what = content(single_ctrl=[2, -1, torch.tensor(0), np.int64(-1)])
    del what["cls_name"]
    source = ReferencePtSource(write(what), VOCABULARY)
    assert source.perturbed.tolist() == [2, -1, 0, -1]
    names = VOCABULARY.names
    assert source.obs["single_ctrl"].tolist() == [names[2], "control", names[0], "control"]
    assert "cls_name" not in source.obs


class Planted:
    """Asks whoever unpickles it to run a command."""

    def __init__(self, command: str):
        self.command = command

    def __reduce__(self):
        return os.system, (self.command,)


@pytest.mark.parametrize("zipped", [True, False])
def test_nothing_is_executed(write, tmp_path, zipped):
    planted = Planted(f"touch {tmp_path / 'executed'}")
    path = write(content(more=planted), _use_new_zipfile_serialization=zipped)
    with pytest.raises(UserError, match=r"asks for \S+\.system, and scbench executes no pickle: save a dict"):
        ReferencePtSource(path, VOCABULARY)
    objects = np.array([planted], dtype=object)
    with pytest.raises(UserError, match="executes no pickle"):
        ReferencePtSource(write(content(cls_name=objects), _use_new_zipfile_serialization=zipped), VOCABULARY)
    assert not (tmp_path / "executed").exists()
    assert np.ndarray not in torch.serialization.get_safe_globals(), "what is allowed here is allowed nowhere else"


def without(column: str) -> dict:
    return {name: values for name, values in content().items() if name != column}


@pytest.mark.parametrize(("what", "message"), [
    ([1, 2], "holds a list, not a dict"),
    (without("expressions"), "holds no expressions, but genes, cls_name"),
    (without("cls_name"), "holds no cls_name or single_ctrl, but genes, expressions"),
    (content(cls_name=pd.Series(CLASSES)), r"asks for pandas\S+, and scbench executes no pickle"),
    (content(cls_name="ab"), "cls_name of .* is a str, not a list"),
    (content(cls_name=np.array("ab")), "cls_name of .* is a ndarray, not a list"),
    (content(cls_name=["a", "b"]), r"differ in length \(4 of genes, 4 of expressions, 2 of cls_name\)"),
    (content(cls_name=["a", "b", {}, "c"]), "cls_name of .* holds a dict for a cell"),
    ({"genes": [], "expressions": [], "cls_name": []}, "has no cells"),
    (content(genes=[[5, 2], [1], [], [3, 1, 4]]), "cell 0 of .* has 2 genes but 3 expressions"),
    (content(genes=[[5, 2, 0], 1, [], [3, 1, 4]]), "genes of .* holds no list of numbers for cell 1"),
    (content(genes=[[5, 2, "x"], [1], [], [3, 1, 4]]), "genes of .* holds no list of numbers for cell 0"),
    (content(genes=[[5, 2, 2], [1], [], [3, 1, 4]]), "cell 0 of .* has the gene id 2 twice"),
    (content(genes=[[5, 2, 0.5], [1], [], [3, 1, 4]]), "cell 0 of .* has the gene id 0.5, which .* gives to no gene"),
    (content(genes=[[5, 2, 0], [VOCABULARY.cls], [], [3, 1, 4]]), "cell 1 of .* has the gene id 15, which .* to no gene"),
    (content(genes=[[5, 2, 0], [1], [], [3, 1, 60_000]]), "cell 3 of .* has the gene id 60000, which .* to no gene"),
    (content(expressions=[[1.0, 2.0, -0.5], [1.0], [], [1.0, 1.0, 1.0]]), r"hold negative values \(-0.5 in cell 0\)"),
    (content(expressions=[[1.0, 2.0, 1.0], [float("nan")], [], [1.0, 1.0, 1.0]]), "hold NaN"),
    (content(expressions=[[1.0, 2.0, 1.0], [1.0], [], [1.0, 900.0, 1.0]]), r"hold values over log1p.* \(900 in cell 3\)"),
    (content(single_ctrl=[-1, -1, "x", 2]), r"single_ctrl of .* is no token id a cell"),
    (content(single_ctrl=[-1, -1, 4.5, 2]), r"single_ctrl of cell 2 of .* has the gene id 4.5"),
    (content(single_ctrl=[-1, -1, -2, 2]), r"single_ctrl of cell 2 of .* has the gene id -2"),
])
def test_anything_else_is_one_sentence(write, what, message):
    with pytest.raises(UserError, match=message) as error:
        ReferencePtSource(write(what), VOCABULARY)
    assert "\n" not in str(error.value)


def test_files_of_another_kind(tmp_path):
    with pytest.raises(UserError, match=r"none\.pt cannot be read: No such file"):
        ReferencePtSource(tmp_path / "none.pt", VOCABULARY)
    for bytes_ in (b"", b"no pickle at all" * 9, b"PK\x03\x04 no zip"):
        (tmp_path / "cells.pt").write_bytes(bytes_)
        with pytest.raises(UserError, match=r"is not a file written by torch\.save, or it is damaged|executes no pickle"):
            ReferencePtSource(tmp_path / "cells.pt", VOCABULARY)
