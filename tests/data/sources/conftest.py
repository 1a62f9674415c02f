"""A SOMA collection on disk, laid out like the CELLxGENE Census: three datasets of two collections, 300 cells, 40 genes."""

from pathlib import Path

import anndata
import numpy as np
import pandas as pd
import pyarrow as pa
import pytest
import scipy.sparse as sp

CELLS, GENES = 300, 40
TISSUES = ("heart", "blood", "brain", "lung", "kidney", "intestine", "pancreas", "eye")
DATASETS = pd.DataFrame({
    "collection_id": ["papers-A", "papers-A", "papers-B"],
    "dataset_id": ["set-0", "set-1", "set-2"],
    "dataset_title": ["one", "two", "three"],
    "citation": ["Publication: A", "Publication: A", "Publication: B"],
    "dataset_total_cell_count": [100, 100, 100],
})


def census_cells() -> anndata.AnnData:
    """The cells of the three datasets, 100 each, in order.

    Dataset 2 repeats the first 20 cells of dataset 0, marked as not primary. The donor d1 is in all datasets, and each has
    unknown ones. Cells 0-4 of dataset 1 are Smart-seq2 with read counts over 65,535. In every dataset, cells 50-59 have
    glioblastoma, 60-69 influenza, and 58-61 and 70-74 were no suspension. Dataset 2 did not measure the last ten genes.
    """
    rng = np.random.default_rng(0)
    counts = rng.poisson(0.8, (CELLS, GENES)).astype(np.float32)
    counts[np.arange(CELLS), rng.integers(0, 30, CELLS)] += 1
    counts[100:105, 3] = [65_536, 70_000, 1_000_000, 16_000_000, 100_000]
    counts[200:220] = counts[:20]
    counts[200:, 30:] = 0
    counts[:20, 30:] = 0
    within = np.arange(CELLS) % 100
    obs = pd.DataFrame({
        "dataset_id": np.repeat(DATASETS["dataset_id"].to_numpy(), 100),
        "assay": np.where((np.arange(CELLS) >= 100) & (np.arange(CELLS) < 105), "Smart-seq2", "10x 3' v3"),
        "cell_type": np.array(["B cell", "T cell", "natural killer cell"])[rng.integers(0, 3, CELLS)],
        "disease": np.select([(within >= 50) & (within < 60), (within >= 60) & (within < 70)], ["glioblastoma", "influenza"],
                             "normal"),
        "donor_id": np.array(["d1", "d2", "unknown", "Pooled", "na"])[np.arange(CELLS) % 5],
        "is_primary_data": ~((np.arange(CELLS) >= 200) & (np.arange(CELLS) < 220)),
        "suspension_type": np.where(((within >= 70) & (within < 75)) | ((within >= 58) & (within < 62)), "na", "cell"),
        "tissue": "some part",
        "tissue_general": np.array(TISSUES)[np.arange(CELLS) % 8],
    }, index=[f"cell-{i}" for i in range(CELLS)])
    for column in obs.columns.drop("is_primary_data"):
        obs[column] = obs[column].astype("category")
    ids = [f"ENSG{i:011d}" for i in range(1, GENES + 1)]
    names = [f"GENE{i}" for i in range(GENES)]
    names[7] = names[8] = "TWICE"
    var = pd.DataFrame({"feature_id": ids, "feature_name": names, "feature_length": 1000}, index=ids)
    return anndata.AnnData(sp.csr_matrix(counts), obs=obs, var=var)


@pytest.fixture(scope="session")
def census(tmp_path_factory) -> tuple[Path, anndata.AnnData]:
    """The collection, written with the client's own library, and its cells; skips without the client."""
    pytest.importorskip("cellxgene_census", reason="the census client is not installed (pip install 'scbench[census]')")
    path, adata = tmp_path_factory.mktemp("census") / "collection", census_cells()
    _write(path, adata)
    return path, adata


def _write(path: Path, adata: anndata.AnnData) -> None:
    import tiledbsoma
    import tiledbsoma.io

    with tiledbsoma.Collection.create(str(path)) as census:
        data = census.add_new_collection("census_data")
        tiledbsoma.io.from_anndata(
            f"{path}/census_data/homo_sapiens", adata, measurement_name="RNA", X_layer_name="raw", uns_keys=[],
        )
        data.set("homo_sapiens", tiledbsoma.Experiment.open(f"{path}/census_data/homo_sapiens"), use_relative_uri=True)
        info = census.add_new_collection("census_info")
        _frame(info, "datasets", DATASETS)
        summary = {"census_schema_version": "2.1.0", "census_build_date": "2025-01-30", "total_cell_count": str(CELLS)}
        _frame(info, "summary", pd.DataFrame({"label": summary.keys(), "value": summary.values()}))
    measured = np.ones((len(DATASETS), GENES), dtype=bool)
    measured[2, 30:] = False
    with tiledbsoma.Measurement.open(f"{path}/census_data/homo_sapiens/ms/RNA", "w") as rna:
        presence = rna.add_new_sparse_ndarray("feature_dataset_presence_matrix", type=pa.bool_(), shape=measured.shape)
        presence.write(pa.SparseCOOTensor.from_scipy(sp.coo_matrix(measured)))


def _frame(collection, name: str, frame: pd.DataFrame) -> None:
    frame = frame.assign(soma_joinid=np.arange(len(frame)))
    schema = pa.Schema.from_pandas(frame, preserve_index=False)
    table = collection.add_new_dataframe(name, schema=schema, index_column_names=["soma_joinid"], domain=[[0, len(frame) - 1]])
    table.write(pa.Table.from_pandas(frame, schema=schema, preserve_index=False))
