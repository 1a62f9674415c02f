"""10x Genomics HDF5 files: both layouts, other feature types, several genomes, damage."""

import h5py
import numpy as np
import pytest
from write_sources import write_old_tenx, write_tenx

from scbench.data.sources.anndata import AnnDataSource
from scbench.data.sources.inputs import SourceOptions, open_obs
from scbench.errors import UserError

HUMAN = ["ENSG00000198804", "ENSG00000198712", "ENSG00000198727", "ENSG00000198786", "ENSG00000212907"]
NAMES = ["MT-CO1", "MT-CO2", "MT-CYB", "MT-ND5", "MT-ND4L"]
MOUSE = ["ENSMUSG00000064351", "ENSMUSG00000064354"]
CELLS = 30


@pytest.fixture
def counts():
    return np.random.default_rng(0).poisson(1.0, (CELLS, 5))


def barcodes(n=CELLS):
    return [f"AAACCTGAGAAACC{'ACGT'[i % 4]}{'ACGT'[i // 4 % 4]}-{1 + i // 16}" for i in range(n)]


def dense(source, step=7):
    result = np.zeros((source.n_cells, len(source.identity.ids)), dtype=np.int64)
    for start in range(0, source.n_cells, step):
        read = source.read(start, min(start + step, source.n_cells))
        rows = np.repeat(np.arange(start, start + len(read.offsets) - 1), np.diff(read.offsets))
        np.add.at(result, (rows, read.columns), read.counts)
    return result


@pytest.mark.parametrize("write", [write_tenx, write_old_tenx])
def test_the_counts_of_both_layouts(write, counts, tmp_path):
    path = write(tmp_path / "filtered.h5", counts, barcodes=barcodes(), ids=HUMAN, names=NAMES)
    with AnnDataSource(path, layer="counts", genes_column="nothing") as source:  # which are about AnnData
        assert (source.kind, source.name, source.layer, source.n_cells) == ("10x_h5", "filtered.h5", "X", CELLS)
        assert source.identity.ids == HUMAN and source.identity.symbols == NAMES and source.identity.organism == "human"
        assert source.obs_names.tolist() == barcodes() and source.obs.shape == (CELLS, 0) and source.licence is None
        np.testing.assert_array_equal(dense(source), counts)
    obs = open_obs(SourceOptions(
        path=path, layer=None, genes_column=None, recover_counts=False, fractional="refuse", vocabulary=None,
    ))
    assert obs.columns == [] and obs.names(3, 5).to_pylist() == barcodes()[3:5]
    obs.close()


def test_only_gene_expression_counts(counts, tmp_path):
    types = ["Gene Expression", "Antibody Capture", "Gene Expression", "CRISPR Guide Capture", "Gene Expression"]
    path = write_tenx(tmp_path / "a.h5", counts, barcodes=barcodes(), ids=[HUMAN[0], "CD3", HUMAN[2], "guide", HUMAN[4]],
                      names=NAMES, types=types)
    with AnnDataSource(path) as source:
        assert source.identity.ids == HUMAN[::2]
        np.testing.assert_array_equal(dense(source), counts[:, ::2])
    path = write_tenx(tmp_path / "b.h5", counts, barcodes=barcodes(), ids=HUMAN, names=NAMES, types=["Antibody Capture"] * 5)
    with pytest.raises(UserError, match=r"b\.h5 has no features of the type Gene Expression, only Antibody Capture"):
        AnnDataSource(path)


def test_several_genomes(counts, tmp_path):
    ids = [f"GRCh38_{gene}" for gene in HUMAN[:3]] + [f"mm10_{gene}" for gene in MOUSE]
    path = write_tenx(tmp_path / "a.h5", counts, barcodes=barcodes(), ids=ids, names=ids,
                      genomes=["GRCh38"] * 3 + ["mm10"] * 2)
    with pytest.raises(UserError, match=r"a\.h5 holds counts of several genomes \(GRCh38, mm10\)"):
        AnnDataSource(path)
    path = write_old_tenx(tmp_path / "b.h5", counts, barcodes=barcodes(), ids=HUMAN, names=NAMES, genomes=("hg19", "mm10"))
    with pytest.raises(UserError, match=r"b\.h5 holds counts of several genomes \(hg19, mm10\)"):
        AnnDataSource(path)
    ids = [f"GRCh38_{gene}" for gene in HUMAN[:3]] + ["virus_gene1", "virus_gene2"]  # cells of one organism
    path = write_tenx(tmp_path / "c.h5", counts, barcodes=barcodes(), ids=ids, names=ids,
                      genomes=["GRCh38"] * 3 + ["virus"] * 2)
    with AnnDataSource(path) as source:
        assert source.identity.ids == [*HUMAN[:3], None, None] and source.identity.organism == "human"
        np.testing.assert_array_equal(dense(source), counts)


def test_damage_and_what_is_no_such_file(counts, tmp_path):
    path = write_tenx(tmp_path / "a.h5", counts, barcodes=barcodes(), ids=HUMAN, names=NAMES)
    with h5py.File(path, "r+") as file:
        file["matrix/indices"][5] = 99
    with pytest.raises(UserError, match=r"a\.h5 .*names a gene that does not exist"), AnnDataSource(path) as source:
        source.read(0, CELLS)
    with h5py.File(path, "r+") as file:
        del file["matrix/features"]
    with pytest.raises(UserError, match=r"a\.h5 is damaged or not a 10x Genomics file"):
        AnnDataSource(path)
    with h5py.File(tmp_path / "b.h5", "w") as file:
        file["molecules"] = [1]
    with pytest.raises(UserError, match=r"b\.h5 is an HDF5 file but not an h5ad file: it has no obs and no var"):
        AnnDataSource(tmp_path / "b.h5")
    path = write_tenx(tmp_path / "c.h5", counts[:0], barcodes=[], ids=HUMAN, names=NAMES)
    with pytest.raises(UserError, match=r"c\.h5 has no cells"):
        AnnDataSource(path)
