"""The leakage guard: which cells of a data set a model, or a store, has seen, exactly or as a copy that was counted again.

Four stages, each asked about the cells that the ones before it did not know:

    content    the same counts on the same vocabulary
    core       the same counts of core genes (for files that lack other genes, or name genes otherwise)
    barcode    the same barcode, and a gene set alike on the genes that both files measured
    gene set   without barcodes: a gene set so much alike that no other cell has it

A stage that cannot tell copies from other cells is not asked: the core if a file lacks too much of it, gene sets on small
panels. A store's or a model's training cells stream by in blocks; only the asked cells are held, so memory does not grow
with the former.
"""

from pathlib import Path
from typing import NamedTuple

import anndata
import numpy as np

from scbench.data.cells import content_hash, to_tokens
from scbench.data.fingerprint_genes import BINS, EMPTY, GeneList, gene_list, measured_genes
from scbench.data.fingerprints import WordIndex, barcode_hashes, core_hash, jaccard, signatures
from scbench.data.gene_identity import GeneMap, map_genes
from scbench.data.measured import measured_tokens
from scbench.data.sources.anndata import AnnDataSource
from scbench.data.store import MANIFEST_FILE, Store
from scbench.data.training_fingerprints import TrainingFingerprints, among
from scbench.data.vocabulary import Vocabulary
from scbench.evaluation import embed
from scbench.evaluation.progress import progress_bar
from scbench.kernels import random
from scbench.models.model import ExpressionModel

CONTENT, CORE, BARCODE, GENE_SET = STAGES = ("content", "core", "barcode", "gene set")
LEAST_GENES = 5  # expressed by a cell that is looked for: smaller ones are equal by chance
CORE_SHARE = 0.75  # of the core genes that both files must have measured; filters for rare genes leave .9
SHARED_GENES = 1000  # of the list, measured by both, under which unrelated cells of a panel are alike: there only cells
#                      whose bins all agree are copies, and only with a barcode
SHARED_PART = 0.4  # of the listed genes of a training source that a file must have measured, or its copies aren't found
SAME_BARCODE_JACCARD = 0.65  # unrelated blood cells and nuclei reach .4, deep cells of one line .79; copies have .95 and more
SAME_BARCODE_BINS, EQUAL_BINS = 16, 8  # bins that this must rest on; or fewer, if all agree (for a file of variable genes)
ALIKE_JACCARD, ALIKE_BINS = 0.85, 48  # without a barcode: unrelated deep cells of one cell line reach .79
BANDS, BAND_BINS = 16, 12  # pairs are compared if all bins of a band agree: of those with .95, .9, .85: all, .995, .91
NARROW_SETS = 32  # sets of measured genes, the smallest, for which asked cells have signatures of their own


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
    signatures: np.ndarray  # uint8 [1 + narrow sets, cells, BINS], of all genes, and of each narrow set's
    enough: np.ndarray  # bool [cells], LEAST_GENES genes are expressed


class _Sets(NamedTuple):
    """What the asked file shares with each set of measured genes of the training cells."""

    shared: np.ndarray  # bool [sets, MOST_GENES]
    signature: np.ndarray  # int64 [sets], which signature of the asked cells to compare
    wide: np.ndarray  # bool [sets], SHARED_GENES are shared
    most: np.ndarray  # bool [sets], and SHARED_PART of the set


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
        hashes = [split.cells(["content_hash"])["content_hash"].to_numpy() for split in chosen if fingerprints is None]
        content = np.sort(np.concatenate([np.zeros(0, dtype=np.uint64), *hashes]))
    else:
        content, fingerprints = training.training_cells, None
        if content is not None and training.training_fingerprints is not None:
            fingerprints = TrainingFingerprints.load(training.training_fingerprints, content)
    with embed.opened(source, layer=layer, genes_column=genes_column) as opened:
        if content is None:
            return SeenCells(np.full(opened.n_cells, -1, dtype=np.int8), ())
        return find_copies(training.vocabulary, content, fingerprints, opened, progress)


def find_copies(
    vocabulary: Vocabulary, content: np.ndarray, fingerprints: TrainingFingerprints | None, source: AnnDataSource,
    progress: bool,
) -> SeenCells:
    """Which cells of `source` are among the cells with these fingerprints, or without any, with these sorted content hashes,
    all on `vocabulary`."""
    gene_map, common = map_genes(source.identity, vocabulary, source.name), gene_list(vocabulary)
    measured = measured_genes(measured_tokens(gene_map.tokens, vocabulary.size), common)
    shared = measured if fingerprints is None else measured & fingerprints.measured
    narrow, signature_of = _narrow(shared)
    asked = _read(source, gene_map, common, narrow, progress)
    stage = np.full(len(asked.content), -1, dtype=np.int8)
    known = fingerprints.known(asked.content, asked.core) if fingerprints else (among(content, asked.content),)
    stage[asked.enough & known[0]] = STAGES.index(CONTENT)
    if fingerprints is None or fingerprints.genes != common.fingerprint:  # none, or made with another list of genes
        return SeenCells(stage, (CONTENT,))
    genes = shared.sum(axis=1)
    wide = genes >= SHARED_GENES
    most = wide & (genes >= SHARED_PART * fingerprints.measured.sum(axis=1))
    can = {
        CONTENT: True,
        CORE: (shared[:, common.core_numbers].mean(axis=1) >= CORE_SHARE).any(),
        BARCODE: asked.barcode.any() and (genes >= EQUAL_BINS).any(),
        GENE_SET: most.any(),
    }
    checked = tuple(stage for stage in STAGES if can[stage])
    if can[CORE]:
        stage[(stage < 0) & (asked.core != 0) & known[1]] = STAGES.index(CORE)
    _find_copies(fingerprints, asked, _Sets(shared, signature_of, wide, most), stage, progress)
    return SeenCells(stage, checked)


def _narrow(shared: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The smallest of the distinct sets, bool [narrow sets, MOST_GENES], and which signature each set's source needs.

    That is 1 + the row of its set, or 0, the signature of all genes, where there are too many sets.
    """
    distinct, inverse = np.unique(shared, axis=0, return_inverse=True)
    order = np.argsort(distinct.sum(axis=1), kind="stable")[:NARROW_SETS]
    number = np.zeros(len(distinct), dtype=np.int64)
    number[order] = np.arange(len(order)) + 1
    return distinct[order], number[inverse.reshape(-1)]


def _read(source: AnnDataSource, gene_map: GeneMap, common: GeneList, narrow: np.ndarray, progress: bool) -> _Asked:
    n = source.n_cells
    content, core, enough = np.zeros(n, dtype=np.uint64), np.zeros(n, dtype=np.uint64), np.zeros(n, dtype=bool)
    found = np.zeros((1 + len(narrow), n, BINS), dtype=np.uint8)
    with progress_bar("looking for cells of the training set", n, progress) as advance:
        for start, counts in embed.chunks(source):
            cells = to_tokens(counts, gene_map)
            chunk = slice(start, start + len(cells.totals))
            content[chunk] = content_hash(cells.genes, cells.counts, cells.offsets)
            core[chunk] = core_hash(cells.genes, cells.counts, cells.offsets, common)
            enough[chunk] = np.diff(cells.offsets) >= LEAST_GENES
            for number, measured in enumerate([None, *narrow]):
                found[number, chunk] = signatures(cells.genes, cells.offsets, common, measured)
            advance(len(cells.totals))
    return _Asked(content, core, barcode_hashes(source.obs_names), found, enough)


def _find_copies(
    fingerprints: TrainingFingerprints, asked: _Asked, sets: _Sets, stage: np.ndarray, progress: bool
) -> None:
    """Put the second stages into `stage`, where it is −1."""
    rows = np.flatnonzero((stage < 0) & asked.enough)
    with_barcode, without = rows[asked.barcode[rows] != 0], rows[asked.barcode[rows] == 0]
    barcodes = WordIndex(asked.barcode[with_barcode], with_barcode)
    bands = {}
    for number in np.unique(sets.signature[sets.most]):
        filled = rows[(asked.signatures[number, rows] != EMPTY).sum(axis=1) >= ALIKE_BINS]
        bands[number] = [WordIndex(_band_words(asked.signatures[number, filled], band), filled) for band in range(BANDS)]

    def compare(block: np.ndarray, stored: np.ndarray, found: np.ndarray, name: str) -> None:
        """Rows `stored` of a block with the asked cells `found`, pair by pair."""
        new = (stage[found] < 0) | (stage[found] > STAGES.index(name))
        stored, found = stored[new], found[new]
        measured = block["measured"][stored]
        signed = asked.signatures[sets.signature[measured], found]
        index, bins = jaccard(block["signature"][stored], signed, sets.shared, measured)
        if name == BARCODE:
            alike = (index >= SAME_BARCODE_JACCARD) & (bins >= SAME_BARCODE_BINS) & sets.wide[measured]
            alike |= (index == 1) & (bins >= EQUAL_BINS)
        else:
            alike = (index >= ALIKE_JACCARD) & (bins >= ALIKE_BINS)
        stage[found[alike]] = STAGES.index(name)

    with progress_bar("looking for copies counted again", fingerprints.n_cells, progress) as advance:
        for block in fingerprints.blocks():
            for stored, found in barcodes.pairs(block["barcode"]):
                compare(block, stored, found, BARCODE)
            signed = (block["signature"] != EMPTY).sum(axis=1) >= ALIKE_BINS
            comparable = signed & sets.most[block["measured"]] & ((block["barcode"] == 0) | bool(len(without)))
            for number, indices in bands.items():
                mine = np.flatnonzero(comparable & (sets.signature[block["measured"]] == number))
                for band, index in enumerate(indices if len(mine) else ()):
                    for stored, found in index.pairs(_band_words(block["signature"][mine], band)):
                        unknown = (block["barcode"][mine[stored]] == 0) | (asked.barcode[found] == 0)
                        compare(block, mine[stored[unknown]], found[unknown], GENE_SET)
            advance(len(block))


def _band_words(signed: np.ndarray, band: int) -> np.ndarray:
    """One word a cell of the bins of a band, uint64 [cells]; cells with the same values there have the same one."""
    key = random.key(band, random.Stream.CONTENT)
    bins = np.ascontiguousarray(signed[:, random.permutation(key, BINS)[:BAND_BINS]])
    first, second = bins[:, :8].copy().view(np.uint64)[:, 0], bins[:, 8:].copy().view(np.uint32)[:, 0]
    return random.bits(key, first) ^ second
