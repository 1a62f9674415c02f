"""Which genes of which cells are hidden: the same for every model that is evaluated, and for the baselines.

The law is that of the evaluation, not of the model: a split's first cells; of a longer cell a uniform draw of genes, or, as
a second column, a draw by weight; masks at one ratio. Draws and masks depend on the seed, the cell's number in its split
and the gene alone. Errors under the two draws can't be compared: the weighted one asks for larger counts.
"""

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np

from scbench.config import InputLaw
from scbench.data.extents import Cells, SplitReader
from scbench.data.sampler import CellSampler, Sampled
from scbench.data.vocabulary import Vocabulary
from scbench.kernels import random
from scbench.kernels.random import Stream

UNIFORM, WEIGHTED = "uniform", "weighted"
DRAWS = {UNIFORM: 0.0, WEIGHTED: 1.0}  # share of long cells whose genes are drawn by weight
_GENES = 3  # what a key of Stream.EVALUATION decides, beside those of scores.py and entrants.py


class EvaluationLaw(NamedTuple):
    """What two evaluations must share for their errors to be compared."""

    store: str  # fingerprint
    split: str
    cells: int
    max_genes: int
    mask_ratio: float
    seed: int

    def sampler(self, draw: str, vocabulary: Vocabulary, inputs: InputLaw) -> CellSampler:
        """Draws and masks the cells' genes for a model that sees them as `inputs` says."""
        seed = random.key(self.seed, Stream.EVALUATION, _GENES)
        inputs = inputs.with_max_genes(self.max_genes)
        return CellSampler(vocabulary, inputs, seed=seed, mask_ratio=self.mask_ratio, weighted_share=DRAWS[draw])


class MaskedGenes(NamedTuple):
    """The masked genes of some drawn cells, in the order of the draw; [M] each."""

    genes: np.ndarray  # int, token ids
    counts: np.ndarray  # int, raw counts
    cells: np.ndarray  # int64, rows of the draw


def genes_of(sampled: Sampled, chosen: np.ndarray) -> MaskedGenes:
    """Some genes of drawn cells: the hidden ones with `chosen` = sampled.masked, the visible ones with its negation."""
    cells = np.repeat(np.arange(len(sampled.library_sizes)), np.diff(sampled.offsets))
    return MaskedGenes(sampled.genes[chosen], sampled.counts[chosen], cells[chosen])


def stored_cells(split: SplitReader, batch_cells: int) -> Iterator[tuple[np.ndarray, Cells]]:
    """A split's cells in stored order, one extent in memory: their numbers, int64 [n ≤ batch_cells], and their counts."""
    first = 0
    for extent, size in enumerate(split.extent_sizes.tolist()):
        arrays = split.read_extent(extent)
        for start in range(0, size, batch_cells):
            stop = min(start + batch_cells, size)
            tokens = slice(arrays.offsets[start], arrays.offsets[stop])
            offsets = arrays.offsets[start : stop + 1] - tokens.start
            yield np.arange(first + start, first + stop), Cells(arrays.genes[tokens], arrays.counts[tokens], offsets)
        first += size
