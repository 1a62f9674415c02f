"""Raw rows, whoever read them, to training-ready batches: scbench's own draw, mask and packing.

scbench's packing ends in torch.from_numpy, which copies nothing. Where torch is not installed (annbatch needs a newer Python
than scbench's wheels), a stand-in hands the array itself over: all else is the same code.
"""

import sys
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType

import numpy as np
from loaders.law import Law

STAND_IN = find_spec("torch") is None
if STAND_IN:
    torch = ModuleType("torch")
    torch.Tensor, torch.device, torch.from_numpy, torch.tensor = np.ndarray, str, np.asarray, np.float32
    sys.modules["torch"] = torch

from scbench.config import InputLaw  # noqa: E402
from scbench.data.batch import CellBatch  # noqa: E402
from scbench.data.extents import Cells  # noqa: E402
from scbench.data.sampler import CellSampler  # noqa: E402
from scbench.data.vocabulary import Vocabulary  # noqa: E402
from scbench.kernels.sampler import CellRows, Piece  # noqa: E402

if STAND_IN:
    del sys.modules["torch"]  # nobody else must think that torch is there


class Tokeniser:
    """Turns the raw cells of one batch after the other into CellBatches; each cell is keyed by its place in that order."""

    def __init__(self, vocabulary: Vocabulary, law: Law, first: int = 0) -> None:
        self._sampler = CellSampler(vocabulary, InputLaw(law.max_genes), seed=law.seed, mask_ratio=law.mask_ratio,
                                    weighted_share=law.weighted_share)
        self._batch_cells = law.batch_cells
        self._next = first

    def __call__(self, cells: Cells) -> Iterator[CellBatch]:
        """Batches of `law.batch_cells` of the cells; the last one may be smaller."""
        piece = Piece(*map(_unsigned, (cells.genes, cells.counts)), cells.offsets)
        for start in range(0, piece.n_cells, self._batch_cells):
            indices = np.arange(start, min(start + self._batch_cells, piece.n_cells))
            numbers = self._next + indices
            yield self._sampler.make(CellRows([piece], np.zeros_like(indices), indices), numbers, numbers)
        self._next += piece.n_cells


def _unsigned(array: np.ndarray) -> np.ndarray:
    """The same in the dtype that the native sampler reads, nothing copied."""
    return array.view(f"u{array.itemsize}") if array.dtype.kind == "i" else array


def tokenised(rows: Iterator[Cells], corpus: Path, law: Law) -> Iterator[CellBatch]:
    """All of them."""
    tokenise = Tokeniser(Vocabulary.load(corpus / "vocabulary.json"), law)
    for cells in rows:
        yield from tokenise(cells)


def whole_cells(batch: CellBatch) -> Cells:
    """The cells of a batch that shows all genes, their counts taken from the tokens: values, and targets where masked."""
    genes, values, offsets = (np.asarray(x) for x in (batch.genes, batch.values, batch.cell_offsets))
    counts = np.rint(np.expm1(values.astype(np.float64))).astype(np.int64)
    counts[np.asarray(batch.masked)] = np.asarray(batch.target_counts)
    shown = np.ones(len(genes), dtype=bool)
    shown[offsets[:-1]] = False  # <cls>
    return Cells(genes[shown], counts[shown], offsets - np.arange(len(offsets)))
