"""Between host and device without waiting: windows ahead of need, numbers on their way back, moments of a stream.

On the CPU there is nothing to copy and nothing to wait for.
"""

import time
from collections.abc import Iterator

import torch
from torch import Tensor

from scbench.data.batch import CellBatch


class Windows:
    """The windows of a loader, each as the host has it and as the device has it.

    On a GPU the next window is copied, from pinned memory and on a stream of its own, while the device computes on this one;
    `fetch` starts that copy, and is best called when the step's work is queued.
    """

    def __init__(self, loader: Iterator[list[CellBatch]], device: torch.device) -> None:
        self._loader, self._device = loader, device
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None
        self._ahead: tuple[list[CellBatch], list[CellBatch]] | None = None

    def __next__(self) -> tuple[list[CellBatch], list[CellBatch]]:
        self.fetch()
        window, copies = self._ahead or (next(self._loader),) * 2
        if self._stream is not None:
            stream = torch.cuda.current_stream(self._device)
            stream.wait_stream(self._stream)
            for x in _tensors(copies):
                x.record_stream(stream)  # the memory was taken on the other stream: it is in use here until this one is done
        self._ahead = None
        return window, copies

    def fetch(self) -> None:
        """Start the copy of the next window, unless it is under way (or the device is the CPU)."""
        if self._stream is None or self._ahead is not None:
            return
        window = next(self._loader)
        with torch.cuda.stream(self._stream):
            pinned = [CellBatch(*(x.pin_memory() if isinstance(x, Tensor) else x for x in batch)) for batch in window]
            self._ahead = window, [batch.to(self._device) for batch in pinned]


def _tensors(window: list[CellBatch]) -> Iterator[Tensor]:
    return (x for batch in window for x in batch if isinstance(x, Tensor))


class Moment:
    """When a device is done with all that it has been given so far; on the CPU, now."""

    def __init__(self, device: torch.device) -> None:
        self._event = torch.cuda.Event(enable_timing=True) if device.type == "cuda" else None
        self._time = time.perf_counter()
        if self._event is not None:
            self._event.record(torch.cuda.current_stream(device))

    def wait(self) -> None:
        """Wait for it."""
        if self._event is not None:
            self._event.synchronize()

    def seconds_since(self, earlier: "Moment") -> float:
        """Time from another moment to this one; `wait` first."""
        if self._event is None:
            return self._time - earlier._time
        return earlier._event.elapsed_time(self._event) / 1e3


def to_host(values: Tensor) -> Tensor:
    """A copy on the host that is under way: whole once a Moment made after this call has passed."""
    if values.device.type == "cpu":
        return values
    return torch.empty(values.shape, dtype=values.dtype, pin_memory=True).copy_(values, non_blocking=True)
