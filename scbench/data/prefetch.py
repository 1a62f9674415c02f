"""Work done ahead of need in one background thread. A thread and not a process: TensorStore and CUDA do not survive a fork."""

import contextlib
import queue
import threading
import time
import weakref
from collections.abc import Generator
from typing import Any, NamedTuple


class _Failure(NamedTuple):
    error: BaseException


class Prefetcher:
    """Iterates over `items`, which a thread produces up to `depth` ahead.

    An exception of `items` is raised here, as it is, when its turn comes, and again at every later call. Closed by
    `close`, by the end of a `with` block, when it is garbage collected and when the interpreter exits.
    """

    def __init__(self, items: Generator[Any], depth: int) -> None:
        self.wait_seconds = 0.0
        """Seconds that the consumer has waited in all."""
        self._queue: queue.Queue = queue.Queue(maxsize=depth)
        self._failure: _Failure | None = None
        stop = threading.Event()
        thread = threading.Thread(target=_produce, args=(items, self._queue, stop), name="scbench-prefetch", daemon=True)
        self._close = weakref.finalize(self, _shut_down, self._queue, stop, thread)
        thread.start()

    def __iter__(self) -> "Prefetcher":
        return self

    def __next__(self) -> Any:
        if not self._close.alive:
            raise RuntimeError("the prefetcher is closed")
        if self._failure is None:
            start = time.perf_counter()
            item = self._queue.get()
            self.wait_seconds += time.perf_counter() - start
            if not isinstance(item, _Failure):
                return item
            self._failure = item
        raise self._failure.error

    def close(self) -> None:
        """Stop the thread and wait for it: at most the time of the item in the making. May be called again."""
        self._close()

    def __enter__(self) -> "Prefetcher":
        return self

    def __exit__(self, *error: object) -> None:
        self.close()


def _produce(items: Generator[Any], ready: queue.Queue, stop: threading.Event) -> None:
    # No reference to the Prefetcher: a forgotten one is collected, and that stops this thread.
    try:
        with contextlib.closing(items):
            for item in items:
                ready.put(item)
                if stop.is_set():
                    return
        ready.put(_Failure(StopIteration()))
    except BaseException as error:  # whatever it is, it belongs to the consumer
        ready.put(_Failure(error))


def _shut_down(ready: queue.Queue, stop: threading.Event, thread: threading.Thread) -> None:
    stop.set()
    while thread.is_alive() and thread is not threading.current_thread():
        try:  # a full queue would keep the thread in put
            ready.get_nowait()
        except queue.Empty:
            thread.join(0.002)
