"""Cells of a census on disk (conftest.py): which ones a request chooses, and what the store and its manifest hold of them."""

import hashlib
import shutil
import sys
from itertools import chain, combinations
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from scbench import prepare
from scbench.cli import main
from scbench.data import plan as plan_module
from scbench.data.sources import census as census_module
from scbench.data.sources import census_client
from scbench.data.sources.census_query import CANCERS, PRESETS, TISSUES
from scbench.data.sources.census_selection import select_cells
from scbench.errors import RetryError, UserError


@pytest.fixture
def select(census, tmp_path):
    """select(filter, presets, …) -> soma_joinids that are chosen."""

    def run(filter=None, presets=(), *, primary_only=True, umi_only=True) -> list[int]:
        selection = select_cells(str(census[0]), tmp_path, filter=filter, presets=presets, primary_only=primary_only,
                                 umi_only=umi_only)
        joinids = np.fromfile(selection.file, "<i8")
        assert selection.provenance["cells"] == len(joinids)
        assert selection.provenance["soma_joinids_sha256"] == hashlib.sha256(joinids).hexdigest()
        return joinids.tolist()

    return run


def joinids(adata, condition) -> list[int]:
    return np.flatnonzero(condition).tolist()


def test_primary_cells_of_umi_assays_by_default(select, census):
    obs = census[1].obs
    umi = obs.assay == "10x 3' v3"
    assert select() == joinids(census[1], obs.is_primary_data & umi)
    assert select(primary_only=False) == joinids(census[1], umi)
    assert select(umi_only=False) == joinids(census[1], obs.is_primary_data)
    assert select(primary_only=False, umi_only=False) == list(range(300))


def test_presets_share_no_cell_and_filters_narrow_them(select, census):
    obs = census[1].obs
    healthy = obs.is_primary_data & (obs.assay != "Smart-seq2") & (obs.suspension_type != "na") & (obs.disease == "normal")
    chosen = {preset: select(presets=[preset]) for preset in PRESETS}
    for tissue in TISSUES:
        assert chosen[tissue] == joinids(census[1], healthy & (obs.tissue_general == tissue))
    assert chosen["others"] == joinids(census[1], healthy & ~obs.tissue_general.isin(TISSUES)) != []
    assert chosen["pan-cancer"] == joinids(census[1], obs.is_primary_data & (obs.disease == "glioblastoma")) != []
    assert not any(set(a) & set(b) for a, b in combinations(chosen.values(), 2))
    assert select(presets=PRESETS) == sorted(chain.from_iterable(chosen.values()))
    both = select("cell_type == 'B cell' or cell_type == 'T cell'", ["heart", "blood"])
    wanted = healthy & obs.tissue_general.isin(["heart", "blood"]) & (obs.cell_type != "natural killer cell")
    assert both == joinids(census[1], wanted) != []


def test_genes_of_one_name_stay_apart(make, census):
    """Two of the census's genes are called TWICE; their ids tell them apart."""
    store = make()
    (source,) = store.manifest["sources"]
    assert (source["genes"], source["genes_matched"], source["merged_columns"]) == (40, 40, 0)
    assert set(census[1].var_names) <= set(store.vocabulary.tokens)


def test_cancers_that_no_cell_has_are_printed(select, capsys):
    select(presets=["pan-cancer"])
    said = capsys.readouterr().err
    assert "lung adenocarcinoma" in said and "glioblastoma" not in said
    assert len(CANCERS) == len(set(CANCERS)) == 21


@pytest.fixture
def make(census, tmp_path):
    """make(**options) -> store of the census."""
    return lambda **options: prepare(f"census:{census[0]}", tmp_path / "store", workers=1, split=".5,.5,0", **options)


def test_the_store_holds_the_counts(make, census, stored_cells, monkeypatch):
    """Every cell by gene, read counts over 65,535 too, whatever the slices."""
    adata = census[1]
    monkeypatch.setattr(census_module, "SLICE_CELLS", 37)
    monkeypatch.setattr(census_module, "OBS_CELLS", 23)
    monkeypatch.setattr(plan_module, "TASK_CELLS", 50)
    cells = stored_cells(make(include_read_counts=True))
    assert {cell["original_id"] for cell in cells} == {str(i) for i in joinids(adata, adata.obs.is_primary_data)}
    for cell in cells:
        row = adata[int(cell["original_id"])]
        values = row.X.toarray()[0]
        assert cell["content"] == {adata.var_names[i]: values[i] for i in np.flatnonzero(values)}
        kept = ["cell_type", "tissue_general", "assay", "disease", "donor_id", "dataset_id"]
        assert {name: cell[name] for name in kept} == row.obs[kept].iloc[0].to_dict()
    assert max(max(cell["content"].values()) for cell in cells) == 16_000_000


def test_papers_stay_together_by_default(make, stored_cells):
    cells = pd.DataFrame(stored_cells(make(include_duplicate_cells=True)))
    assert (cells.groupby("collection_id").split.nunique() == 1).all() and cells.split.nunique() == 2
    assert (cells.collection_id == cells.dataset_id.map({"set-0": "papers-A", "set-1": "papers-A", "set-2": "papers-B"})).all()
    assert cells.content_hash.is_unique  # the copies among them are dropped


def test_donors_are_those_of_a_dataset(make, stored_cells):
    store = make(split_by="donor")
    cells = pd.DataFrame(stored_cells(store))
    nobody = ~cells.donor_id.isin(["d1", "d2"])
    assert set(cells.donor) == {f"set-{i}{donor}" for i in range(3) for donor in ("", "/d1", "/d2")}
    assert (cells.donor[nobody] == cells.dataset_id[nobody]).all()
    assert (cells.groupby("donor").split.nunique() == 1).all() and cells.split.nunique() == 2
    assert store.manifest["options"]["split_by"] == ["donor"]


def test_what_the_manifest_says(make, census):
    store = make(filter="cell_type == 'B cell'")
    (source,) = store.manifest["sources"]
    said = source["census"]
    assert source["name"] == said["location"] == "census:collection"
    assert (said["census_build_date"], said["organism"], said["cells"]) == ("2025-01-30", "homo_sapiens", source["cells"])
    assert said["value_filter"] == "is_primary_data == True and (cell_type == 'B cell')"
    assert [dataset["dataset_id"] for dataset in said["datasets"]] == ["set-0", "set-1", "set-2"]
    assert [dataset["citation"] for dataset in said["datasets"]] == ["Publication: A", "Publication: A", "Publication: B"]
    assert sum(dataset["cells"] for dataset in said["datasets"]) == source["cells"]
    assert sum(said["assays_left_out"].values()) == sum(
        (census[1].obs.assay == "Smart-seq2") & (census[1].obs.cell_type == "B cell"))
    for file in Path(store.path).rglob("*"):
        assert file.is_dir() or str(census[0].parent).encode() not in file.read_bytes()


def test_each_dataset_has_its_own_measured_genes(census, tmp_path, write_cells, stored_cells, capsys):
    """The presence matrix, per cell; genes that a dataset did not measure are unknown there, not zero."""
    adata = census[1]
    genes = adata.var_names[[5, 3, 39]]
    path = write_cells("a.h5ad", np.full((20, 3), 2) + np.arange(20)[:, None], genes=genes, dataset_id=["mine"] * 20)
    store = prepare([path, f"census:{census[0]}"], tmp_path / "store", workers=1, split_by="dataset_id", split=".5,.5,0",
                    filter="dataset_id in ['set-2', 'set-0']")
    assert store.manifest["measured"] == [
        {"source": "a.h5ad", "genes": 3},
        {"source": "census:collection", "dataset": "set-0", "genes": 40},
        {"source": "census:collection", "dataset": "set-2", "genes": 30},
    ]
    names = np.array(store.vocabulary.names)
    expected = [set(genes), set(adata.var_names), set(adata.var_names[:30])]
    assert [set(names[row]) for row in store.measured_genes] == expected
    number = {"mine": 0, "set-0": 1, "set-2": 2}
    cells = stored_cells(store)
    assert {cell["dataset_id"] for cell in cells} == set(number)
    assert all(cell["measured"] == number[cell["dataset_id"]] for cell in cells)
    main(["info", str(tmp_path / "store")])
    assert "30 to 40 genes measured by its 2 datasets" in capsys.readouterr().out


def test_a_census_without_a_presence_matrix_measured_all_genes(census, tmp_path):
    import tiledbsoma

    shutil.copytree(census[0], tmp_path / "copy")
    with tiledbsoma.open(str(tmp_path / "copy/census_data/homo_sapiens/ms/RNA"), "d") as rna:
        del rna["feature_dataset_presence_matrix"]
    store = prepare(f"census:{tmp_path / 'copy'}", tmp_path / "store", workers=1, split=".5,.5,0")
    assert [measured["genes"] for measured in store.manifest["measured"]] == [40, 40, 40]


def test_from_the_command_line_and_beside_a_file(census, tmp_path, write_cells, capsys):
    write_cells("a.h5ad", np.eye(20, 40) * 70 + 1, genes=census[1].var_names, dataset_id=["mine"] * 20)
    main(["prepare", str(tmp_path / "a.h5ad"), f"census:{census[0]}", "--preset", "heart", "blood",
          "--split-by", "dataset_id", "-o", str(tmp_path / "store"), "--workers", "1"])
    assert "census:collection: 51 of 51 cells kept" in capsys.readouterr().out
    with pytest.raises(UserError, match=r"split by collection_id, which obs of a\.h5ad lacks"):
        prepare([tmp_path / "a.h5ad", f"census:{census[0]}"], tmp_path / "other", workers=1)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.h5ad", "store"]


@pytest.mark.parametrize(("options", "said"), [
    ({"filter": "cell_type =="}, "is no filter"),
    ({"filter": "cell_type == 'B cell') or (tissue == 'x'"}, "is no filter"),
    ({"filter": "nonsense == 3"}, "does not take the filter .*nonsense"),
    ({"filter": "import os"}, "is no filter"),
    ({"filter": "cell_type == 'unicorn'"}, "no cell of census:collection matches"),
    ({"filter": "assay == 'Smart-seq2'"}, "not known to count molecules .Smart-seq2.: take them with --include-read-counts"),
    ({"filter": "dataset_id == 'set-0'"}, "nothing to split by"),
    ({"keep_obs": "nonsense"}, "no such column"),
    ({"genes_column": "x"}, "--genes-column is about h5ad files"),
])
def test_refused_requests(make, tmp_path, options, said):
    with pytest.raises(UserError, match=said) as refused:
        make(**options)
    assert str(refused.value).endswith(".") and "\n" not in str(refused.value)
    assert not list(tmp_path.iterdir())


def test_refused_inputs(census, tmp_path, write_cells):
    genes = [f"ENSMUSG{i:011d}" for i in range(40)]
    mouse = write_cells("mouse.h5ad", np.ones((5, 40)), genes=genes, collection_id=["c"] * 5)
    for inputs, options, said in [
        ([f"census:{census[0]}", "census:"], {}, "two inputs are a census"),
        ([f"census:{tmp_path / 'none'}"], {}, "there is no census"),
        ([mouse, f"census:{census[0]}"], {}, r"different organisms: mouse\.h5ad \(mouse\), census:collection \(human\)"),
        ([mouse], {"filter": "x == 1"}, "--filter is about a census, and no input is one"),
    ]:
        with pytest.raises(UserError, match=said):
            prepare(inputs, tmp_path / "store", workers=1, **options)
    assert [path.name for path in tmp_path.iterdir()] == ["mouse.h5ad"]


def test_what_the_client_says_becomes_one_sentence(census, monkeypatch, tmp_path):
    import cellxgene_census
    import requests

    monkeypatch.setattr(cellxgene_census, "get_census_version_description", lambda _: {})
    for error, kind, said in [
        (requests.exceptions.ConnectionError("Max retries exceeded"), RetryError, "cannot be reached"),
        (ValueError("Unsupported SOMA object encoding version 9"), UserError, "client is too old .* pip install -U"),
        (ValueError('The "2020-01-01" Census version is not valid.'), UserError, "there is no census 2020-01-01"),
    ]:
        def failing(error=error, **_):
            raise error

        monkeypatch.setattr(cellxgene_census, "open_soma", failing)
        census_client.open_census.cache_clear()
        with pytest.raises(kind, match=said):
            prepare("census:2020-01-01", tmp_path / "store", workers=1)
    monkeypatch.setattr(cellxgene_census, "__version__", "1.9.1")
    with pytest.raises(UserError, match=r"cellxgene-census 1\.9\.1 is too old, 1\.17 is needed: pip install -U"):
        prepare("census:", tmp_path / "store", workers=1)
    monkeypatch.setitem(sys.modules, "cellxgene_census", None)
    with pytest.raises(UserError, match=r"pip install 'scbench\[census\]'"):
        prepare("census:", tmp_path / "store", workers=1)
    assert not list(tmp_path.iterdir())


def test_stable_is_pinned_to_the_release_that_it_means(census, tmp_path, monkeypatch):
    import cellxgene_census

    opened, asked = cellxgene_census.open_soma, []

    def open_release(*, census_version, context):
        asked.append(census_version)
        return opened(uri=str(census[0]), context=context)

    def describe(version):
        return {"release_build": "2031-01-30", "flags": {"lts": version == "2031-01-30"}}

    monkeypatch.setattr(cellxgene_census, "open_soma", open_release)
    monkeypatch.setattr(cellxgene_census, "get_census_version_description", describe)
    census_client.open_census.cache_clear()
    store = prepare("census:stable", tmp_path / "store", workers=1, split=".5,.5,0")
    (source,) = store.manifest["sources"]
    assert source["name"] == "census:2031-01-30"
    assert (source["census"]["location"], source["census"]["long_term_support"]) == ("2031-01-30", True)
    assert set(asked) == {"2031-01-30"}
    census_client.open_census.cache_clear()


def test_counts_past_uint32(census, tmp_path):
    import pyarrow as pa
    import tiledbsoma

    shutil.copytree(census[0], tmp_path / "copy")
    with tiledbsoma.open(str(tmp_path / "copy/census_data/homo_sapiens/ms/RNA/X/raw"), "w") as counts:
        counts.write(pa.table({"soma_dim_0": [150], "soma_dim_1": [0], "soma_data": pa.array([5e9], pa.float32())}))
    with pytest.raises(UserError, match="cell 150 of census:copy holds values over 2³²−1"):
        prepare(f"census:{tmp_path / 'copy'}", tmp_path / "store", split=".5,.5,0", workers=1)
    assert [path.name for path in tmp_path.iterdir()] == ["copy"]


def test_a_bad_dataset_is_left_out_whole(census, tmp_path, stored_cells, monkeypatch, capsys):
    """As if it had been filtered out: its first cells, which were read before the bad one, and what copies of it do."""
    import pyarrow as pa
    import tiledbsoma

    monkeypatch.setattr(plan_module, "TASK_CELLS", 32)
    shutil.copytree(census[0], tmp_path / "copy")
    with tiledbsoma.open(str(tmp_path / "copy/census_data/homo_sapiens/ms/RNA/X/raw"), "w") as counts:
        counts.write(pa.table({"soma_dim_0": [80], "soma_dim_1": [0], "soma_data": pa.array([0.25], pa.float32())}))
    options = {"split": ".5,.5,0", "workers": 1, "include_duplicate_cells": True}
    where = f"census:{tmp_path / 'copy'}"
    with pytest.raises(UserError, match=r"cell 80 of census:copy .*\(0\.25\).*dataset_id != 'set-0'.*--skip-bad-sources"):
        prepare(where, tmp_path / "store", **options)
    store = prepare(where, tmp_path / "store", skip_bad_sources=True, **options)
    expected = prepare(where, tmp_path / "expected", filter="dataset_id != 'set-0'", **options)

    def cells(of):
        return [{name: value for name, value in cell.items() if name != "measured"} for cell in stored_cells(of)]

    assert cells(store) == cells(expected)
    assert {str(joinid) for joinid in range(200, 220)} <= {cell["original_id"] for cell in cells(store)}
    source, other = store.manifest["sources"][0], expected.manifest["sources"][0]
    assert source["dropped"] == {"bad_datasets": 100, "below_min_genes": 0, "duplicates": 0}
    for name in ("kept", "counts", "counts_matched", "inexact_counts", "fractional_values"):
        assert source[name] == other[name], name
    (skipped,) = store.manifest["skipped"]
    assert skipped["name"] == "census:copy, dataset set-0" and "cell 80" in skipped["reason"]
    # and if no dataset is left
    alone = {**options, "split": "1,0,0", "filter": "dataset_id == 'set-0'"}
    with pytest.raises(UserError, match=r"no input is left, .*: all datasets of census:copy are bad: cell 80"):
        prepare(where, tmp_path / "none", skip_bad_sources=True, **alone)
    command = ["prepare", where, "-o", str(tmp_path / "again"), "--skip-bad-sources", "--split", ".5,.5,0", "--workers", "1"]
    main(command)
    assert "left out: census:copy, dataset set-0" in capsys.readouterr().out
