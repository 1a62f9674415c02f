"""Small h5ad and parquet files, and the oracle of the store tests: every stored cell as a dense row by gene name."""

import os
import subprocess
import sys
from pathlib import Path

import anndata
import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import scipy.sparse as sp

sys.path.insert(0, str(Path(__file__).parent))  # of fake_split.py


@pytest.fixture
def write_cells(tmp_path):
    """write(name, counts, **obs) -> path of an h5ad of dense `counts` [cells, genes]; genes are named g0, g1, … or `genes`."""

    def write(name: str, counts: np.ndarray, genes=None, **obs) -> Path:
        counts = np.asarray(counts)
        frame = pd.DataFrame(obs, index=[f"{name.removesuffix('.h5ad')}:{i}" for i in range(len(counts))])
        var = pd.DataFrame(index=[f"g{i}" for i in range(counts.shape[1])] if genes is None else list(genes))
        path = tmp_path / name
        anndata.AnnData(sp.csr_matrix(counts.astype(np.float32)), obs=frame, var=var).write_h5ad(path)
        return path

    return write


@pytest.fixture
def write_parquet(tmp_path):
    """write(name, counts, **obs) -> path of a parquet file of dense `counts` [cells, token ids], as the reference has it."""

    def write(name: str, counts: np.ndarray, *, genes="float", expressions="float", row_group_size=None, **obs) -> Path:
        counts = np.asarray(counts)
        ids = [np.flatnonzero(row) for row in counts]
        values = [np.log1p(row[row > 0].astype(np.float32)) for row in counts]
        columns = {
            "genes": pa.array(ids, pa.list_(pa.int64())).cast(pa.list_(pa.type_for_alias(genes))),
            "expressions": pa.array(values, pa.list_(pa.float32())).cast(pa.list_(pa.type_for_alias(expressions))),
        }
        path = tmp_path / name
        path.parent.mkdir(exist_ok=True)
        pq.write_table(pa.table(columns | obs), path, row_group_size=row_group_size)
        return path

    return write


@pytest.fixture
def stored_cells():
    """read(store) -> one record a cell in store order: split, source, id, n_genes, total, and {gene name: count}."""

    def read(store) -> list[dict]:
        names = store.vocabulary.names
        cells = []
        for name in ("train", "validation", "test"):
            split = store.split(name)
            if split.n_cells == 0:
                continue
            contents = []
            for number, size in enumerate(split.extent_sizes):
                extent = split.read_extent(number)
                assert len(extent.offsets) == size + 1
                for low, high in zip(extent.offsets[:-1], extent.offsets[1:], strict=True):
                    genes = [names[gene] for gene in extent.genes[low:high]]
                    contents.append(dict(zip(genes, extent.counts[low:high].tolist(), strict=True)))
            table = split.cells()
            assert len(table) == len(contents) == split.n_cells
            assert sum(map(len, contents)) == split.n_tokens
            for row, content in zip(table.to_dict("records"), contents, strict=True):
                cells.append({**row, "split": name, "content": content})
        return cells

    return read


@pytest.fixture
def run_python():
    """Run a script in a process of its own; returns CompletedProcess."""

    def run(script: Path, **options) -> subprocess.CompletedProcess:
        options = {"env": {**os.environ, "OMP_NUM_THREADS": "1"}, **options}
        return subprocess.run([sys.executable, script], capture_output=True, text=True, timeout=600, **options)

    return run
