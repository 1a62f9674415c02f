"""Which genes each source measured, in a store of two files."""

import numpy as np
import pandas as pd
import pytest

from scbench import Store, find_seen_cells, merge, prepare
from scbench.config import PrepareConfig
from scbench.data import plan
from scbench.data.measured import MEASURED_FILE, measured_tokens
from scbench.data.plan import make_plan
from scbench.data.vocabulary import Vocabulary
from scbench.errors import UserError

GENES = [f"ENSG{i:011d}" for i in range(1, 13)]


@pytest.fixture
def files(write_cells):
    """Two files of 30 cells: genes 0 to 7, and, in another order, 4 to 11 with a version."""
    counts = np.random.default_rng(0).poisson(2, (60, 8)) + np.eye(60, 8, dtype=int) + 1
    return [write_cells("b.h5ad", counts[:30], genes=GENES[:8]),
            write_cells("a.h5ad", counts[30:], genes=[f"{gene}.3" for gene in GENES[:3:-1]])]


def test_each_source_has_its_set_and_each_cell_its_number(files, tmp_path):
    store = prepare(files, tmp_path / "store", workers=1, split=".6,.2,.2")
    assert store.manifest["measured"] == [{"source": "b.h5ad", "genes": 8}, {"source": "a.h5ad", "genes": 8}]
    tokens = [store.vocabulary.tokens[gene] for gene in GENES]
    expected = np.zeros((2, store.vocabulary.size), dtype=bool)
    expected[0, tokens[:8]] = expected[1, tokens[4:]] = True
    np.testing.assert_array_equal(store.measured_genes, expected)
    for split in ("train", "validation", "test"):
        cells = store.split(split).cells(["source", "measured"])
        assert len(cells)
        assert ([store.manifest["measured"][number]["source"] for number in cells["measured"]] == cells["source"]).all()


def test_genes_outside_the_vocabulary_are_in_no_set(files, tmp_path):
    Vocabulary.build([*GENES[1:8], "ENSG00000000099"]).save(tmp_path / "vocabulary.json")
    store = prepare(files[0], tmp_path / "store", workers=1, vocabulary=tmp_path / "vocabulary.json", split="1,0,0")
    assert [store.vocabulary.names[token] for token in np.flatnonzero(store.measured_genes[0])] == GENES[1:8]
    assert np.flatnonzero(measured_tokens(np.array([3, -1, 0]), 8)[0]).tolist() == [0, 3]


def test_parts_of_an_earlier_run_serve_only_the_same_sets_and_fingerprints(files, tmp_path, monkeypatch):
    config = PrepareConfig(inputs=tuple(map(str, files)), output=tmp_path / "store")
    before = make_plan(config, 1, tmp_path / "work").fingerprint()
    assert make_plan(config, 1, tmp_path / "work").fingerprint() == before
    with monkeypatch.context() as patch:
        patch.setattr(plan, "FINGERPRINTS_FORMAT", 99)
        assert make_plan(config, 1, tmp_path / "work").fingerprint() != before
    monkeypatch.setattr(plan, "measured_tokens", lambda tokens, size, present: np.zeros((1, size), dtype=bool))
    assert make_plan(config, 1, tmp_path / "work").fingerprint() != before


def test_a_merged_store_has_the_same_sets(files, tmp_path, monkeypatch):
    monkeypatch.setattr(plan, "TASK_CELLS", 20)
    Vocabulary.build(GENES).save(tmp_path / "vocabulary.json")
    options = {"workers": 1, "vocabulary": tmp_path / "vocabulary.json", "split": "1,0,0"}
    parts = [prepare(files, tmp_path / part[0], part=part, **options) for part in ("1/2", "2/2")]
    whole = prepare(files, tmp_path / "whole", **options)
    merged = merge([part.path for part in parts], tmp_path / "merged")
    np.testing.assert_array_equal(merged.measured_genes, whole.measured_genes)
    assert merged.manifest["measured"] == whole.manifest["measured"]
    said = [store.split("train").cells().set_index("original_id")["measured"].sort_index() for store in (merged, whole)]
    pd.testing.assert_series_equal(*said)
    assert find_seen_cells(merged, files[0]).counts()["content"] == 30


def test_a_changed_file_and_an_older_store_are_one_sentence(files, tmp_path):
    store = prepare(files, tmp_path / "store", workers=1)
    path = tmp_path / "store" / MEASURED_FILE
    path.write_bytes(path.read_bytes()[:-1] + b"\xff")
    with pytest.raises(UserError, match="not what this store was made with"):
        _ = Store.open(tmp_path / "store").measured_genes
    del store.manifest["measured"]
    with pytest.raises(UserError, match="does not say which genes its sources measured"):
        _ = store.measured_genes


def test_the_column_measured_is_the_stores_own(write_cells, tmp_path):
    path = write_cells("c.h5ad", np.eye(20, 8) + 1, genes=GENES[:8], measured=["x"] * 20)
    with pytest.raises(UserError, match="column 'measured' of its own"):
        prepare(path, tmp_path / "store", keep_obs="measured", workers=1)
