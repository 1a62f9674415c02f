"""prepare from every kind of input, alone and mixed; what the manifest says of each; bad inputs, refused or left out."""

import hashlib
import json
import os
import subprocess
from pathlib import Path

import anndata
import h5py
import numpy as np
import pandas as pd
import pytest
import scipy.sparse as sp
import torch
from test_prepare import digest, random_counts
from write_sources import write_old_tenx, write_tenx, write_zarr

from scbench import Store, Vocabulary, prepare
from scbench.cli import main
from scbench.config import InputLaw, ModelConfig
from scbench.data import plan as plan_module
from scbench.data.loader import Loader
from scbench.data.merge import merge
from scbench.errors import UserError
from scbench.files import sha256
from scbench.models.model import ExpressionModel

DATA = os.environ.get("SCBENCH_TEST_DATA")
real_cells = pytest.mark.skipif(DATA is None, reason="SCBENCH_TEST_DATA is not set: no real cells")
GENES = [f"g{i}" for i in range(40)]


def contents(store):
    return {cell: hash_ for split in ("train", "validation", "test") if store.split(split).n_cells
            for cell, hash_ in store.split(split).cells(["original_id", "content_hash"]).itertuples(index=False)}


@pytest.fixture
def folder(write_cells, write_parquet, tmp_path):
    """A directory with an input of every kind, and things to ignore."""
    folder = tmp_path / "inputs"
    folder.mkdir()
    for number, name in enumerate(["cells_10", "cells_9"]):
        write_cells(f"inputs/{name}.h5ad", random_counts(20 + number, seed=number, density=0.9))
    counts = random_counts(30, seed=2, density=0.9)
    barcodes = [f"ACGT{i}" for i in range(30)]
    write_tenx(folder / "filtered_feature_bc_matrix.h5", counts, barcodes=barcodes, ids=GENES, names=GENES)
    adata = anndata.AnnData(sp.csr_matrix(random_counts(25, seed=3, density=0.9)), var=pd.DataFrame(index=GENES),
                            obs=pd.DataFrame(index=[f"z{i}" for i in range(25)]), uns={"license": "CC BY 4.0"})
    write_zarr(folder / "store.zarr", adata, 3)
    write_parquet("inputs/reference.parquet", random_counts(15, seed=4, density=0.9))
    (folder / ".hidden.h5ad").touch()
    (folder / "notes.txt").touch()
    (folder / "deeper").mkdir()
    Vocabulary.build(GENES).save(tmp_path / "vocabulary.json")
    return folder


def test_a_directory_of_every_kind(folder, tmp_path):
    vocabulary = tmp_path / "vocabulary.json"
    store = prepare(folder, tmp_path / "store", workers=1, vocabulary=vocabulary, licence="only for us")
    sources = store.manifest["sources"]
    assert [(source["name"], source["kind"], source["kept"]) for source in sources] == [
        ("cells_9.h5ad", "h5ad", 21), ("cells_10.h5ad", "h5ad", 20), ("filtered_feature_bc_matrix.h5", "10x_h5", 30),
        ("reference.parquet", "parquet", 15), ("store.zarr", "zarr", 25),
    ]
    for source in sources:
        assert source["sha256"] == sha256(folder / source["name"])
        assert source["licence"] == ("CC BY 4.0" if source["kind"] == "zarr" else "only for us")
        assert source["genes_matched"] == source["genes"] == 40 and source["counts_matched"] == source["counts"] > 0
    script = "find . -type f -printf '%P\\n' | LC_ALL=C sort | tr '\\n' '\\0' | xargs -0 sha256sum | sha256sum"
    listing = subprocess.run(script, shell=True, cwd=folder / "store.zarr", capture_output=True, text=True, check=True)
    assert listing.stdout.split()[0] == sources[-1]["sha256"]
    assert store.manifest["skipped"] == []
    again = prepare([folder / source["name"] for source in sources], tmp_path / "again", workers=2, vocabulary=vocabulary,
                    licence="only for us")
    assert digest(again) == digest(store)


def test_directories_without_inputs(tmp_path):
    (tmp_path / "sample").mkdir()
    (tmp_path / "sample" / "matrix.mtx.gz").touch()
    with pytest.raises(UserError, match=r"sample holds a matrix in text form \(matrix\.mtx\), which is not read"):
        prepare(tmp_path / "sample", tmp_path / "store")
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match=r"there is no \.h5ad, \.h5 or \.parquet file and no \.zarr store in .*empty"):
        prepare(tmp_path / "empty", tmp_path / "store")


def test_a_store_of_integers_has_the_bytes_it_had_before_there_were_fractions(tmp_path):
    rng = np.random.default_rng(0)
    for number, name in enumerate("ab"):
        counts = rng.integers(0, 4, (150, 40)) * rng.integers(1, 3 + 90_000 * number, (150, 40))
        obs = pd.DataFrame({"donor": [f"d{i % 7}" for i in range(150)]}, index=[f"{name}{i}" for i in range(150)])
        anndata.AnnData(sp.csr_matrix(counts), obs=obs, var=pd.DataFrame(index=GENES)).write_h5ad(tmp_path / f"{name}.h5ad")
    inputs = [tmp_path / "a.h5ad", tmp_path / "b.h5ad"]
    store = prepare(inputs, tmp_path / "store", workers=1, keep_obs="donor", split=".8,.1,.1")
    found = hashlib.sha256()
    for name in ("train", "validation", "test"):
        split = store.split(name)
        for number in range(len(split.extent_sizes)):
            for array in split.read_extent(number):
                found.update(f"{array.dtype}".encode() + array.tobytes())
        columns = ["source", "original_id", "content_hash", "n_genes", "total", "donor"]
        found.update(split.cells(columns).to_csv(index=False).encode())
    assert found.hexdigest() == "7cf35bfe6f81ab90cf1a7584686a7677da288dd3ed4e46eae791313ad4ecafb9"


def test_the_same_cells_in_another_format_are_duplicates(write_cells, tmp_path):
    counts = random_counts(60, density=0.9)
    file = write_cells("a.h5ad", counts)
    zarr = write_zarr(tmp_path / "a.zarr", anndata.read_h5ad(file), 2)
    tenx = write_old_tenx(tmp_path / "a.h5", counts, barcodes=[f"ACGT{i}" for i in range(60)], ids=GENES, names=GENES)
    store = prepare([file, zarr, tenx], tmp_path / "store", workers=1)
    assert [source["kept"] for source in store.manifest["sources"]] == [60, 0, 0]
    assert [source["dropped"]["duplicates"] for source in store.manifest["sources"]] == [0, 60, 60]
    (tmp_path / "copy.zarr").mkdir()
    subprocess.run(["cp", "-r", f"{zarr}/.", tmp_path / "copy.zarr"], check=True)
    with pytest.raises(UserError, match=r"a\.zarr and .*copy\.zarr are the same file"):
        prepare([zarr, tmp_path / "copy.zarr"], tmp_path / "other", workers=1)
    with pytest.raises(UserError, match=r"a\.zarr is given twice"):
        prepare([zarr, zarr], tmp_path / "other", workers=1)


def test_sources_of_different_organisms_whatever_their_kind(tmp_path):
    human, mouse = ([f"{prefix}{i:011d}" for i in range(198_700, 198_740)] for prefix in ("ENSG", "ENSMUSG"))
    counts, names = random_counts(20, density=0.9), [f"AC{i}" for i in range(20)]
    tenx = write_tenx(tmp_path / "human.h5", counts, barcodes=names, ids=human, names=human)
    adata = anndata.AnnData(sp.csr_matrix(counts), obs=pd.DataFrame(index=names), var=pd.DataFrame(index=mouse))
    zarr = write_zarr(tmp_path / "mouse.zarr", adata, 3)
    with pytest.raises(UserError, match=r"different organisms: human\.h5 \(human\), mouse\.zarr \(mouse\)"):
        prepare([tenx, zarr], tmp_path / "store", workers=1)


@pytest.mark.parametrize("option", ["keep_obs", "split_by"])
def test_a_column_of_numbers_here_and_of_text_there(option, write_cells, tmp_path):
    counts = random_counts(20, density=0.9)
    a = write_cells("a.h5ad", counts, age=np.arange(20))
    c = write_cells("c.h5ad", counts, age=[f"{i} years" for i in range(20)])
    b = write_zarr(tmp_path / "b.zarr", anndata.read_h5ad(c), 3)
    flag = "--" + option.replace("_", "-")
    with pytest.raises(UserError, match=rf"{flag} age: this column of obs holds numbers in a\.h5ad and text in b\.zarr"):
        prepare([a, b], tmp_path / "store", workers=1, **{option: "age"})
    assert not list(tmp_path.glob("*store*"))


class TestSkippedSources:
    def inputs(self, write_cells, tmp_path):
        good = []
        for i in range(2):
            donor = [f"d{i}{j % 3}" for j in range(300)]
            good.append(write_cells(f"good{i}.h5ad", random_counts(300, seed=i, density=0.9), donor=donor))
        late = random_counts(300, seed=7, density=0.9).astype(float)
        late[290, 5] = -1
        late = write_cells("late.h5ad", late, donor=["l"] * 300)
        (tmp_path / "torn.h5ad").write_bytes(good[0].read_bytes()[:5000])
        normalised = write_cells("log.h5ad", np.log1p(random_counts(50, seed=8) / 3), donor=["n"] * 50)
        return [good[0], late, tmp_path / "torn.h5ad", good[1], normalised, tmp_path / "absent.h5ad"]

    @pytest.fixture(autouse=True)
    def windows(self, monkeypatch):
        """Samples of a file that do not show its last rows."""
        from scbench.data.sources import anndata as anndata_module

        monkeypatch.setattr(anndata_module, "SAMPLE_WINDOWS", 1)
        monkeypatch.setattr(plan_module, "TASK_CELLS", 100)

    def test_the_first_ends_the_run_and_the_option_is_named(self, write_cells, tmp_path):
        paths = self.inputs(write_cells, tmp_path)
        option = "; to go on without it, give --skip-bad-sources\\.$"
        with pytest.raises(UserError, match=r"torn\.h5ad is truncated.*" + option):
            prepare(paths, tmp_path / "store", workers=1)
        with pytest.raises(UserError, match=r"X of late\.h5ad holds negative values \(-1 in cell 'late:290'\).*" + option):
            prepare(paths[:2], tmp_path / "store", workers=1)  # in the middle of the pass
        with pytest.raises(UserError, match=r"no file .*absent\.h5ad\.$"):
            prepare(paths[-1], tmp_path / "store", workers=1)
        assert not list(tmp_path.glob("*store*"))

    def test_they_are_left_out_whole_and_named(self, write_cells, tmp_path, capsys):
        paths = self.inputs(write_cells, tmp_path)
        vocabulary = Vocabulary.build(GENES)
        vocabulary.save(tmp_path / "vocabulary.json")
        options = {"vocabulary": tmp_path / "vocabulary.json", "split_by": "donor", "keep_obs": "donor"}
        store = prepare(paths, tmp_path / "store", workers=2, skip_bad_sources=True, **options)
        assert [source["name"] for source in store.manifest["sources"]] == ["good0.h5ad", "good1.h5ad"]
        skipped = {skipped["name"]: skipped for skipped in store.manifest["skipped"]}
        assert set(skipped) == {"late.h5ad", "torn.h5ad", "log.h5ad", "absent.h5ad"}
        assert "-1 in cell 'late:290'" in skipped["late.h5ad"]["reason"] and "truncated" in skipped["torn.h5ad"]["reason"]
        assert skipped["absent.h5ad"]["sha256"] is None and skipped["late.h5ad"]["sha256"] == sha256(paths[1])
        alone = prepare([paths[0], paths[3]], tmp_path / "alone", workers=1, **options)
        assert contents(store) == contents(alone) and len(contents(store)) == 600
        assert {"l", "n"}.isdisjoint(store.split("train").cells()["donor"])
        with pytest.raises(UserError, match="no input is left: "):
            prepare(paths[-2:], tmp_path / "none", workers=1, skip_bad_sources=True)
        with pytest.raises(UserError, match=r"no input is left, because all are bad: X of late\.h5ad"):
            prepare(paths[1], tmp_path / "none", workers=1, skip_bad_sources=True)
        assert not list(tmp_path.glob("*none*"))

    def test_sources_of_which_too_little_is_known(self, write_cells, tmp_path):
        Vocabulary.build([*GENES, "other0"]).save(tmp_path / "vocabulary.json")
        names = [f"other{i}" for i in range(40)]
        paths = [write_cells("a.h5ad", random_counts(20)), write_cells("b.h5ad", random_counts(20, seed=1), genes=names),
                 write_cells("c.h5ad", random_counts(20, seed=1), genes=[f"none{i}" for i in range(40)])]
        options = {"vocabulary": tmp_path / "vocabulary.json", "workers": 1}
        with pytest.raises(UserError, match=r"no gene of c\.h5ad is in the vocabulary.*skip-bad-sources\.$"):
            prepare(paths, tmp_path / "store", **options)
        with pytest.raises(UserError, match=r"% of the counts of b\.h5ad are of genes in the vocabulary.*skip-bad-sources\.$"):
            prepare(paths[:2], tmp_path / "store", **options)
        store = prepare(paths, tmp_path / "store", skip_bad_sources=True, **options)
        assert [skipped["name"] for skipped in store.manifest["skipped"]] == ["c.h5ad", "b.h5ad"]

    @pytest.mark.full
    def test_killed_and_run_again(self, write_cells, tmp_path, run_python):
        paths = [str(path) for path in self.inputs(write_cells, tmp_path)]
        settings = (
            "import os, signal\nfrom scbench.data import plan, scatter\nfrom scbench.data import prepare as module\n"
            "from scbench.data.sources import anndata\n"
            "anndata.SAMPLE_WINDOWS, plan.TASK_CELLS, plan.SHARD_CELLS = 1, 100, 150\n"
            f"paths, store = {paths!r}, {str(tmp_path / 'store')!r}\n"
        )
        script = tmp_path / "killed.py"
        script.write_text(settings + (
            "calls, original = [], module.scatter\n"
            "def dying(task):\n"
            "    calls.append(task)\n"
            "    if len(calls) == 8:\n"
            "        os.kill(os.getpid(), signal.SIGKILL)\n"
            "    return original(task)\n"
            "module.scatter = dying\n"
            "module.prepare(paths, store, workers=1, skip_bad_sources=True)\n"
        ))
        assert run_python(script).returncode == -9
        assert json.loads((tmp_path / ".prepare-store" / "runs" / "00005" / "part.json").read_text())["problem"]
        script.write_text(settings + "module.prepare(paths, store, workers=1, skip_bad_sources=True)\n"
                                     "module.prepare(paths, store + '2', workers=1, skip_bad_sources=True)\n")
        done = run_python(script)
        assert done.returncode == 0, done.stderr
        assert digest(Store.open(tmp_path / "store")) == digest(Store.open(tmp_path / "store2"))
        assert len(Store.open(tmp_path / "store").manifest["skipped"]) == 4

    def test_the_verb_says_it(self, write_cells, tmp_path, capsys):
        paths = self.inputs(write_cells, tmp_path)[2:4]
        command = ["prepare", *map(str, paths), "-o", str(tmp_path / "store"), "--workers=1"]
        with pytest.raises(SystemExit) as stop:
            main(command)
        said = capsys.readouterr().err
        assert stop.value.code == 2 and said.count("\n") == 1 and "--skip-bad-sources" in said
        main([*command, "--skip-bad-sources"])
        said = capsys.readouterr().out
        assert "left out: torn.h5ad: " in said and "300 of 300 cells kept" in said


def test_whole_and_fractional_parts_are_merged(write_cells, stored_cells, tmp_path):
    counts = random_counts(60, density=0.9)
    paths = [write_cells("a.h5ad", counts), write_cells("b.h5ad", counts + 0.25 * (counts > 0))]
    Vocabulary.build(GENES).save(tmp_path / "vocabulary.json")
    options = {"workers": 1, "fractional": "keep", "vocabulary": tmp_path / "vocabulary.json"}
    for number in (1, 2):
        prepare(paths, tmp_path / f"part{number}", part=f"{number}/2", **options)
    merged = merge([tmp_path / "part1", tmp_path / "part2"], tmp_path / "store")
    whole = prepare(paths, tmp_path / "whole", **options)
    assert contents(merged) == contents(whole)
    totals = {cell["original_id"]: cell["total"] for cell in stored_cells(merged)}
    assert totals["a:3"] == counts[3].sum() and totals["b:3"] == counts[3].sum() + 0.25 * np.count_nonzero(counts[3])
    assert {shard.counts for shard in merged.shards} == {"uint8", "float32"}
    assert [source["fractional_values"] for source in merged.manifest["sources"]] == [0, np.count_nonzero(counts)]


def test_counts_past_the_stored_dtype(write_cells, tmp_path):
    counts = random_counts(50, density=0.9).astype(np.float64)
    counts[30, 3] = 2**32  # exact in the file's float32
    with pytest.raises(UserError, match=r"X holds values over 2³²−1 such as 4\.29497e\+09 in cell 'a:30'"):
        prepare(write_cells("a.h5ad", counts), tmp_path / "store", workers=1)
    counts[30, 3:5] = 2**31
    Vocabulary.build(GENES).save(tmp_path / "vocabulary.json")
    genes = [*GENES[:4], GENES[3], *GENES[5:]]  # two columns of one gene
    path = write_cells("b.h5ad", counts, genes=genes)
    with pytest.raises(UserError, match=r"columns that name one gene sum to 4294967296 in one cell, over 2³²−1"):
        prepare(path, tmp_path / "store", vocabulary=tmp_path / "vocabulary.json", workers=1)


def test_a_vocabulary_over_65536(tmp_path):
    rng = np.random.default_rng(0)
    genes = [f"gene{i:05d}" for i in range(70_000)]
    counts = sp.random(200, 70_000, 0.002, "csr", random_state=rng, data_rvs=lambda size: rng.integers(1, 9, size))
    obs = pd.DataFrame(index=[f"c{i}" for i in range(200)])
    cells = anndata.AnnData(counts.astype(np.float32), obs=obs, var=pd.DataFrame(index=genes))
    cells.write_h5ad(tmp_path / "a.h5ad")
    store = prepare(tmp_path / "a.h5ad", tmp_path / "store", workers=1)
    assert store.manifest["genes_dtype"] == "uint32" and store.vocabulary.size > 65_536
    split = store.split("train")
    extent = split.read_extent(0)
    assert extent.genes.dtype == np.uint32 and extent.genes.max() > 65_536
    names = np.array(store.vocabulary.names, dtype=object)
    row = int(split.cells()["original_id"][0].removeprefix("c"))
    first = slice(0, extent.offsets[1])
    stored = dict(zip(names[extent.genes[first]], extent.counts[first].tolist(), strict=True))
    assert stored == dict(zip([genes[i] for i in counts[row].indices], counts[row].data.astype(int), strict=True))
    with Loader(split, store.vocabulary, InputLaw(64), seed=0, batch_cells=8, micro_batch_cells=None, mask_ratio=0.4,
                weighted_share=0.5, lanes=None) as loader:
        batch = next(loader)[0]
    assert batch.genes.max() > 65_536
    config = ModelConfig(vocabulary_size=store.vocabulary.size, width=16, layers=1, heads=2, max_genes=64)
    model = ExpressionModel(config, store.vocabulary)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
    losses = []
    for _ in range(5):
        optimizer.zero_grad()
        losses.append(model(batch).loss)
        losses[-1].backward()
        optimizer.step()
    assert losses[-1] < losses[0]


@real_cells
@pytest.mark.parametrize("kind", [
    "10x", *(pytest.param(kind, marks=pytest.mark.full) for kind in ("zarr 2", "zarr 3", "old 10x")),
])
def test_real_cells_are_the_same_from_every_kind(kind, tmp_path):
    adata = anndata.read_h5ad(Path(DATA) / "pbmc3k.h5ad")[::3].copy()
    adata.obs_names = adata.obs_names.astype(str)
    adata.write_h5ad(tmp_path / "cells.h5ad")
    named = {"barcodes": adata.obs_names, "ids": adata.var["gene_ids"], "names": adata.var_names}
    path = {
        "zarr 2": lambda: write_zarr(tmp_path / "cells.zarr", adata, 2),
        "zarr 3": lambda: write_zarr(tmp_path / "cells.zarr", adata, 3),
        "10x": lambda: write_tenx(tmp_path / "cells.h5", adata.X, **named),
        "old 10x": lambda: write_old_tenx(tmp_path / "cells.h5", adata.X, **named),
    }[kind]()
    store = prepare(tmp_path / "cells.h5ad", tmp_path / "store", workers=1)
    other = prepare(path, tmp_path / "other", workers=1)
    assert contents(store) == contents(other) and len(contents(store)) == 900
    assert store.vocabulary.fingerprint == other.vocabulary.fingerprint
    with h5py.File(tmp_path / "cells.h5ad") as file:
        assert other.manifest["sources"][0]["counts"] == int(file["X/data"][:].sum())
