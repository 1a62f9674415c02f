"""Fingerprints against oracles in Python integers and sets, cell by cell."""

import hashlib
import re
from importlib.resources import files

import numpy as np
import pytest

from scbench.data import fingerprints
from scbench.data.fingerprint_genes import BINS, EMPTY, MOST_GENES, gene_list, measured_genes
from scbench.data.fingerprints import CORE_GENES, WordIndex, barcode_hashes, core_hash, jaccard, records, signatures
from scbench.data.gene_identity import GeneIdentity, map_genes
from scbench.data.gene_table import gene_table
from scbench.data.measured import measured_tokens, pack, unpack
from scbench.data.vocabulary import Vocabulary

MASK = 2**64 - 1


def word(key: int, counter: int) -> int:
    """splitmix64 in Python integers."""
    z = (key + (counter + 1) * 0x9E3779B97F4A7C15) & MASK
    z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9 & MASK
    z = (z ^ (z >> 27)) * 0x94D049BB133111EB & MASK
    return z ^ (z >> 31)


def key(seed: int, stream: int) -> int:
    z = (seed ^ (seed >> 30)) * 0xBF58476D1CE4E5B9 & MASK
    z = (z ^ (z >> 27)) * 0x94D049BB133111EB & MASK
    return word(z ^ (z >> 31), stream)


def shipped() -> tuple[list[str], set[int]]:
    lines = files("scbench.data").joinpath("gene_table", "fingerprint_human.txt").read_text().split()
    return [line.rstrip("*") for line in lines], {i for i, line in enumerate(lines) if line.endswith("*")}


GENES, CORE = shipped()


def some_cells(vocabulary: Vocabulary, cells: int, seed: int = 0) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """genes, counts, lengths of cells of 0, 1 and up to 900 genes."""
    generator = np.random.default_rng(seed)
    tokens = np.array([i for name, i in vocabulary.tokens.items() if not name.startswith("<")])
    lengths = np.array([0, 1, *generator.integers(2, 900, cells - 2)])
    genes = np.concatenate([np.sort(generator.choice(tokens, n, replace=False)) for n in lengths]).astype(np.uint32)
    return genes, generator.integers(1, 9, len(genes)).astype(np.uint32), lengths


@pytest.fixture(scope="module")
def vocabulary() -> Vocabulary:
    return Vocabulary.build([*GENES[:2500], *(GENES[i] for i in sorted(CORE)), "no gene", "ENSG00000251562"])


def test_hashes_and_signatures_equal_those_of_python_integers(vocabulary):
    genes, counts, lengths = some_cells(vocabulary, 40)
    made = records(genes, counts, lengths, gene_list(vocabulary))
    number = {gene: i for i, gene in enumerate(GENES)}
    some = 0
    for cell, (start, length) in enumerate(zip(np.cumsum(lengths) - lengths, lengths, strict=True)):
        held = [(number.get(vocabulary.names[genes[i]]), int(counts[i])) for i in range(start, start + length)]
        core = [(n, c) for n, c in held if n in CORE]
        expected = 0
        if len(core) >= CORE_GENES:
            total = sum(word(word(key(0, 11), n), c) for n, c in core) & MASK
            expected = word(key(2, 11), word(key(1, 11), total))
            some += 1
        assert int(made["core"][cell]) == expected
        signature = [min((n // BINS for n, _ in held if n is not None and n % BINS == b), default=EMPTY) for b in range(BINS)]
        assert made["signature"][cell].tolist() == signature
    assert some > 20
    assert (made["signature"][0] == EMPTY).all()
    assert (made["signature"][1] != EMPTY).sum() <= 1


def test_core_hash_does_not_see_other_genes_nor_the_vocabulary(vocabulary):
    genes, counts, lengths = some_cells(vocabulary, 20)
    common = gene_list(vocabulary)
    by_symbol = Vocabulary.build([gene_table("human").symbols[id_] for id_ in GENES[2000:4000]]
                                 + [gene_table("human").symbols[GENES[i]] for i in CORE if not 2000 <= i < 4000])
    token_of = {GENES[n]: t for t, n in enumerate(gene_list(by_symbol).numbers) if n >= 0}
    keep = np.array([vocabulary.names[g] in token_of for g in genes])
    cell = np.repeat(np.arange(20), lengths)[keep]
    other = np.array([token_of[vocabulary.names[g]] for g in genes[keep]])
    order = np.lexsort((other, cell))
    offsets = np.concatenate([[0], np.cumsum(lengths)])
    ends = np.concatenate([[0], np.cumsum(np.bincount(cell, minlength=20))])
    full = core_hash(genes, counts, offsets, common)
    np.testing.assert_array_equal(full, core_hash(other[order], counts[keep][order], ends, gene_list(by_symbol)))
    assert len(set(full[full != 0])) == (full != 0).sum() > 10


def test_estimated_jaccard_is_that_of_the_sets_on_shared_genes():
    generator = np.random.default_rng(1)
    vocabulary = Vocabulary.build(GENES)
    common = gene_list(vocabulary)
    token = np.argsort(common.numbers[common.numbers >= 0])  # of each number; tokens of genes come before the specials
    by_a, by_b = (generator.random(MOST_GENES) < share for share in (0.9, 0.7))
    by_a[len(GENES):] = by_b[len(GENES):] = False
    errors = []
    for share in np.repeat([0.2, 0.65, 0.9, 0.97], 50):
        pool = generator.permutation(len(GENES))[:1500]
        a = {int(n) for n in pool[: int(750 * (1 + share))] if by_a[n]}
        b = {int(n) for n in pool[-int(750 * (1 + share)):] if by_b[n]}
        of_a, of_b = (
            signatures(np.flatnonzero(np.isin(common.numbers, list(cell))), np.array([0, len(cell)]), common)
            for cell in (a, b)
        )
        index, bins = jaccard(of_a, of_b, (by_a & by_b)[None], np.zeros(1, dtype=int))
        shared = set(np.flatnonzero(by_a & by_b).tolist())
        errors.append(index[0] - len(a & b & shared) / len((a | b) & shared))
        assert 25 <= bins[0] <= BINS
    assert len(token) == len(GENES)
    assert abs(np.mean(errors)) < 0.015  # unbiased
    assert np.std(errors) < 0.09  # as √(J (1 − J) / bins)


def test_barcodes_are_the_longest_run_of_letters_in_the_id():
    ids = ["AAACATACAACCAC-1", "x_AAACATACAACCAC", "AAACATACAACCAG-1", "cell 5", "", None, "ACGTACGTACG",
           "ACGTACGTACGTA_AAACATACAACCAC"]
    found = barcode_hashes(ids).tolist()
    assert found[0] == found[1] == found[7] != found[2]
    assert found[3:7] == [0, 0, 0, 0]
    assert found[0] == int.from_bytes(hashlib.blake2b(b"AAACATACAACCAC", digest_size=8, key=b"barcode").digest(), "little")


@pytest.mark.parametrize("organism", ["human", "mouse"])
def test_ids_and_symbols_both_lead_to_every_gene_of_the_list(organism):
    lines = files("scbench.data").joinpath("gene_table", f"fingerprint_{organism}.txt").read_text().split()
    ids, table = [line.rstrip("*") for line in lines], gene_table(organism)
    assert len(set(ids)) == len(ids) <= MOST_GENES
    renamed = set(table.previous.values())
    for line, id_ in zip(lines, ids, strict=True):
        symbol = table.symbols[id_]
        assert table.canonical(id_, None) == table.canonical(None, symbol) == id_
        assert not re.match(r"(?i)(MT-|RP[LS]\d|MIR\d)", symbol)
        assert not (line.endswith("*") and id_ in renamed)
    assert 150 < sum(line.endswith("*") for line in lines) < 400


def test_what_a_source_measured_is_kept(vocabulary):
    identity = GeneIdentity([GENES[0], GENES[5], GENES[2499], None], [None, None, None, "unknown"], "human")
    tokens = map_genes(identity, vocabulary, "test").tokens
    measured = measured_tokens(tokens, vocabulary.size, np.array([[True, True, True, True], [False, True, False, True]]))
    by_number = measured_genes(measured, gene_list(vocabulary))
    assert [np.flatnonzero(row).tolist() for row in by_number] == [[0, 5, 2499], [5]]
    np.testing.assert_array_equal(unpack(pack(measured), vocabulary.size), measured)
    np.testing.assert_array_equal(measured_tokens(tokens, vocabulary.size), measured[:1])
    with pytest.raises(ValueError, match="no sets of"):
        unpack(pack(measured), vocabulary.size + 8)


@pytest.mark.parametrize("most", [1, 3, 1 << 17])
def test_an_index_gives_every_pair_once(monkeypatch, most):
    monkeypatch.setattr(fingerprints, "PAIRS", most)
    generator = np.random.default_rng(0)
    ours, others = (generator.integers(0, 60, n).astype(np.uint64) << np.uint64(56) for n in (50, 80))
    found = list(WordIndex(ours, np.arange(100, 150)).pairs(others))
    pairs = sorted((int(i), int(cell)) for positions, cells in found for i, cell in zip(positions, cells, strict=True))
    assert pairs == [(i, 100 + j) for i in range(80) for j in range(50) if others[i] == ours[j]] != []
    longest = max(np.bincount([i for i, _ in pairs]))
    assert max(len(cells) for _, cells in found) <= max(most, longest)
    assert list(WordIndex(ours[:0], np.arange(0)).pairs(others)) == []
