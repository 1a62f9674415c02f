"""One process's part of the loader's work: reading the cells of its slice of every global batch, and drawing their genes."""

import itertools
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np

from scbench.data.extents import ExtentCache, SplitReader
from scbench.data.order import SampleOrder
from scbench.data.sampler import CellSampler, Sampled
from scbench.kernels.sampler import CellRows


class Drawn(NamedTuple):
    """A slice of a global batch."""

    sampled: Sampled
    samples: np.ndarray  # int64 [n], sample numbers
    numbers: np.ndarray  # int64 [n], the cells' numbers in the split


class Found(NamedTuple):
    """A slice of a global batch, as it lies in the store's extents."""

    cells: CellRows
    samples: np.ndarray  # int64 [n], sample numbers
    numbers: np.ndarray  # int64 [n], the cells' numbers in the split


class Share(NamedTuple):
    """What the `rank`-th of `world` processes that read and draw is to do."""

    split: SplitReader
    sampler: CellSampler
    seed: int
    lanes: int
    batch_cells: int
    rank: int
    world: int

    def found(self, start_step: int) -> Iterator[Found]:
        """Its slices of the global batches, from `start_step` on, without end; their extents stay for as long as they do."""
        order = SampleOrder(self.split.extent_sizes, self.seed, self.lanes)
        reader = AheadReader(self.split, order, self.batch_cells, self.rank, self.world)
        for step in itertools.count(start_step):
            yield reader.window(step)

    def drawn(self, start_step: int) -> Iterator[Drawn]:
        """The same, drawn."""
        for found in self.found(start_step):
            drawn = Drawn(self.sampler.draw(found.cells, found.samples), found.samples, found.numbers)
            del found  # its extents may go when the next ones are read
            yield drawn


def joined(slices: list[Drawn]) -> Drawn:
    """Slices that follow one another, as one."""
    if len(slices) == 1:
        return slices[0]
    samples, numbers = (np.concatenate(arrays) for arrays in list(zip(*slices, strict=True))[1:])
    parts = [part.sampled for part in slices]
    lengths = np.concatenate([np.diff(part.offsets) for part in parts])
    fields = {name: np.concatenate([getattr(part, name) for part in parts]) for name in Sampled._fields if name != "offsets"}
    return Drawn(Sampled(**fields, offsets=np.concatenate([[0], np.cumsum(lengths)])), samples, numbers)


class AheadReader:
    """Reads one rank's cells step after step, and the extents of the next group little by little while one is used up."""

    def __init__(self, split: SplitReader, order: SampleOrder, batch_cells: int, rank: int, world: int) -> None:
        self._order = order
        self._batch_cells = batch_cells
        self._rank, self._world = rank, world
        self.cache = ExtentCache(split)
        self._next: tuple[int, list[int]] = (-1, [])  # start of the group after this one, this rank's extents in it

    def window(self, step: int) -> Found:
        """This rank's raw cells of `step`."""
        order = self._order
        samples, located = order.rank_slice(step, self._batch_cells, self._rank, self._world)
        needed = list(dict.fromkeys(located.extents.tolist()))
        end = (step + 1) * self._batch_cells
        group = order.group(end - 1)
        coming = self._coming(group.stop) if group.start <= step * self._batch_cells else []
        self.cache.keep_only({*needed, *group.extents.tolist(), *coming})
        self.cache.read(needed)
        self.cache.read(coming[: -(-len(coming) * (end - group.start) // (group.stop - group.start))])
        cells = self.cache.rows(located.extents, located.indices)
        return Found(cells, samples, order.starts[located.extents] + located.indices)

    def _coming(self, start: int) -> list[int]:
        """This rank's extents in the group that begins at sample `start`: those of the first batch that lies in it."""
        if self._next[0] != start:
            step = -(-start // self._batch_cells)
            _, located = self._order.rank_slice(step, self._batch_cells, self._rank, self._world)
            group = set(self._order.group(start).extents.tolist())
            self._next = start, [extent for extent in np.unique(located.extents).tolist() if extent in group]
        return self._next[1]
