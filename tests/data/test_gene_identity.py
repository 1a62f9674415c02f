"""Who each gene is, and which token it gets."""

import os
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from scbench.data.gene_identity import check_matched, check_organisms, gene_keys, identify, map_genes
from scbench.data.gene_table import gene_table
from scbench.data.sources.anndata import AnnDataSource
from scbench.data.vocabulary import Vocabulary
from scbench.errors import UserError

TP53, RACK1, PTPRC = "ENSG00000141510", "ENSG00000204628", "ENSG00000081237"
DATA = os.environ.get("SCBENCH_TEST_DATA")
real_cells = pytest.mark.skipif(DATA is None, reason="SCBENCH_TEST_DATA is not set: no real cells to test on")


def identity(names, genes_column=None, **columns):
    return identify(names, pd.DataFrame(columns, index=list(names)), genes_column, "a.h5ad")


def mapped(found, *tokens):
    """The token names that genes get in a vocabulary of `tokens`."""
    vocabulary = Vocabulary.build(tokens)
    return [vocabulary.names[token] if token >= 0 else None for token in map_genes(found, vocabulary, "a.h5ad").tokens]


# --- identify --------------------------------------------------------------------------------------------------------


def test_ids_in_names_and_symbols_in_a_column():
    found = identity([f"{TP53}.17", RACK1], feature_name=["TP53", "RACK1"])
    assert found == ([TP53, RACK1], ["TP53", "RACK1"], "human")


def test_symbols_in_names_and_ids_in_a_column_of_any_case():
    found = identity(["TP53", "odd"], Gene_IDs=[TP53, None])
    assert found == ([TP53, None], ["TP53", "odd"], "human")


def test_mixed_names_are_told_apart_gene_by_gene():
    found = identity([TP53, "RACK1", "RP11-34P13.7", "ENSG123"])
    assert found.ids == [TP53, None, None, None]
    assert found.symbols == [None, "RACK1", "RP11-34P13.7", "ENSG123"]


def test_versions_go_from_ensembl_ids_alone():
    found = identity([f"{TP53}.3", "ENSMUSG00000059552.4", "RP11-34P13.7", "AC093655.1", "ENSRNOG00000010756.1"])
    assert found.ids == [TP53, "ENSMUSG00000059552", None, None, None]
    assert found.symbols[2:] == ["RP11-34P13.7", "AC093655.1", "ENSRNOG00000010756.1"]


def test_categorical_and_missing_columns():
    found = identity(["0", "1", "2"], feature_id=pd.Categorical([TP53, np.nan, RACK1]), symbol=["TP53", np.nan, ""])
    assert found.ids == [TP53, None, RACK1]
    assert found.symbols == ["TP53", "1", "2"]


def test_genes_column_overrides_everything():
    found = identity([TP53, RACK1], genes_column="mine", gene_name=["A", "B"], mine=["PTPRC", f"{TP53}.1"])
    assert found == ([None, TP53], ["PTPRC", None], "human")


def test_a_missing_genes_column_names_those_that_exist():
    with pytest.raises(UserError, match=r"a\.h5ad has no column 'gene' in var \(it has 'x', 'y'\)"):
        identity(["A"], genes_column="gene", x=[1], y=[2])
    with pytest.raises(UserError, match="it has none"):
        identity(["A"], genes_column="gene")


@pytest.mark.parametrize(
    ("names", "organism"),
    [
        (["TP53", "RACK1"], "human"),
        (["Trp53", "Rack1", "Gm26206"], "mouse"),
        (["ENSMUSG00000059552"], "mouse"),
        (["gene_1", "gene_2"], "unknown"),
        (["TP53", "Trp53"], "unknown"),
    ],
)
def test_organism(names, organism):
    assert identity(names).organism == organism


# --- keys of a new vocabulary ----------------------------------------------------------------------------------------


def test_keys_are_ids_wherever_one_is_known():
    found = identity([TP53, "RACK1", "GNB2L1", "Y_RNA", "my transgene"])
    assert gene_keys(found) == [TP53, RACK1, RACK1, "Y_RNA", "my transgene"]


def test_keys_follow_retired_ids():
    assert gene_keys(identity(["ENSG00000112096"])) == gene_keys(identity(["SOD2"]))


def test_keys_of_mouse_genes():
    assert gene_keys(identity(["Trp53", "Gm26206"]))[0] == "ENSMUSG00000059552"


# --- onto a vocabulary -----------------------------------------------------------------------------------------------


def test_exact_names_come_first():
    assert mapped(identity([TP53, "TP53"]), TP53, "TP53") == [TP53, "TP53"]
    # the current symbol exists as a token, but so does the previous one
    assert mapped(identity(["GNB2L1", "RACK1"]), "GNB2L1", "RACK1") == ["GNB2L1", "RACK1"]


def test_ids_and_symbols_lead_to_each_other():
    assert mapped(identity([TP53, f"{RACK1}.4"]), "TP53", "RACK1") == ["TP53", "RACK1"]
    assert mapped(identity(["TP53", "RACK1"]), TP53, f"{RACK1}.9") == [TP53, f"{RACK1}.9"]


def test_previous_symbols_lead_to_current_ones_and_back():
    assert mapped(identity(["GNB2L1", "TP53"]), "RACK1", "TP53") == ["RACK1", "TP53"]
    assert mapped(identity(["GNB2L1"]), RACK1) == [RACK1]
    assert mapped(identity(["RACK1"]), "GNB2L1") == ["GNB2L1"]
    assert mapped(identity([RACK1]), "GNB2L1") == ["GNB2L1"]


def test_retired_ids_lead_to_their_successors_and_back():
    current = gene_table("human").owners["SOD2"]
    assert mapped(identity(["ENSG00000112096"]), current) == [current]
    assert mapped(identity([current]), "ENSG00000112096") == ["ENSG00000112096"]


def test_suffixed_tokens_keep_genes_apart():
    found = identity(["ENSG00000272655", "ENSG00000285437"], gene_name=["POLR2J4", "POLR2J4"])
    assert mapped(found, "POLR2J4", "POLR2J4_ENSG00000272655") == ["POLR2J4_ENSG00000272655", "POLR2J4"]


def test_genes_of_one_shared_symbol_share_its_token():
    table = gene_table("human")
    ids = [id_ for id_, symbol in table.symbols.items() if symbol == "Y_RNA"][:3]
    assert mapped(identity(ids), "Y_RNA", "TP53") == ["Y_RNA"] * 3


def test_case_is_never_folded_and_clone_versions_stay():
    assert mapped(identity(["tp53", "RP11-34P13", "RACK1"]), "TP53", "RP11-34P13.7", "RACK1") == [None, None, "RACK1"]


def test_specials_are_no_genes():
    assert mapped(identity(["<cls>", "<pad>", "TP53"]), "TP53") == [None, None, "TP53"]


def test_what_a_map_reports():
    found = identity(["TP53", "TP53", TP53, "GNB2L1", "nonsense"])
    vocabulary = Vocabulary.build(["TP53", "RACK1"])
    result = map_genes(found, vocabulary, "a.h5ad")
    assert result.tokens.dtype == np.int64
    assert (result.n_genes, result.matched_genes, result.table_genes, result.merged_columns) == (5, 4, 2, 2)
    assert (result.organism, result.vocabulary_organism, result.unmatched) == ("human", "human", ("nonsense",))


# --- what can be wrong -----------------------------------------------------------------------------------------------


def test_no_gene_matches():
    with pytest.raises(UserError, match=r"no gene of a\.h5ad is in the vocabulary: .*mouse genes .*human genes"):
        mapped(identity(["ENSMUSG00000059552"]), "TP53")
    with pytest.raises(UserError, match=r"'gene_1', 'gene_2', which are neither Ensembl ids nor known .*--genes-column"):
        mapped(identity(["gene_1", "gene_2"]), "TP53")
    with pytest.raises(UserError, match="the vocabulary lacks genes like 'PTPRC'"):
        mapped(identity(["PTPRC"]), "TP53")


def test_half_of_the_counts_must_match():
    result = map_genes(identity(["TP53", "PTPRC"]), Vocabulary.build(["TP53"]), "a.h5ad")
    check_matched(result, 50, 100)
    check_matched(result, 0, 0)
    with pytest.raises(UserError, match=r"only 49\.0% of the counts of a\.h5ad .*1 of 2 genes.*'PTPRC'"):
        check_matched(result, 49, 100)


def test_organisms_do_not_mix():
    check_organisms({"a": "human", "b": "unknown", "c": "human"})
    with pytest.raises(UserError, match=r"a \(human\), b \(mouse\)"):
        check_organisms({"a": "human", "b": "mouse"})


# --- real cells ------------------------------------------------------------------------------------------------------


def column_sums(source):
    counts = source.read(0, source.n_cells)
    return np.bincount(counts.columns, weights=counts.counts, minlength=len(source.identity.ids))


@real_cells
def test_real_files_fit_the_reference_vocabulary():
    vocabulary = Vocabulary.load(Path(DATA) / "vocabulary_60697.json")
    assert (len(vocabulary), vocabulary.pad, vocabulary.cls, vocabulary.eoc) == (60697, 60694, 60695, 60696)
    for name in ("heart_san", "pbmc3k", "gbm_panobinostat_300g", "schraivogel_tapseq_72g"):
        with AnnDataSource(Path(DATA) / f"{name}.h5ad") as source:
            sums = column_sums(source)
            matched = sums[map_genes(source.identity, vocabulary, name).tokens >= 0].sum() / sums.sum()
            assert matched > 0.99, name


@real_cells
def test_real_mouse_cells_are_recognised():
    vocabulary = Vocabulary.load(Path(DATA) / "vocabulary_60697.json")
    with AnnDataSource(Path(DATA) / "mouse_pancreas.h5ad") as source:
        sums = column_sums(source)
        gene_map = map_genes(source.identity, vocabulary, source.name)
    with pytest.raises(UserError, match="its genes are mouse genes and the vocabulary's are human genes"):
        check_matched(gene_map, int(sums[gene_map.tokens >= 0].sum()), int(sums.sum()))


@real_cells
def test_real_files_joined_by_key_agree_on_their_shared_genes():
    with AnnDataSource(Path(DATA) / "pbmc3k.h5ad") as pbmc, AnnDataSource(Path(DATA) / "heart_san.h5ad") as heart:
        sources = [pbmc, heart]
        vocabulary = Vocabulary.build(key for source in sources for key in gene_keys(source.identity))
        tokens, by_id, by_symbol = [], [], []
        for source in sources:
            expressed = column_sums(source) > 0
            gene_map = map_genes(source.identity, vocabulary, source.name)
            assert gene_map.matched_genes == gene_map.n_genes
            tokens.append(set(gene_map.tokens[expressed].tolist()))
            named = [(i, s) for i, s, e in zip(*source.identity[:2], expressed, strict=True) if e]
            by_id.append({i: t for (i, _), t in zip(named, gene_map.tokens[expressed], strict=True)})
            by_symbol.append({s for _, s in named})
    shared_ids = by_id[0].keys() & by_id[1].keys()
    assert all(by_id[0][id_] == by_id[1][id_] for id_ in shared_ids)
    # by symbol alone, thousands of genes that both express would be two tokens
    assert len(tokens[0] & tokens[1]) >= len(shared_ids) > len(by_symbol[0] & by_symbol[1]) + 2000
