"""Which gene each column of a source is: Ensembl ids and symbols, the organism, and the way onto a vocabulary."""

import functools
import re
from collections.abc import Iterable, Mapping
from typing import NamedTuple

import numpy as np
import pandas as pd

from scbench.data.gene_table import PREFIXES, GeneTable, gene_table
from scbench.data.vocabulary import SPECIALS, Vocabulary
from scbench.errors import UserError

ENSEMBL_ID = re.compile(r"(ENS(?:MUS)?G\d{11})(?:\.\d+)?")  # a version goes only from such ids: ".N" is part of clone names
SUFFIXED = re.compile(r".+_(ENS(?:MUS)?G\d{11})")  # how some vocabularies keep genes apart that share a symbol
ID_COLUMNS = ("gene_ids", "gene_id", "ensembl_id", "ensembl_ids", "ensembl_gene_id", "ensembl_gene_ids", "ensembl",
              "ensemblid", "feature_id", "feature_ids", "accession")
SYMBOL_COLUMNS = ("feature_name", "gene_name", "gene_names", "gene_symbols", "gene_symbol", "symbol", "symbols",
                  "hgnc_symbol", "genesymbol", "gene_short_name", "index")
ORGANISM_SHARE = 0.8  # of the genes that only one organism has
MATCHED_SHARE = 0.5  # of the counts: below, the mapping is an error


class GeneIdentity(NamedTuple):
    """What a source says about each of its genes."""

    ids: list[str | None]  # unversioned Ensembl ids
    symbols: list[str | None]
    organism: str  # human, mouse or unknown


class GeneMap(NamedTuple):
    """The way from a source's columns to a vocabulary's tokens."""

    tokens: np.ndarray  # int64 [genes], token ids, -1 where unmatched
    organism: str  # of the source: human, mouse or unknown
    vocabulary_organism: str
    n_genes: int
    matched_genes: int
    table_genes: int  # those of them that only the gene table could match
    merged_columns: int  # columns that share a token with an earlier one; their counts are summed
    source: str
    unmatched: tuple[str, ...]  # the names of a few unmatched genes


def unversioned(name: str) -> str | None:
    """The Ensembl id of a human or mouse gene without its version; None for any other name."""
    match = ENSEMBL_ID.fullmatch(name) if name.startswith("ENS") else None  # few names do, and all names come by here
    return match[1] if match else None


def _names(values: Iterable) -> list[str]:
    return ["" if value is None or value is pd.NA or value != value else str(value).strip() for value in values]


def _columns(var: pd.DataFrame, wanted: tuple[str, ...]) -> list[list[str]]:
    """The columns of `var` that are named as one of `wanted` (in that order; the case of a *column's* name is free)."""
    order = {name: i for i, name in enumerate(wanted)}
    found = [column for column in var.columns if str(column).lower() in order]
    return [_names(var[column]) for column in sorted(found, key=lambda column: order[str(column).lower()])]


def identify(var_names: Iterable[str], var: pd.DataFrame, genes_column: str | None, source: str) -> GeneIdentity:
    """Find the Ensembl id and the symbol of each gene.

    Ids are looked for in `var_names`, then in the columns that usually hold them; symbols in the columns that usually
    hold them, then in `var_names`. A source may mix ids and symbols gene by gene.

    Parameters
    ----------
    var_names, var
        Of an AnnData.
    genes_column
        The one column of `var` to believe, whatever else there is.
    source
        What to call the source in an error.

    Raises
    ------
    UserError
        If `genes_column` doesn't exist.
    """
    names = _names(var_names)
    if genes_column is not None:
        if genes_column not in var.columns:
            there = f"it has {', '.join(map(repr, var.columns))}" if len(var.columns) else "it has none"
            raise UserError(f"{source} has no column {genes_column!r} in var ({there}): give another --genes-column.")
        id_sources = symbol_sources = [_names(var[genes_column])]
    else:
        id_sources = [names, *_columns(var, ID_COLUMNS)]
        symbol_sources = [*_columns(var, SYMBOL_COLUMNS), names]
    ids: list[str | None] = [None] * len(names)
    symbols: list[str | None] = [None] * len(names)
    for column in id_sources:
        ids = [known or unversioned(name) for known, name in zip(ids, column, strict=True)]
    for column in symbol_sources:
        symbols = [known or (None if unversioned(name) else name or None) for known, name in zip(symbols, column, strict=True)]
    return GeneIdentity(ids, symbols, organism_of(ids, symbols))


def organism_of(ids: Iterable[str | None], symbols: Iterable[str | None]) -> str:
    """human or mouse if at least four fifths of the genes that only one of them has are of that one; else unknown."""
    votes = {"human": 0, "mouse": 0}
    for id_, symbol in zip(ids, symbols, strict=True):
        if id_:
            votes["human" if id_.startswith(PREFIXES["human"]) else "mouse"] += 1
        elif symbol:
            human, mouse = symbol in gene_table("human").names, symbol in gene_table("mouse").names
            if human != mouse:
                votes["human" if human else "mouse"] += 1
    winner = max(votes, key=lambda organism: votes[organism])
    return winner if votes[winner] > 0 and votes[winner] >= ORGANISM_SHARE * sum(votes.values()) else "unknown"


def _table(organism: str) -> GeneTable:
    return gene_table("mouse" if organism == "mouse" else "human")


def gene_keys(identity: GeneIdentity) -> list[str]:
    """The key of each gene in a new vocabulary: its Ensembl id where the source or the gene table gives one, else its symbol.

    An id that has left the annotation is replaced by its successor, so that sources of different age agree. A gene without
    any name has the key ''; leave it out.
    """
    table = _table(identity.organism)
    return [
        table.canonical(id_, symbol) or symbol or ""
        for id_, symbol in zip(identity.ids, identity.symbols, strict=True)
    ]


class _Index(NamedTuple):
    """A vocabulary's tokens by every name that leads to them."""

    organism: str
    by_id: dict[str, int]  # unversioned Ensembl id, as the token spells it
    by_gene: dict[str, int]  # current Ensembl id, through the gene table


@functools.lru_cache(maxsize=4)
def _index(vocabulary: Vocabulary) -> _Index:
    genes = [(token, id_) for token, id_ in vocabulary.tokens.items() if token not in SPECIALS]
    spelled = []
    for token, _ in genes:
        suffix = SUFFIXED.fullmatch(token) if "_ENS" in token else None
        spelled.append(unversioned(token) or (suffix[1] if suffix else None))
    organism = organism_of(spelled, [token for token, _ in genes])
    table = _table(organism)
    by_id: dict[str, int] = {}
    ranked: dict[str, tuple[int, int]] = {}  # gene → (rank of the name that leads to it, token id): the best name wins
    for (token, id_), ensembl in zip(genes, spelled, strict=True):
        if ensembl:
            by_id.setdefault(ensembl, id_)
        gene = table.canonical(ensembl, None if ensembl else token)
        if gene:
            rank = 0 if gene == ensembl or table.owners.get(token) == gene else 1
            ranked[gene] = min(ranked.get(gene, (2, 0)), (rank, id_))
    return _Index(organism, by_id, {gene: id_ for gene, (_, id_) in ranked.items()})


def map_genes(identity: GeneIdentity, vocabulary: Vocabulary, source: str) -> GeneMap:
    """Find the token of each gene: by its exact id, by its exact symbol, then through the gene table.

    The table leads from an id to its symbol and back, from a previous symbol to the current one and back, and from a
    retired id to its successor. Genes that share one symbol share its token where the vocabulary doesn't tell them apart.

    Raises
    ------
    UserError
        If no gene matches; the likely cause is named.
    """
    index = _index(vocabulary)
    table = _table(identity.organism)
    tokens = np.full(len(identity.ids), -1, dtype=np.int64)
    table_genes = 0
    specials = {vocabulary.pad, vocabulary.cls, vocabulary.eoc}
    for i, (id_, symbol) in enumerate(zip(identity.ids, identity.symbols, strict=True)):
        token = index.by_id.get(id_) if id_ else None
        if token is None and symbol:
            token = vocabulary.tokens.get(symbol)
        if token is None:
            token = index.by_gene.get(table.canonical(id_, symbol))
            if token is None and id_:
                token = vocabulary.tokens.get(table.symbols.get(id_))
            table_genes += token is not None
        if token is not None and token not in specials:
            tokens[i] = token
    unmatched = np.flatnonzero(tokens < 0)
    matched = len(tokens) - len(unmatched)
    gene_map = GeneMap(
        tokens=tokens,
        organism=identity.organism,
        vocabulary_organism=index.organism,
        n_genes=len(tokens),
        matched_genes=matched,
        table_genes=table_genes,
        merged_columns=matched - len(np.unique(tokens[tokens >= 0])),
        source=source,
        unmatched=tuple(identity.symbols[i] or identity.ids[i] or "" for i in unmatched[:3]),
    )
    if matched == 0:
        raise UserError(f"no gene of {source} is in the vocabulary: {_likely_cause(gene_map)}.")
    return gene_map


@functools.lru_cache(maxsize=4)
def vocabulary_identity(vocabulary: Vocabulary) -> GeneIdentity:
    """What the names in a vocabulary say about the gene of each id, [size]."""
    return identify(vocabulary.names, pd.DataFrame(), None, "the vocabulary")


def own_tokens(vocabulary: Vocabulary) -> np.ndarray:
    """The token of each id of a vocabulary, int64 [size]: itself, or -1 where the id is no gene's."""
    tokens = np.full(vocabulary.size, -1, dtype=np.int64)
    genes = [id_ for token, id_ in vocabulary.tokens.items() if token not in SPECIALS]
    tokens[genes] = genes
    return tokens


def own_genes(vocabulary: Vocabulary, source: str) -> GeneMap:
    """The way of a source whose columns are the vocabulary's ids: each gene is itself, whatever its name."""
    tokens = own_tokens(vocabulary)
    genes = int(np.count_nonzero(tokens >= 0))
    organism = vocabulary_identity(vocabulary).organism
    return GeneMap(
        tokens=tokens, organism=organism, vocabulary_organism=organism, n_genes=genes, matched_genes=genes, table_genes=0,
        merged_columns=0, source=source, unmatched=(),
    )


def check_matched(gene_map: GeneMap, matched_counts: int, total_counts: int) -> None:
    """Raise UserError, naming the likely cause, if under half of a source's counts are of genes in the vocabulary."""
    if matched_counts < MATCHED_SHARE * total_counts:
        raise UserError(
            f"only {matched_counts / total_counts:.1%} of the counts of {gene_map.source} are of genes in the vocabulary "
            f"({gene_map.matched_genes} of {gene_map.n_genes} genes): {_likely_cause(gene_map)}."
        )


def _likely_cause(gene_map: GeneMap) -> str:
    organisms = {gene_map.organism, gene_map.vocabulary_organism}
    if organisms == {"human", "mouse"}:
        return (f"its genes are {gene_map.organism} genes and the vocabulary's are {gene_map.vocabulary_organism} genes, "
                "so use a vocabulary of its organism")
    examples = ", ".join(repr(name) for name in gene_map.unmatched)
    if gene_map.organism == "unknown":
        return (f"its genes have names like {examples}, which are neither Ensembl ids nor known symbols of human or mouse "
                "genes; if a column of var names them, give it as --genes-column")
    return f"the vocabulary lacks genes like {examples}; use a vocabulary that fits, or one built from the inputs"


def check_organisms(organisms: Mapping[str, str]) -> None:
    """Raise UserError if sources {name: organism} that are to share one vocabulary are of different organisms."""
    known = {source: organism for source, organism in organisms.items() if organism != "unknown"}
    if len(set(known.values())) > 1:
        listed = ", ".join(f"{source} ({organism})" for source, organism in known.items())
        raise UserError(f"the inputs are of different organisms: {listed}; prepare them apart.")
