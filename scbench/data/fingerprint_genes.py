"""The fixed list of common genes that fingerprints are made of, and where its genes are in a vocabulary.

The list ships as package data and is the same for every vocabulary. tools/build_fingerprint_genes.py builds it and says which
genes are in it, and which of them are the *core*.
"""

import functools
import hashlib
from importlib.resources import files
from typing import NamedTuple

import numpy as np

from scbench.data.gene_identity import vocabulary_identity
from scbench.data.gene_table import gene_table
from scbench.data.vocabulary import Vocabulary

BINS = 64  # of a signature, one byte each
EMPTY = 255  # a bin without an expressed gene
MOST_GENES = BINS * EMPTY  # a byte names one of the 255 genes of its bin: gene number n is in bin n % 64, as value n // 64


class GeneList(NamedTuple):
    """The genes of the list in a vocabulary."""

    numbers: np.ndarray  # int64 [vocabulary], a token's number in the list, −1 where it is not in it
    core: np.ndarray  # bool [vocabulary], the token is a core gene
    core_numbers: np.ndarray  # int64, the numbers of all core genes, in the vocabulary or not
    fingerprint: str  # start of the SHA-256 of the list: fingerprints on other lists can't be compared


@functools.lru_cache(maxsize=4)
def gene_list(vocabulary: Vocabulary) -> GeneList:
    """The list of the vocabulary's organism (human, unless it is mouse), reached by ids and by symbols."""
    identity = vocabulary_identity(vocabulary)
    organism = "mouse" if identity.organism == "mouse" else "human"
    packed = files("scbench.data").joinpath("gene_table", f"fingerprint_{organism}.txt").read_bytes()
    genes = packed.decode("ascii").split()
    number = {gene.rstrip("*"): i for i, gene in enumerate(genes)}
    is_core = np.array([gene.endswith("*") for gene in genes])
    table = gene_table(organism)
    numbers = np.array([
        number.get(table.canonical(id_, symbol), -1) for id_, symbol in zip(identity.ids, identity.symbols, strict=True)
    ], dtype=np.int64)
    core = (numbers >= 0) & is_core[numbers]
    return GeneList(numbers, core, np.flatnonzero(is_core), hashlib.sha256(packed).hexdigest()[:16])


def measured_genes(measured: np.ndarray, genes: GeneList) -> np.ndarray:
    """bool [sets, MOST_GENES]: the genes of the list among the measured tokens, bool [sets, vocabulary]."""
    listed = np.zeros((len(measured), MOST_GENES), dtype=bool)
    known = genes.numbers >= 0
    for row, tokens in zip(listed, measured, strict=True):
        row[genes.numbers[tokens & known]] = True
    return listed
