"""Counts of a census that are not whole, and its licence."""

import shutil
from pathlib import Path

import numpy as np
import pytest

from scbench import prepare
from scbench.data.sources import census as census_module
from scbench.data.sources.census_client import datasets
from scbench.errors import UserError

OPTIONS = {"split": ".5,.5,0", "workers": 1}


@pytest.fixture
def fractional(census, tmp_path) -> Path:
    """A copy of the census in which two counts of cell 150, of dataset set-1, are 1.5 and 0.25."""
    import pyarrow as pa
    import tiledbsoma

    path = tmp_path / "copy"
    shutil.copytree(census[0], path)
    with tiledbsoma.open(str(path / "census_data/homo_sapiens/ms/RNA/X/raw"), "w") as counts:
        table = {"soma_dim_0": [150, 150], "soma_dim_1": [0, 1], "soma_data": pa.array([1.5, 0.25], pa.float32())}
        counts.write(pa.table(table))
    return path


def test_counts_that_are_not_whole(fractional, tmp_path, stored_cells):
    census = f"census:{fractional}"
    with pytest.raises(UserError, match=r"cell 150 of census:copy holds fractional values \(1\.5\) .* "
                                        r"--filter \"dataset_id != 'set-1'\"; if .* round or keep; .*--skip-bad-sources\.$"):
        prepare(census, tmp_path / "store", **OPTIONS)
    store = prepare(census, tmp_path / "kept", fractional="keep", **OPTIONS)
    cell = next(cell for cell in stored_cells(store) if cell["original_id"] == "150")
    assert {1.5, 0.25} <= set(cell["content"].values())
    (source,) = store.manifest["sources"]
    assert (source["kind"], source["fractional_values"], source["fractional_distance"]) == ("census", 2, 0.5)
    store = prepare(census, tmp_path / "rounded", fractional="round", **OPTIONS)
    rounded = next(cell for cell in stored_cells(store) if cell["original_id"] == "150")
    assert rounded["content"] == {gene: np.rint(count) for gene, count in cell["content"].items() if count != 0.25}
    without = prepare(census, tmp_path / "without", filter="dataset_id != 'set-1'", **OPTIONS)
    assert without.manifest["sources"][0]["fractional_values"] == 0


@pytest.mark.parametrize(("columns", "licence"), [
    ({}, None),
    ({"citation": "Publication: A curated and distributed by CZ CELLxGENE Discover in B"}, "CC BY 4.0"),
    ({"license": ["CC0 1.0", "CC BY 4.0", "CC0 1.0"]}, "CC BY 4.0, CC0 1.0"),
], ids=["nothing said", "citations of CELLxGENE", "a column"])
def test_the_licence_that_the_census_names(census, columns, licence, tmp_path, monkeypatch):
    monkeypatch.setattr(census_module, "info_of_datasets", lambda opened: datasets(opened).assign(**columns))
    store = prepare(f"census:{census[0]}", tmp_path / "store", filter="cell_type == 'B cell'", **OPTIONS)
    assert store.manifest["sources"][0]["licence"] == licence
