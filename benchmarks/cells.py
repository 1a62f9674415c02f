"""The batches that are timed: census-like synthetic cells, or a store's."""

from collections.abc import Sequence
from itertools import islice

import numpy as np
import torch
from options import Options
from scipy.special import ndtri

from scbench.data.batch import CellBatch
from scbench.data.cells import CellTokens, sum_by_cell, take, wide
from scbench.data.loader import Loader
from scbench.data.sampler import CellSampler
from scbench.data.store import Store
from scbench.data.vocabulary import Vocabulary
from scbench.errors import UserError
from scbench.kernels import random

MASK_RATIO = 0.4
MEDIAN_GENES, SPREAD_GENES = 1500, 0.5  # expressed genes of a cell: log-normal
COUNT_EXPONENT = 1.7  # P(count >= k) = k^-1.7: 69 % ones, 29 % from 2 to 10 (pbmc3k and heart nuclei: 66-70 %, 25-32 %)
LARGEST_COUNT = 5000


def vocabulary_of(options: Options) -> Vocabulary:
    """The store's, or one of synthetic genes."""
    if options.store is not None:
        return Store.open(options.store).vocabulary
    return Vocabulary.build(f"gene-{i:06d}" for i in range(options.vocabulary_size - 3))


def load_batches(options: Options, number: int) -> tuple[Vocabulary, list[CellBatch]]:
    """A vocabulary and `number` batches of `options.batch_cells` cells, with masks."""
    vocabulary = vocabulary_of(options)
    if options.store is None:
        return vocabulary, [synthetic_batch(options, vocabulary, i) for i in range(number)]
    with open_loader(options, vocabulary) as loader:
        return vocabulary, [window[0] for window in islice(loader, number)]


def open_loader(options: Options, vocabulary: Vocabulary, rank: int = 0, world: int = 1) -> Loader:
    """The loader of `scbench pretrain` on the store's training split."""
    return Loader(
        Store.open(options.store).split("train"), vocabulary, options.model(vocabulary.size).inputs, seed=options.seed,
        batch_cells=options.batch_cells, micro_batch_cells=None, mask_ratio=MASK_RATIO, weighted_share=0.5, lanes=None,
        rank=rank, world=world,
    )


def synthetic_batch(options: Options, vocabulary: Vocabulary, number: int, rank: int = 0, world: int = 1) -> CellBatch:
    """A rank's share of batch `number`: raw counts of synthetic cells, then the loader's own sampling, masking and packing."""
    share = options.batch_cells // world
    if share * world != options.batch_cells:
        raise UserError(f"--batch-cells {options.batch_cells} cannot be shared among {world} ranks: give a multiple of them.")
    samples = np.arange(share) + number * options.batch_cells + rank * share
    sampler = CellSampler(vocabulary, options.model(vocabulary.size).inputs, seed=options.seed, mask_ratio=MASK_RATIO,
                          weighted_share=0.5)
    return sampler.pack(sampler.draw(raw_cells(options, vocabulary, samples), samples), np.arange(share), samples, samples)


def raw_cells(options: Options, vocabulary: Vocabulary, samples: np.ndarray) -> CellTokens:
    """Raw counts of synthetic cells; int64 [cells] sample numbers."""
    genes, counts = zip(*(raw_cell(options, vocabulary.size - 3, sample) for sample in samples.tolist()), strict=True)
    return _joined(genes, counts, [len(g) for g in genes])


def stored_cells(options: Options, number: int) -> CellTokens:
    """Raw counts of the first cells of a store's training split (it is shuffled)."""
    split = Store.open(options.store).split("train").first(number)
    extents = [split.read_extent(extent) for extent in range(len(split.extent_sizes))]
    lengths = np.concatenate([np.diff(extent.offsets) for extent in extents])
    cells = _joined([extent.genes for extent in extents], [extent.counts for extent in extents], lengths)
    return take(cells, np.arange(split.n_cells))


def _joined(genes: Sequence[np.ndarray], counts: Sequence[np.ndarray], lengths: Sequence[int]) -> CellTokens:
    offsets, counts = np.concatenate([[0], np.cumsum(lengths)]), np.concatenate(counts)
    return CellTokens(np.concatenate(genes), counts, offsets, sum_by_cell(wide(counts), offsets))


def cells_to_embed(options: Options, vocabulary: Vocabulary, batches: int) -> CellTokens:
    """Raw counts of so many batches of cells."""
    number = batches * options.batch_cells
    if options.store is not None:
        return stored_cells(options, number)
    return raw_cells(options, vocabulary, np.arange(number))


def batches_to_embed(options: Options, vocabulary: Vocabulary, batches: int) -> list[CellBatch]:
    """The same cells drawn and packed, nothing masked, the longest first, as `scbench embed` does it."""
    cells = cells_to_embed(options, vocabulary, batches)
    numbers = np.arange(len(cells.offsets) - 1)
    sampler = CellSampler(vocabulary, options.model(vocabulary.size).inputs, seed=options.seed)
    drawn = sampler.draw(cells, numbers)
    by_length = np.argsort(-np.diff(drawn.offsets), kind="stable")
    return [sampler.pack(drawn, rows, rows, rows)
            for rows in np.split(by_length, range(options.batch_cells, len(numbers), options.batch_cells))]


def as_the_reference_pads(batch: CellBatch, genes: int, pad_token: int) -> CellBatch:
    """The same cells, each padded to so many genes."""
    whole = batch.values.clone()
    whole[batch.masked.long()] = batch.targets
    hidden = torch.zeros(len(whole), dtype=torch.bool)
    hidden[batch.masked.long()] = True
    starts, stops = batch.cell_offsets[:-1].tolist(), batch.cell_offsets[1:].tolist()
    rows = [slice(start + 1, stop) for start, stop in zip(starts, stops, strict=True)]  # without <cls>
    arrays = [[x[row].numpy() for row in rows] for x in (batch.genes, whole, hidden)]
    return CellBatch.from_lists(*arrays, pad_to=genes, cls_token=int(batch.genes[0]), pad_token=pad_token)


def raw_cell(options: Options, n_genes: int, sample: int) -> tuple[np.ndarray, np.ndarray]:
    """(ascending token ids, counts) of one cell; the first words of its key give its length, the others genes and counts."""
    key = random.key(options.seed, random.Stream.SHUFFLE, sample)
    normal = ndtri(random.uniform(random.bits(key, 0)))
    median, least = (MEDIAN_GENES, options.genes) if options.median_genes is None else (options.median_genes, 1)
    length = int(np.clip(median * np.exp(SPREAD_GENES * normal), least, n_genes))
    # Drawn by popularity without replacement (exponential clocks): a few thousand genes are common, most are rare.
    popularity = np.exp(-20 * np.arange(n_genes) / n_genes)[random.permutation(options.seed, n_genes)]
    clocks = -np.log(random.uniform(random.bits(random.fold(key, 1), np.arange(n_genes)))) / popularity
    genes = np.sort(np.argpartition(clocks, length - 1)[:length])
    counts = random.uniform(random.bits(random.fold(key, 2), genes)) ** (-1 / COUNT_EXPONENT)
    return genes, np.minimum(counts, LARGEST_COUNT).astype(np.uint32)
