"""The gene table that ships with scbench: Ensembl ids, symbols and previous symbols of human and mouse genes.

Built by tools/build_gene_table.py, which documents the files; gene_table/provenance.json says from what.
"""

import functools
import lzma
from importlib.resources import files
from typing import NamedTuple

PREFIXES = {"human": "ENSG", "mouse": "ENSMUSG"}


class GeneTable(NamedTuple):
    """One organism's genes. Ids are unversioned."""

    symbols: dict[str, str]  # id → symbol; of a retired id, its last one; '' where a gene has none
    owners: dict[str, str]  # current symbol → the one gene that it means; symbols that several genes share are absent
    previous: dict[str, str]  # previous symbol → the one gene that it meant, never a current symbol
    retired: frozenset[str]  # ids that have left the annotation
    names: frozenset[str]  # every symbol that a gene bears or bore, shared ones too

    def find(self, symbol: str) -> str | None:
        """The id of the gene that a current or previous symbol means without ambiguity."""
        return self.owners.get(symbol) or self.previous.get(symbol)

    def canonical(self, id_: str | None, symbol: str | None) -> str | None:
        """The current id of a gene known by an id, a symbol or both; None if neither leads to one.

        A current id stands for itself. Annotations renumber genes: a retired id is followed through its last symbol, an id
        that the table doesn't know through the source's symbol, to the current gene; without one, it stands for itself.
        """
        if id_ is None:
            return self.find(symbol) if symbol else None
        if id_ in self.symbols:
            return (self.find(self.symbols[id_]) or id_) if id_ in self.retired else id_
        return (self.find(symbol) if symbol else None) or id_


@functools.cache
def gene_table(organism: str) -> GeneTable:
    """The table of `organism` ("human" or "mouse"), read once."""
    packed = files("scbench.data").joinpath("gene_table", f"{organism}.tsv.xz").read_bytes()
    prefix = PREFIXES[organism]
    symbols: dict[str, str] = {}
    owners: dict[str, str] = {}
    previous: dict[str, str] = {}
    retired = set()
    for line in lzma.decompress(packed).decode().splitlines():
        digits, status, symbol, old = line.split("\t")
        id_ = prefix + digits
        symbols[id_] = symbol
        if status == "o":
            owners[symbol] = id_
        elif status == "r":
            retired.add(id_)
        if old:
            previous.update(dict.fromkeys(old.split("|"), id_))
    names = frozenset(symbols.values()) | previous.keys()
    return GeneTable(symbols, owners, previous, frozenset(retired), names - {""})
