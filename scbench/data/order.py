"""The order of training samples: which cell sample number p is, for any p, on any number of ranks.

Each epoch deals the extents of the split to as few groups of at most L (the lanes, a constant of the run) as there can be, all
of one size or one less, and of any neighbours in the store each group gets one. In a group each lane owns one extent, whose
cells are permuted; the lanes are interleaved in proportion to their cells, so that all end together. Every batch is then
like the whole store even where sources lie apart in it, as in one merged of parts.
Every cell comes once an epoch and the epochs run on. Nothing here knows the number of ranks, so it can't depend on it.
"""

from functools import lru_cache
from typing import NamedTuple

import numpy as np

from scbench.errors import UserError
from scbench.kernels import random
from scbench.kernels.random import Stream

MAX_LANES = 64
_CACHED_GROUPS = 4  # a batch spans two groups at most, unless the store is tiny


def default_lanes(extents: int, batch_cells: int) -> int:
    """The lanes of a run that didn't choose: 64, or fewer where there are fewer extents or cells in a batch."""
    return min(MAX_LANES, extents, batch_cells)


class Located(NamedTuple):
    """Where samples lie in their split; all int64 [n]."""

    extents: np.ndarray
    indices: np.ndarray  # the cell within its extent
    lanes: np.ndarray


class Group(NamedTuple):
    """Extents that are read side by side."""

    start: int  # its first sample number
    stop: int  # one past its last
    extents: np.ndarray  # int64 [≤ L], by lane


class _Epoch(NamedTuple):
    extents: np.ndarray  # int64 [E], in the order of this epoch
    edges: np.ndarray  # int64 [groups + 1], extents before each group
    starts: np.ndarray  # int64 [groups + 1], cells of the epoch before each group


class _Interleaving(NamedTuple):
    lanes: np.ndarray  # int32 [cells of the group]
    indices: np.ndarray  # int32 [cells of the group], the cell within its lane's extent


class SampleOrder:
    """The cell of every sample number.

    Memory: a table of the split's extents for two epochs, and tables of the cells of four groups.

    Parameters
    ----------
    extent_sizes
        int [E]: cells in each extent of the split.
    seed
        Any integer.
    lanes
        L ≥ 1: extents mixed at a time. More than E is the same as E.

    Raises
    ------
    UserError
        If the split holds no cell.
    """

    def __init__(self, extent_sizes: np.ndarray, seed: int, lanes: int) -> None:
        self.sizes = np.asarray(extent_sizes, dtype=np.int64)
        self.starts = np.concatenate([[0], np.cumsum(self.sizes)])  # int64 [E+1], cells of the split before each extent
        self.n_cells = int(self.starts[-1])
        if self.n_cells == 0:
            raise UserError("the training split holds no cells: give `scbench prepare` more cells or another --split.")
        if lanes < 1:
            raise UserError(f"--lanes is {lanes}: it must be at least 1.")
        self.seed = seed
        self.lanes = min(lanes, len(self.sizes))
        self._epoch = lru_cache(maxsize=2)(self._permute_extents)
        self._interleaving = lru_cache(maxsize=_CACHED_GROUPS)(self._interleave)

    def locate(self, start: int, stop: int) -> Located:
        """The cells of the sample numbers from `start` ≥ 0 up to `stop` > `start`, which isn't one of them."""
        parts = []
        while start < stop:
            epoch, number, group = self._find(start)
            table = self._interleaving(epoch, number)
            some = slice(start - group.start, min(stop, group.stop) - group.start)
            lanes = table.lanes[some].astype(np.int64)
            parts.append(Located(group.extents[lanes], table.indices[some].astype(np.int64), lanes))
            start = group.stop
        return parts[0] if len(parts) == 1 else Located(*map(np.concatenate, zip(*parts, strict=True)))

    def group(self, sample: int) -> Group:
        """The group that holds a sample."""
        return self._find(sample)[2]

    def _find(self, sample: int) -> tuple[int, int, Group]:
        """The epoch of a sample, and its group: the number in that epoch, and what it is."""
        epoch, within = divmod(sample, self.n_cells)
        plan = self._epoch(epoch)
        number = int(plan.starts.searchsorted(within, side="right")) - 1
        starts, edges = (array[number : number + 2].tolist() for array in (plan.starts, plan.edges))
        first = epoch * self.n_cells
        return epoch, number, Group(first + starts[0], first + starts[1], plan.extents[edges[0] : edges[1]])

    def rank_slice(self, step: int, batch_cells: int, rank: int, world: int) -> tuple[np.ndarray, Located]:
        """One rank's samples of global batch `step`, int64 [n], and their cells.

        Batch s is samples [s·B, (s+1)·B) sorted by lane (stable); rank r takes [r·B//W, (r+1)·B//W) of that. Ranks one
        after the other give the one-rank batch, and a rank meets about 1/W of the lanes, so it reads 1/W of the extents.
        """
        located = self.locate(step * batch_cells, (step + 1) * batch_cells)
        mine = located.lanes.argsort(kind="stable")[rank * batch_cells // world : (rank + 1) * batch_cells // world]
        return step * batch_cells + mine, Located(*(x[mine] for x in located))

    def _permute_extents(self, epoch: int) -> _Epoch:
        key = random.key(self.seed, Stream.EXTENT, epoch)
        n = len(self.sizes)
        groups = -(-n // self.lanes)
        rows = -(-n // groups)  # of neighbours; the last may be short
        group = np.argsort(random.bits(key, np.arange(rows * groups)).reshape(rows, groups), axis=1, kind="stable").ravel()[:n]
        extents = np.lexsort((random.bits(random.fold(key, 0), np.arange(n)), group))
        edges = np.concatenate([[0], np.cumsum(np.bincount(group))])
        cells = np.concatenate([[0], np.cumsum(self.sizes[extents])])
        return _Epoch(extents, edges, cells[edges])

    def _interleave(self, epoch: int, group: int) -> _Interleaving:
        plan = self._epoch(epoch)
        extents = plan.extents[plan.edges[group] : plan.edges[group + 1]]
        sizes = self.sizes[extents]
        permuted = [
            random.permutation(random.key(self.seed, Stream.CELL, epoch, int(extent)), int(size))
            for extent, size in zip(extents, sizes, strict=True)
        ]
        # lanes of one size take turns; equal fractions are equal floats, and others are not (below 2²⁶ cells)
        turns = np.concatenate([(np.arange(size) + 0.5) / size for size in sizes])
        order = np.argsort(turns, kind="stable")
        lanes = np.repeat(np.arange(len(extents), dtype=np.int32), sizes)
        return _Interleaving(lanes[order], np.concatenate(permuted).astype(np.int32)[order])
