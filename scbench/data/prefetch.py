"""Work done ahead of need in background threads. Threads and not processes: TensorStore and CUDA do not survive a fork."""

import queue
import threading
import time
import weakref
from collections.abc import Callable, Generator
from concurrent.futures import Future
from typing import Any


class Prefetcher:
    """Iterates over `make(item)` of the `items`, which threads produce up to `depth` ahead.

    The threads take turns at `items`, make side by side, and what they make comes in the order of the items. An exception of
    either is raised here, as it is, when its turn comes, and again at every later call. Closed by `close`, by the end of a
    `with` block, when it is garbage collected and when the interpreter exits.
    """

    def __init__(self, items: Generator[Any], depth: int, make: Callable[[Any], Any] | None = None, threads: int = 1) -> None:
        self.wait_seconds = 0.0
        """Seconds that the consumer has waited in all."""
        self._queue: queue.Queue[Future] = queue.Queue(maxsize=depth)
        self._failed: Future | None = None
        stop = threading.Event()
        arguments = items, make or _same, self._queue, threading.Lock(), stop
        started = [
            threading.Thread(target=_produce, args=arguments, name="scbench-prefetch", daemon=True) for _ in range(threads)
        ]
        self._close = weakref.finalize(self, _shut_down, self._queue, stop, started)
        for thread in started:
            thread.start()

    def __iter__(self) -> "Prefetcher":
        return self

    def __next__(self) -> Any:
        if not self._close.alive:
            raise RuntimeError("the prefetcher is closed")
        if self._failed is None:
            start = time.perf_counter()
            made = self._queue.get()
            error = made.exception()
            self.wait_seconds += time.perf_counter() - start
            if error is None:
                return made.result()
            self._failed = made
        raise self._failed.exception()

    def close(self) -> None:
        """Stop the threads and wait for them: at most the time of the items in the making. May be called again."""
        self._close()

    def __enter__(self) -> "Prefetcher":
        return self

    def __exit__(self, *error: object) -> None:
        self.close()


def _same(item: Any) -> Any:
    return item


def _produce(items: Generator[Any], make: Callable, ready: queue.Queue, turn: threading.Lock, stop: threading.Event) -> None:
    # No reference to the Prefetcher: a forgotten one is collected, and that stops the threads.
    try:
        while not stop.is_set():
            made: Future = Future()
            with turn:
                try:
                    item = next(items)
                except BaseException as error:  # whatever it is, it belongs to the consumer
                    made.set_exception(error)
                    return
                finally:
                    ready.put(made)
            try:
                made.set_result(make(item))
            except BaseException as error:
                made.set_exception(error)
            del made, item  # what they hold need not outlive them
    finally:
        with turn:
            items.close()


def _shut_down(ready: queue.Queue, stop: threading.Event, threads: list[threading.Thread]) -> None:
    stop.set()
    for thread in threads:
        while thread.is_alive() and thread is not threading.current_thread():
            try:  # a full queue would keep a thread in put
                ready.get_nowait()
            except queue.Empty:
                thread.join(0.002)
