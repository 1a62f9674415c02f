"""Missing labels, numbers as labels, small classes."""

import numpy as np
import pandas as pd
import pytest

from scbench.errors import UserError
from scbench.evaluation.labels import choose_classes, read_labels


def read(values) -> list:
    return read_labels(pd.DataFrame({"label": values}), "label", "file.h5ad").tolist()


def test_missing_labels_in_any_case_and_type():
    values = ["T", "", " ", "NA", "na", "N/a", "Unknown", "UNKNOWN", "nan", "None", "null", None, np.nan, pd.NA, " B "]
    assert read(values) == ["T", *[None] * 13, "B"]
    assert read(pd.Categorical(["T", None, "unknown"])) == ["T", None, None]
    assert read(pd.array(["T", pd.NA], dtype="string")) == ["T", None]


def test_names_that_merely_contain_a_missing_word_stay():
    assert read(["unknown T", "nanny", "NAD"]) == ["unknown T", "nanny", "NAD"]


def test_whole_numbers_are_classes_and_fractions_are_not():
    assert read([1, 2, 10]) == ["1", "2", "10"]
    assert read([1.0, np.nan, 2.0]) == ["1", None, "2"]
    assert read(pd.array([1, None], dtype="Int64")) == ["1", None]
    assert read([True, False]) == ["True", "False"]
    for values in ([0.5, 1.0], [1.0, np.inf]):
        with pytest.raises(UserError, match=r"'label' of file\.h5ad holds fractional numbers"):
            read(values)


def test_a_missing_column_names_those_there_are():
    obs = pd.DataFrame({"cell_type": [1], "donor": [2]})
    with pytest.raises(UserError, match=r"no column 'celltype' in obs: choose --label among cell_type, donor"):
        read_labels(obs, "celltype", "file.h5ad")


def test_classes_under_ten_cells_are_dropped_and_named():
    labels = np.array(["b"] * 10 + ["a"] * 9 + ["c"] * 12 + ["d"], dtype=object)
    classes = choose_classes(labels)
    assert classes.names == ["b", "c"]
    assert classes.dropped == {"a": 9, "d": 1}
    np.testing.assert_array_equal(labels[classes.keep], ["b"] * 10 + ["c"] * 12)
    np.testing.assert_array_equal(classes.codes, [0] * 10 + [1] * 12)


def test_class_numbers_are_those_of_the_sorted_names_in_any_order_of_cells():
    labels = np.array(["NK"] * 11 + ["B"] * 10 + ["T"] * 12, dtype=object)
    for seed in range(3):
        order = np.random.default_rng(seed).permutation(len(labels))
        classes = choose_classes(labels[order])
        assert classes.names == ["B", "NK", "T"]
        assert [classes.names[code] for code in classes.codes] == labels[order].tolist()
