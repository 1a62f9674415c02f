"""The labelled cells of a store's split."""

import numpy as np
import pandas as pd
import pytest

from scbench import prepare
from scbench.data.store import Store
from scbench.errors import UserError
from scbench.evaluation.labelled_cells import read_stored_cells


@pytest.fixture
def labelled(make_cells, tmp_path):
    """(AnnData, its store): a class of 6 cells, 9 cells without a label."""
    cells = make_cells(150)
    labels = cells.obs["cell_type"].astype(object)
    labels.iloc[:6] = "rare"
    labels.iloc[6:15] = ["", "unknown", None] * 3
    cells.obs["cell_type"] = pd.Categorical(labels)
    cells.write_h5ad(tmp_path / "cells.h5ad")
    prepare([tmp_path / "cells.h5ad"], tmp_path / "store", split=".1,.1,.8", keep_obs=("cell_type",), workers=1)
    return cells, Store.open(tmp_path / "store")


def test_each_cell_comes_with_its_own_counts_label_and_hash(labelled):
    source, store = labelled
    found = read_stored_cells(store, "test", "cell_type", 1000)
    obs = store.split("test").cells()
    by_hash = obs.set_index("content_hash").loc[found.hashes]
    names = [found.class_names[code] for code in found.classes]
    assert names == source.obs["cell_type"][by_hash["original_id"]].tolist()
    assert set(names) == {"B", "T", "NK"}
    columns = [store.vocabulary.names.index(gene) for gene in source.var_names]
    np.testing.assert_array_equal(found.counts[:, columns].toarray(), source[by_hash["original_id"]].X.toarray())
    np.testing.assert_array_equal(found.tokens.totals, source[by_hash["original_id"]].X.sum(1).A1)
    assert found.counted["total"] == len(obs) == 120
    assert found.counted["used"] == 120 - found.counted["unlabelled"] - found.counted["in_small_classes"]
    missing = obs["original_id"].isin(source.obs_names[6:15]).sum()
    rare = obs["original_id"].isin(source.obs_names[:6]).sum()
    assert (found.counted["unlabelled"], found.counted["in_small_classes"]) == (missing, rare)
    assert found.overlap == "unseen"


def test_the_first_cells_only(labelled):
    _, store = labelled
    few = read_stored_cells(store, "test", "cell_type", 70)
    assert few.counted["total"] == 70
    everyone = read_stored_cells(store, "test", "cell_type", 1000)
    np.testing.assert_array_equal(few.hashes, everyone.hashes[: len(few.hashes)])


def test_labels_that_are_not_there(labelled):
    _, store = labelled
    with pytest.raises(UserError, match="keeps no column 'donor': prepare it with --keep-obs donor"):
        read_stored_cells(store, "test", "donor", 1000)
    with pytest.raises(UserError, match="0 classes of at least 10 cells"):
        read_stored_cells(store, "validation", "cell_type", 8)
