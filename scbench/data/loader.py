"""From a split of a store to the CellBatches of each optimizer step: order, read, sample genes, mask, balance, pack.

Windows (the micro-batches of one step on one rank) are made ahead of need in a thread. What a window holds is a function
of (split, options, step, rank, world) alone, and the windows of all ranks together do not depend on their number.
"""

import itertools
from collections.abc import Iterator

import numpy as np
import torch

from scbench.config import InputLaw
from scbench.data.batch import CellBatch
from scbench.data.extents import CellRows, Cells, ExtentCache, SplitReader
from scbench.data.microbatch import balance, micro_steps
from scbench.data.order import SampleOrder, default_lanes
from scbench.data.prefetch import Prefetcher
from scbench.data.sampler import CellSampler
from scbench.data.vocabulary import Vocabulary
from scbench.kernels import random
from scbench.kernels.random import Stream

WINDOWS_AHEAD = 4


class Loader:
    """Iterates over optimizer steps, without end; an item is the list of this rank's K micro-batches of one step.

    K is the same for every rank and step. The global batch of a step, its gene subsets and its masks are bit-identical for
    any `world` and any `micro_batch_cells`; a micro-batch keeps the cells in the batch's order. Each CellBatch's
    `denominator` is the number of *this rank's* masked genes in the window: training adds the other ranks'.

    Memory: at most 2 · lanes extents (about 8 MB each; with W ranks about a W-th of them on each, as long as there are no
    more lanes than cells in a batch) and a few windows.

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

    Raises
    ------
    UserError
        If the split is empty or there are fewer cells in a batch than ranks; later, what reading an extent raises.
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
    ) -> None:
        lanes = default_lanes(len(split.extent_sizes), batch_cells) if lanes is None else lanes
        order = SampleOrder(split.extent_sizes, seed, lanes)
        self.micro_steps = micro_steps(batch_cells, world, micro_batch_cells)
        """K, the micro-batches of every step."""
        reader = _AheadReader(split, order, batch_cells, rank, world)
        sampler = CellSampler(vocabulary, inputs, seed=seed, mask_ratio=mask_ratio, weighted_share=weighted_share)
        self._step = start_step
        self._windows = Prefetcher(
            _windows(reader, sampler, start_step, self.micro_steps, micro_batch_cells), WINDOWS_AHEAD
        )

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
        """Stop the thread."""
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


def _windows(
    reader: "_AheadReader", sampler: CellSampler, start_step: int, steps: int, micro_batch_cells: int | None
) -> Iterator[list[CellBatch]]:
    """The windows from `start_step` on. No method of the Loader: the thread must not keep a forgotten one alive."""
    for step in itertools.count(start_step):
        yield _window(sampler, *reader.window(step), steps, micro_batch_cells)


def _window(
    sampler: CellSampler, cells: CellRows, samples: np.ndarray, numbers: np.ndarray, steps: int, micro_batch_cells: int | None
) -> list[CellBatch]:
    """`steps` CellBatches of `cells`, whose keys are `samples` and whose numbers in the split are `numbers`."""
    sampled = sampler.draw(cells, samples)
    denominator = torch.tensor(float(np.count_nonzero(sampled.masked)))
    tokens = np.diff(sampled.offsets) + 1
    return [
        sampler.pack(sampled, rows, samples[rows], numbers[rows])._replace(denominator=denominator)
        for rows in balance(tokens, steps, micro_batch_cells)
    ]


class _AheadReader:
    """Reads one rank's cells step after step, and the extents of the next group little by little while one is used up."""

    def __init__(self, split: SplitReader, order: SampleOrder, batch_cells: int, rank: int, world: int) -> None:
        self._order = order
        self._batch_cells = batch_cells
        self._rank, self._world = rank, world
        self.cache = ExtentCache(split)
        self._next: tuple[int, list[int]] = (-1, [])  # start of the group after this one, this rank's extents in it

    def window(self, step: int) -> tuple[CellRows, np.ndarray, np.ndarray]:
        """This rank's raw cells of `step`, their sample numbers and their numbers in the split (int64 [n] both)."""
        order = self._order
        samples, located = order.rank_slice(step, self._batch_cells, self._rank, self._world)
        needed = np.unique(located.extents).tolist()
        end = (step + 1) * self._batch_cells
        group = order.group(end - 1)
        coming = self._coming(group.stop) if group.start <= step * self._batch_cells else []
        self.cache.keep_only({*needed, *group.extents.tolist(), *coming})
        self.cache.read(needed)
        self.cache.read(coming[: -(-len(coming) * (end - group.start) // (group.stop - group.start))])
        cells = self.cache.rows(located.extents, located.indices)
        return cells, samples, order.starts[located.extents] + located.indices

    def _coming(self, start: int) -> list[int]:
        """This rank's extents in the group that begins at sample `start`: those of the first batch that lies in it."""
        if self._next[0] != start:
            step = -(-start // self._batch_cells)
            _, located = self._order.rank_slice(step, self._batch_cells, self._rank, self._world)
            group = set(self._order.group(start).extents.tolist())
            self._next = start, [extent for extent in np.unique(located.extents).tolist() if extent in group]
        return self._next[1]
