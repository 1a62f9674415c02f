"""The shipped gene table: facts anyone can look up, and the invariants its users rely on."""

import pytest

from scbench.data.gene_table import PREFIXES, gene_table


@pytest.mark.parametrize(
    ("organism", "id_", "symbol"),
    [
        ("human", "ENSG00000141510", "TP53"),
        ("human", "ENSG00000081237", "PTPRC"),
        ("human", "ENSG00000204628", "RACK1"),
        ("human", "ENSG00000145416", "MARCHF1"),
        ("mouse", "ENSMUSG00000059552", "Trp53"),
        ("mouse", "ENSMUSG00000026395", "Ptprc"),
    ],
)
def test_known_genes(organism, id_, symbol):
    table = gene_table(organism)
    assert table.symbols[id_] == symbol
    assert table.find(symbol) == id_
    assert table.canonical(id_, None) == table.canonical(None, symbol) == id_


def test_previous_symbols_lead_to_current_genes():
    table = gene_table("human")
    for previous, current in {"GNB2L1": "RACK1", "MARCH1": "MARCHF1", "SEPT7": "SEPTIN7", "H3F3B": "H3-3B"}.items():
        assert table.find(previous) == table.owners[current]


def test_a_retired_id_leads_to_its_successor_whatever_the_source_calls_it():
    table = gene_table("human")
    assert "ENSG00000112096" in table.retired
    assert table.canonical("ENSG00000112096", None) == table.canonical("ENSG00000112096", "X") == table.owners["SOD2"]


def test_an_unknown_id_follows_the_symbol_of_its_source():
    table = gene_table("human")
    assert table.canonical("ENSG99999999999", "TP53") == "ENSG00000141510"
    assert table.canonical("ENSG99999999999", "no gene") == "ENSG99999999999"
    assert table.canonical("ENSG99999999999", None) == "ENSG99999999999"
    assert table.canonical(None, "no gene") is None
    assert table.canonical(None, None) is None


def test_a_symbol_of_several_genes_means_none():
    table = gene_table("human")
    assert "Y_RNA" in table.names
    assert table.find("Y_RNA") is None


@pytest.mark.parametrize("organism", PREFIXES)
def test_invariants(organism):
    table = gene_table(organism)
    current = {symbol for id_, symbol in table.symbols.items() if id_ not in table.retired and symbol}
    assert all(len(id_) == len(PREFIXES[organism]) + 11 for id_ in table.symbols)
    assert not table.previous.keys() & current  # a previous symbol that a current gene bears is ambiguous
    assert not {*table.previous.values(), *table.owners.values()} & table.retired
    assert {*table.previous.values(), *table.owners.values()} <= table.symbols.keys()
    assert all(table.symbols[id_] == symbol for symbol, id_ in table.owners.items())
    assert table.names == current | table.previous.keys() | {table.symbols[id_] for id_ in table.retired}
    assert gene_table(organism) is table
