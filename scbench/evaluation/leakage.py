"""The leakage guard: which cells of a data set a model, or a store, has seen, exactly or as a copy that was counted again.

Four stages, each asked about the cells that the ones before it did not know:

    content    the same counts on the same vocabulary
    core       the same counts of core genes (for files that lack other genes, or name genes otherwise)
    barcode    the same barcode, and a gene set alike on the genes that both files measured
    gene set   without barcodes: a gene set so much alike that no other cell has it

A store's or a model's training cells stream by in blocks; only the asked cells are held, so memory does not grow with
the former.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import anndata
import numpy as np

from scbench.data.cells import content_hash, to_tokens
from scbench.data.fingerprint_genes import BINS, EMPTY, gene_list, measured_genes
from scbench.data.fingerprints import barcode_hashes, core_hash, jaccard, signatures
from scbench.data.gene_identity import map_genes
from scbench.data.sources.anndata import AnnDataSource
from scbench.data.store import MANIFEST_FILE, Store
from scbench.data.training_fingerprints import TrainingFingerprints
from scbench.evaluation import embed
from scbench.evaluation.progress import progress_bar
from scbench.kernels import random
from scbench.models.model import ExpressionModel

CONTENT, CORE, BARCODE, GENE_SET = STAGES = ("content", "core", "barcode", "gene set")
SAME_BARCODE_JACCARD = 0.65  # unrelated blood cells and nuclei reach .3; copies counted again have .95 and more
ALIKE_JACCARD = 0.85  # without a barcode: unrelated deep cells of one cell line reach .79
LEAST_BINS = {BARCODE: 16, GENE_SET: 48}  # filled bins that a Jaccard index must rest on
BANDS, BAND_BINS = 16, 12  # pairs are compared if all bins of a band agree: of those with .95, .9, .85: all, .995, .91
PAIRS = 1 << 17  # compared at once


class SeenCells(NamedTuple):
    """Which cells were seen."""

    stage: np.ndarray  # int8 [cells], index into STAGES of the first stage that knows the cell; −1: none does
    checked: tuple[str, ...]  # the stages that could be asked; () if nothing is known of the training cells

    @property
    def seen(self) -> np.ndarray:
        """bool [cells]."""
        return self.stage >= 0

    def counts(self, cells: np.ndarray | slice = slice(None)) -> dict[str, int]:
        """How many of `cells` (by default all) each stage that was asked knows."""
        return {stage: int((self.stage[cells] == STAGES.index(stage)).sum()) for stage in self.checked}


class _Asked(NamedTuple):
    """The cells that are looked for."""

    content: np.ndarray  # uint64 [cells]
    core: np.ndarray  # uint64 [cells], 0: too few core genes
    barcode: np.ndarray  # uint64 [cells], 0: none
    signatures: np.ndarray  # uint8 [sets, cells, BINS], restricted to the genes of each distinct measured set
    measured: np.ndarray  # bool [MOST_GENES]
    empty: np.ndarray  # bool [cells], no gene is expressed: nothing to know it by


def find_seen_cells(
    training: ExpressionModel | Store | Path | str,
    source: AnnDataSource | anndata.AnnData | Path | str,
    *,
    splits: tuple[str, ...] = ("train", "validation", "test"),
    layer: str | None = None,
    genes_column: str | None = None,
    progress: bool = False,
) -> SeenCells:
    """Which cells of `source` are in a store, or were seen by a model in training or validation.

    Parameters
    ----------
    training
        A model, a model directory, a store or its directory. A model that carries no hashes leaves every stage unasked.
    source
        Raw counts, as for `scbench.embed`.
    splits
        Those of a store to look in; a model was trained and validated on its own.
    layer, genes_column
        As in `scbench.embed`.
    progress
        Show a progress bar if on a terminal.

    Raises
    ------
    UserError
        If one of the two can't be read, or their genes have nothing in common.
    """
    if isinstance(training, str | Path):
        path = Path(training)
        training = Store.open(path) if (path / MANIFEST_FILE).exists() else ExpressionModel.from_pretrained(path)
    if isinstance(training, Store):
        chosen = [training.split(name) for name in splits]
        fingerprints = TrainingFingerprints.of_store(training, chosen)
        content = fingerprints.content if fingerprints else np.sort(np.concatenate([
            split.cells(["content_hash"])["content_hash"].to_numpy() for split in chosen if split.n_cells
        ]))
    else:
        content, fingerprints = training.training_cells, None
        if content is not None and training.training_fingerprints is not None:
            fingerprints = TrainingFingerprints.load(training.training_fingerprints, content)
    with embed.opened(source, layer=layer, genes_column=genes_column) as opened:
        if content is None:
            return SeenCells(np.full(opened.n_cells, -1, dtype=np.int8), ())
        vocabulary = training.vocabulary
        if fingerprints is not None and fingerprints.genes != gene_list(vocabulary).fingerprint:
            fingerprints = None  # made with another list of genes: only the contents can be compared
        sets, set_of_source = _distinct(fingerprints)
        asked = _read(opened, vocabulary, sets, progress)
    stage = np.full(len(asked.content), -1, dtype=np.int8)
    stage[_among(content, asked.content) & ~asked.empty] = 0
    if fingerprints is None:
        return SeenCells(stage, (CONTENT,))
    stage[(stage < 0) & (asked.core != 0) & _among(fingerprints.core, asked.core)] = 1
    _find_copies(fingerprints, asked, set_of_source, stage, progress)
    return SeenCells(stage, STAGES)


def _distinct(fingerprints: TrainingFingerprints | None) -> tuple[np.ndarray, np.ndarray]:
    """The distinct sets of measured genes, bool [sets, MOST_GENES], and each source's."""
    if fingerprints is None:
        return np.zeros((0, 0), dtype=bool), np.zeros(0, dtype=np.int64)
    sets, set_of_source = np.unique(fingerprints.measured, axis=0, return_inverse=True)
    return sets, set_of_source.reshape(-1)


def _read(source: AnnDataSource, vocabulary, sets: np.ndarray, progress: bool) -> _Asked:
    common = gene_list(vocabulary)
    gene_map = map_genes(source.identity, vocabulary, source.name)
    n = source.n_cells
    content, core, empty = np.zeros(n, dtype=np.uint64), np.zeros(n, dtype=np.uint64), np.zeros(n, dtype=bool)
    found = np.zeros((len(sets), n, BINS), dtype=np.uint8)
    with progress_bar("looking for cells of the training set", n, progress) as advance:
        for start, counts in embed.chunks(source):
            cells = to_tokens(counts, gene_map)
            chunk = slice(start, start + len(cells.totals))
            content[chunk] = content_hash(cells.genes, cells.counts, cells.offsets)
            core[chunk] = core_hash(cells.genes, cells.counts, cells.offsets, common)
            empty[chunk] = np.diff(cells.offsets) == 0
            for number, measured in enumerate(sets):
                found[number, chunk] = signatures(cells.genes, cells.offsets, common, measured)
            advance(len(cells.totals))
    return _Asked(content, core, barcode_hashes(source.obs_names), found, measured_genes(gene_map, common), empty)


def _find_copies(
    fingerprints: TrainingFingerprints, asked: _Asked, set_of_source: np.ndarray, stage: np.ndarray, progress: bool
) -> None:
    """Put the second stages into `stage`, where it is −1."""
    rows = np.flatnonzero(stage < 0)
    with_barcode, without = rows[asked.barcode[rows] != 0], rows[asked.barcode[rows] == 0]
    barcodes = _Index(asked.barcode[with_barcode], with_barcode)
    filled = {number: rows[(signed[rows] != EMPTY).sum(axis=1) >= LEAST_BINS[GENE_SET]]
              for number, signed in enumerate(asked.signatures)}
    bands = {(number, band): _Index(_band_words(asked.signatures[number, filled[number]], band), filled[number])
             for number in filled for band in range(BANDS)}
    with progress_bar("looking for copies counted again", fingerprints.n_cells, progress) as advance:
        for block in fingerprints.blocks():
            sets = set_of_source[block["source"]]
            for stored, found in barcodes.pairs(block["barcode"]):
                _compare(block, sets, stored, asked, found, stage, BARCODE, SAME_BARCODE_JACCARD)
            signed = (block["signature"] != EMPTY).sum(axis=1) >= LEAST_BINS[GENE_SET]
            comparable = np.flatnonzero(signed & ((block["barcode"] == 0) | bool(len(without))))
            for number in np.unique(sets[comparable]):
                mine = comparable[sets[comparable] == number]
                for band in range(BANDS):
                    for stored, found in bands[number, band].pairs(_band_words(block["signature"][mine], band)):
                        unknown = (block["barcode"][mine[stored]] == 0) | (asked.barcode[found] == 0)
                        _compare(block, sets, mine[stored][unknown], asked, found[unknown], stage, GENE_SET, ALIKE_JACCARD)
            advance(len(block))


def _compare(
    block: np.ndarray, sets: np.ndarray, stored: np.ndarray, asked: _Asked, found: np.ndarray, stage: np.ndarray, name: str,
    least: float,
) -> None:
    """Compare rows `stored` of a block with the asked cells `found`, pair by pair."""
    new = (stage[found] < 0) | (stage[found] > STAGES.index(name))
    stored, found = stored[new], found[new]
    index, bins = jaccard(block["signature"][stored], asked.signatures[sets[stored], found], asked.measured)
    stage[found[(index >= least) & (bins >= LEAST_BINS[name])]] = STAGES.index(name)


class _Index:
    """Asked cells by a word."""

    def __init__(self, words: np.ndarray, rows: np.ndarray):
        order = np.argsort(words, kind="stable")
        self._words, self._rows = words[order], rows[order]

    def pairs(self, words: np.ndarray) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """Positions in `words` and the asked cells that have the same word, at most PAIRS pairs at once or one position's."""
        low, high = (np.searchsorted(self._words, words, side=side) for side in ("left", "right"))
        positions = np.flatnonzero(high > low)
        lengths = (high - low)[positions]
        ends = np.cumsum(lengths)
        first = 0
        while first < len(positions):
            last = max(first + 1, int(np.searchsorted(ends, ends[first] - lengths[first] + PAIRS, side="right")))
            repeated = np.repeat(np.arange(first, last), lengths[first:last])
            starts = ends[first:last] - lengths[first:last]
            within = np.arange(len(repeated)) - np.repeat(starts - starts[0], lengths[first:last])
            yield positions[repeated], self._rows[low[positions[repeated]] + within]
            first = last


def _band_words(signed: np.ndarray, band: int) -> np.ndarray:
    """One word a cell of the bins of a band, uint64 [cells]; cells with the same values there have the same one."""
    bins = random.permutation(random.key(band, random.Stream.CONTENT), BINS)[:BAND_BINS]
    values = signed[:, bins].astype(np.uint64) + np.arange(BAND_BINS, dtype=np.uint64) * np.uint64(EMPTY + 1)
    return random.bits(random.key(band, random.Stream.CONTENT), values).sum(axis=1, dtype=np.uint64)


def _among(known: np.ndarray, words: np.ndarray) -> np.ndarray:
    """Which of `words` are in the sorted `known`, bool; only the pages of `known` that a binary search touches are read."""
    if not len(known):
        return np.zeros(len(words), dtype=bool)
    at = np.minimum(np.searchsorted(known, words), len(known) - 1)
    return known[at] == words
