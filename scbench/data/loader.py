"""From a split of a store to the CellBatches of each optimizer step: order, read, sample genes, mask, balance, pack.

Windows (the micro-batches of one step on one rank) are made ahead of need by two threads, each a whole one at a time: they
take turns at reading, then draw and pack side by side (or only pack what worker processes draw). What a window holds is a
function of (split, options, step, rank, world) alone, and the windows of all ranks together do not depend on their number.
"""

from collections.abc import Iterable, Iterator
from functools import partial

import numpy as np
import torch

from scbench.config import InputLaw
from scbench.data.batch import CellBatch
from scbench.data.drawing import Drawn, Found, Share, joined
from scbench.data.extents import Cells, ExtentCache, SplitReader
from scbench.data.loader_workers import drawn_by_workers
from scbench.data.microbatch import balance, micro_steps
from scbench.data.order import SampleOrder, default_lanes
from scbench.data.prefetch import Prefetcher
from scbench.data.sampler import CellSampler
from scbench.data.vocabulary import Vocabulary
from scbench.kernels import random
from scbench.kernels.random import Stream

WINDOWS_AHEAD = 4
THREADS = 2  # that make windows; a constant, so a rank asks no more of a larger machine


class Loader:
    """Iterates over optimizer steps, without end; an item is the list of this rank's K micro-batches of one step.

    K is the same for every rank and step. The global batch of a step, its gene subsets and its masks are bit-identical for
    any `world` and any `micro_batch_cells`; a micro-batch keeps the cells in the batch's order. Each CellBatch's
    `denominator` is the number of *this rank's* masked genes in the window: training adds the other ranks'.

    Memory: mostly 1 to 2 · lanes extents, at most 3 (about 8 MB each; with W ranks about a W-th of them on each, as long as
    there are no more lanes than cells in a batch and extents hold alike many cells: 1.5 to 1.7 times that at 8 ranks where
    sources differ much in depth; workers share them out in the same way) and a few windows.

    Parameters
    ----------
    split
        A split of an open store.
    vocabulary
        The store's.
    inputs
        How the model sees a cell.
    seed
        Of order, gene subsets and masks.
    batch_cells
        Cells of the global batch, over all ranks.
    micro_batch_cells
        Cells of a micro-batch; None: the rank's whole share.
    mask_ratio
        Probability that a gene is masked.
    weighted_share
        As in `sampling.draw_genes`.
    lanes
        Extents that are mixed at a time; None: `order.default_lanes`. A constant of the run, not of the machine.
    rank, world
        Of this process.
    start_step
        The step to begin with (what `state()["step"]` said).
    workers
        Processes, started by spawn, that read and draw beside this one; 0: threads of this one do it. They change no bit.

    Raises
    ------
    UserError
        If the split is empty or there are fewer cells in a batch than ranks; later, what reading an extent raises, and if a
        worker was killed.
    """

    def __init__(
        self,
        split: SplitReader,
        vocabulary: Vocabulary,
        inputs: InputLaw,
        *,
        seed: int,
        batch_cells: int,
        micro_batch_cells: int | None,
        mask_ratio: float,
        weighted_share: float,
        lanes: int | None,
        rank: int = 0,
        world: int = 1,
        start_step: int = 0,
        workers: int = 0,
    ) -> None:
        lanes = default_lanes(len(split.extent_sizes), batch_cells) if lanes is None else lanes
        order = SampleOrder(split.extent_sizes, seed, lanes)
        self.micro_steps = micro_steps(batch_cells, world, micro_batch_cells)
        """K, the micro-batches of every step."""
        sampler = CellSampler(vocabulary, inputs, seed=seed, mask_ratio=mask_ratio, weighted_share=weighted_share)
        processes = max(workers, 1)
        shares = [
            Share(split, sampler, seed, order.lanes, batch_cells, rank * processes + number, world * processes)
            for number in range(processes)
        ]
        slices = drawn_by_workers(shares, start_step) if workers else shares[0].found(start_step)
        make = partial(_packed if workers else _made, sampler, self.micro_steps, micro_batch_cells)
        self._step = start_step
        self._windows = Prefetcher(slices, WINDOWS_AHEAD, make, THREADS)

    def __iter__(self) -> "Loader":
        return self

    def __next__(self) -> list[CellBatch]:
        window = next(self._windows)
        self._step += 1
        return window

    def state(self) -> dict[str, int]:
        """What the next run needs to go on: the step whose window comes next, as `start_step`."""
        return {"step": self._step}

    @property
    def wait_seconds(self) -> float:
        """Seconds that the consumer has waited for windows in all."""
        return self._windows.wait_seconds

    def close(self) -> None:
        """Stop the threads and the workers."""
        self._windows.close()

    def __enter__(self) -> "Loader":
        return self

    def __exit__(self, *error: object) -> None:
        self.close()


def validation_batches(
    split: SplitReader,
    vocabulary: Vocabulary,
    inputs: InputLaw,
    *,
    seed: int,
    mask_ratio: float,
    max_cells: int,
    batch_cells: int,
    rank: int = 0,
    world: int = 1,
) -> Iterator[CellBatch]:
    """The first `max_cells` cells of a split in stored order, always with the same (uniform) gene subsets and masks.

    They depend on the seed, the cell's number in the split, `inputs.max_genes` and `mask_ratio` alone, so losses of different
    runs and steps can be compared. Ranks take contiguous slices and yield equally many batches of at most `batch_cells` cells
    (at `batch_cells` 1 and a number of cells that isn't a multiple of the ranks: two); one rank's cells may run out where
    there are fewer cells than ranks, and it then yields a batch of one empty cell, number −1, that masks nothing. An empty
    split yields nothing. `denominator` is the batch's own number of masked genes.
    """
    n_cells = min(max_cells, split.n_cells)
    if n_cells == 0:
        return
    sampler = CellSampler(vocabulary, inputs, seed=random.key(seed, Stream.VALIDATION), mask_ratio=mask_ratio)
    if n_cells < world and (rank + 1) * n_cells // world == rank * n_cells // world:
        nothing = np.zeros(0, dtype=np.int64)
        nobody = np.array([-1])
        yield sampler.pack(sampler.draw(Cells(nothing, nothing, np.zeros(2, np.int64)), nobody), np.arange(1), nobody, nobody)
        return
    batches = micro_steps(max(n_cells, world), world, batch_cells)
    first, last = rank * n_cells // world, (rank + 1) * n_cells // world
    starts = np.concatenate([[0], np.cumsum(split.extent_sizes)])
    cache = ExtentCache(split)
    for i in range(batches):
        numbers = np.arange(first + i * (last - first) // batches, first + (i + 1) * (last - first) // batches)
        extents = np.searchsorted(starts, numbers, side="right") - 1
        cache.keep_only(set(extents.tolist()))
        cache.read(np.unique(extents).tolist())
        cells = cache.rows(extents, numbers - starts[extents])
        yield sampler.pack(sampler.draw(cells, numbers), np.arange(len(numbers)), numbers, numbers)


def _made(sampler: CellSampler, steps: int, micro_batch_cells: int | None, found: Found) -> list[CellBatch]:
    """The window of a rank's cells. No method of the Loader: a thread must not keep a forgotten one alive."""
    cells, samples, numbers = found
    tokens = np.minimum(cells.lengths, sampler.inputs.max_genes) + 1
    return _window(
        sampler.make(cells[rows], samples[rows], numbers[rows]) for rows in balance(tokens, steps, micro_batch_cells)
    )


def _packed(sampler: CellSampler, steps: int, micro_batch_cells: int | None, parts: list[Drawn]) -> list[CellBatch]:
    """The same of what workers have drawn."""
    sampled, samples, numbers = joined(parts)
    tokens = np.diff(sampled.offsets) + 1
    return _window(
        sampler.pack(sampled, rows, samples[rows], numbers[rows]) for rows in balance(tokens, steps, micro_batch_cells)
    )


def _window(batches: Iterable[CellBatch]) -> list[CellBatch]:
    """Batches that know how many genes are masked in all of them."""
    batches = list(batches)
    denominator = torch.tensor(float(sum(len(batch.masked) for batch in batches)))
    return [batch._replace(denominator=denominator) for batch in batches]
