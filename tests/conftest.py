"""Cells and stores that many tests share, and the way to run the command line as a user does."""

import os
import subprocess
import sys
from pathlib import Path

import anndata
import numpy as np
import pandas as pd
import pytest
import scipy.sparse as sp
import torch


def synthetic_cells(n_cells: int = 300, n_genes: int = 120, seed: int = 0) -> anndata.AnnData:
    """Raw counts of three cell types with marker genes, depth varying fivefold; 10 to 100 expressed genes a cell."""
    rng = np.random.default_rng(seed)
    kinds = rng.integers(0, 3, n_cells)
    rates = rng.gamma(0.5, 1.0, n_genes) * np.ones((3, 1))
    for kind in range(3):
        rates[kind, kind * 20 : kind * 20 + 20] *= 6
    depth = rng.uniform(0.4, 2.0, n_cells)
    counts = rng.poisson(rates[kinds] * depth[:, None])
    obs = pd.DataFrame(
        {"cell_type": np.array(["B", "T", "NK"])[kinds], "donor": [f"d{i % 6}" for i in range(n_cells)]},
        index=[f"cell-{seed}-{i}" for i in range(n_cells)],
    )
    var = pd.DataFrame(index=[f"ENSG{i:011d}" for i in range(1, n_genes + 1)])
    return anndata.AnnData(sp.csr_matrix(counts.astype(np.float32)), obs=obs, var=var)


@pytest.fixture(scope="session")
def make_cells():
    """The function above, for tests that need cells of their own."""
    return synthetic_cells


@pytest.fixture(scope="session")
def cells_file(tmp_path_factory) -> Path:
    """An h5ad of 300 synthetic cells."""
    path = tmp_path_factory.mktemp("cells") / "cells.h5ad"
    synthetic_cells().write_h5ad(path)
    return path


@pytest.fixture(scope="session")
def small_store(cells_file, tmp_path_factory) -> Path:
    """A store of those cells: 210 to train, 30 to validate, 60 to test."""
    from scbench import prepare

    path = tmp_path_factory.mktemp("stores") / "store"
    prepare([cells_file], path, split=".7,.1,.2", workers=1)
    return path


@pytest.fixture(scope="session", autouse=True)
def right_bf16():
    """Triton's interpreter (3.7.1) holds bf16 as integers: a cast from fp32 cuts off where GPUs round to the nearest even, and
    tl.dot multiplies the integers. Here it rounds, and multiplies in fp32, so that kernels can be tested in bf16 too."""
    if os.environ.get("TRITON_INTERPRET") != "1":
        yield
        return
    import triton.language as tl
    from triton.runtime import interpreter

    convert, dot = interpreter._convert_float, interpreter.InterpreterBuilder.create_dot

    def rounding(x, source, target, mode):
        if (source, target) != (tl.float32, tl.bfloat16):
            return convert(x, source, target, mode)
        rounded = torch.from_numpy(np.ascontiguousarray(x)).bfloat16()
        return rounded.view(torch.int16).numpy().view(np.uint16).reshape(x.shape)

    def fp32_dot(self, a, b, *rest):
        return dot(self, *(self.cast_impl(x, tl.float32) if x.dtype.scalar == tl.bfloat16 else x for x in (a, b)), *rest)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(interpreter, "_convert_float", rounding)
        patch.setattr(interpreter.InterpreterBuilder, "create_dot", fp32_dot)
        yield


@pytest.fixture(scope="session")
def scbench_command():
    """Run `scbench …` in a process of its own; returns CompletedProcess."""

    def run(*arguments, **options) -> subprocess.CompletedProcess:
        command = [sys.executable, "-m", "scbench", *map(str, arguments)]
        environment = {**os.environ, "OMP_NUM_THREADS": "1", **options.pop("env", {})}
        return subprocess.run(command, capture_output=True, text=True, timeout=300, env=environment, **options)

    return run
