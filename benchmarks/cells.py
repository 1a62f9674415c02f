"""The batches that are timed: census-like synthetic cells, or a store's."""

from itertools import islice

import numpy as np
from options import Options
from scipy.special import ndtri

from scbench.config import InputLaw
from scbench.data.batch import CellBatch
from scbench.data.loader import Loader
from scbench.data.sampling import draw_genes, draw_mask
from scbench.data.store import Store
from scbench.data.values import log1p_counts
from scbench.data.vocabulary import Vocabulary
from scbench.kernels import random

MASK_RATIO = 0.4
MEDIAN_GENES, SPREAD_GENES = 1500, 0.5  # expressed genes of a cell: log-normal
COUNT_EXPONENT = 1.7  # P(count >= k) = k^-1.7: 69 % ones, 29 % from 2 to 10 (pbmc3k and heart nuclei: 66-70 %, 25-32 %)
LARGEST_COUNT = 5000


def load_batches(options: Options, number: int) -> tuple[Vocabulary, list[CellBatch]]:
    """A vocabulary and `number` batches of `options.batch_cells` cells, with masks."""
    if options.store is None:
        vocabulary = Vocabulary.build(f"gene-{i:06d}" for i in range(options.vocabulary_size - 3))
        return vocabulary, [synthetic_batch(options, vocabulary, i) for i in range(number)]
    store = Store.open(options.store)
    with Loader(
        store.split("train"), store.vocabulary, InputLaw(options.max_genes), seed=options.seed,
        batch_cells=options.batch_cells, micro_batch_cells=None,
        mask_ratio=MASK_RATIO, weighted_share=0.5, lanes=None,
    ) as loader:
        return store.vocabulary, [window[0] for window in islice(loader, number)]


def synthetic_batch(options: Options, vocabulary: Vocabulary, number: int) -> CellBatch:
    """Batch `number`: raw counts of synthetic cells, then the loader's own sampling, masking and packing."""
    samples = np.arange(number * options.batch_cells, (number + 1) * options.batch_cells)
    cells = [raw_cell(options, vocabulary.size - 3, sample) for sample in samples.tolist()]
    genes, counts = (np.concatenate(arrays) for arrays in zip(*cells, strict=True))
    offsets = np.concatenate([[0], np.cumsum([len(g) for g, _ in cells])])
    kept, offsets = draw_genes(
        genes, counts, offsets, samples, seed=options.seed, max_genes=options.max_genes, weighted_share=0.5
    )
    genes, values = genes[kept], log1p_counts(counts[kept])
    masked = draw_mask(genes, offsets, samples, seed=options.seed, ratio=MASK_RATIO)
    return CellBatch.pack(genes, values, offsets, masked, cls_token=vocabulary.cls, samples=samples, cells=samples)


def raw_cell(options: Options, n_genes: int, sample: int) -> tuple[np.ndarray, np.ndarray]:
    """(ascending token ids, counts) of one cell; the first words of its key give its length, the others genes and counts."""
    key = random.key(options.seed, random.Stream.SHUFFLE, sample)
    normal = ndtri(random.uniform(random.bits(key, 0)))
    length = int(np.clip(MEDIAN_GENES * np.exp(SPREAD_GENES * normal), options.genes or 1, n_genes))
    # Drawn by popularity without replacement (exponential clocks): a few thousand genes are common, most are rare.
    popularity = np.exp(-20 * np.arange(n_genes) / n_genes)[random.permutation(options.seed, n_genes)]
    clocks = -np.log(random.uniform(random.bits(random.fold(key, 1), np.arange(n_genes)))) / popularity
    genes = np.sort(np.argpartition(clocks, length - 1)[:length])
    counts = random.uniform(random.bits(random.fold(key, 2), genes)) ** (-1 / COUNT_EXPONENT)
    return genes, np.minimum(counts, LARGEST_COUNT).astype(np.uint32)
