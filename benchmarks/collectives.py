"""The seconds that a rank spends in collectives."""

import functools

import machine
import torch

from scbench.training.engine import dist

NAMES = ("all_reduce", "reduce", "reduce_scatter", "reduce_scatter_tensor", "all_gather", "all_gather_into_tensor",
         "all_gather_coalesced", "all_reduce_coalesced", "broadcast")


class CollectiveClock:
    """While it is entered, every collective of DeepSpeed's is waited for at once, and the seconds add up.

    So nothing overlaps with computation: what communication costs where it is not hidden.
    """

    def __init__(self, device: torch.device):
        self.seconds, self._device = 0.0, device

    def __enter__(self) -> "CollectiveClock":
        backend = dist.comm.cdb
        for name in NAMES:
            setattr(backend, name, functools.partial(self._timed, getattr(backend, name)))  # hides the class's own
        return self

    def __exit__(self, *error: object) -> None:
        for name in NAMES:
            delattr(dist.comm.cdb, name)

    def _timed(self, collective, *args, **kwargs):
        start = machine.clock(self._device)
        work = collective(*args, **kwargs)
        if hasattr(work, "wait"):
            work.wait()
        self.seconds += machine.clock(self._device) - start
        return work
