"""A pool of worker processes: forked from a clean server, gone when their parent is gone, errors as they were raised."""

import contextlib
import multiprocessing
import multiprocessing.forkserver
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from typing import TypeVar

from scbench.errors import RetryError

Task = TypeVar("Task")
Result = TypeVar("Result")


class WorkerKilledError(RetryError):
    """A worker process died; what was finished can be used again."""


class Workers:
    """A context manager around `count` processes; with one, tasks run in this process."""

    def __init__(self, count: int):
        self._pool = None
        if count > 1:
            # the server has imported TensorStore and never uses it: a forked child of a process that has aborts
            forkserver = multiprocessing.get_context("forkserver")
            self._pool = ProcessPoolExecutor(count, forkserver, initializer=_start_forked, initargs=(dict(os.environ),))

    def __enter__(self) -> "Workers":
        return self

    def __exit__(self, *error) -> None:
        if self._pool is not None:
            self._pool.shutdown(cancel_futures=True)

    def map(self, function: Callable[[Task], Result], tasks: Sequence[Task], done: Callable[[Task], None]) -> list[Result]:
        """`function` of each task, in the order of the tasks; `done(task)` is called as each ends.

        Raises
        ------
        WorkerKilledError
            If a worker process was killed, usually for memory.
        """
        if self._pool is None:
            results = []
            for task in tasks:
                results.append(function(task))
                done(task)
            return results
        try:
            with hidden_main():
                futures = {self._pool.submit(function, task): task for task in tasks}
            for future in as_completed(futures):
                future.result()
                done(futures[future])
            return [future.result() for future in futures]
        except BrokenProcessPool as error:
            raise WorkerKilledError(
                "a worker process was killed, probably for want of memory: run the same command again with fewer --workers "
                "(what was finished is used again)."
            ) from error


def start_server(modules: Sequence[str]) -> None:
    """Start the process that workers are forked from, unless it is there: it imports `modules`, once for all of them, while
    the caller goes on. It ends with this process."""
    multiprocessing.forkserver.set_forkserver_preload(list(modules))
    multiprocessing.forkserver.ensure_running()


def _start_forked(environment: dict[str, str]) -> None:
    os.environ.update(environment)  # the server's is from when it was started
    start_worker()


def start_worker() -> None:
    """What a worker process does first."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the whole group; the parent ends the pool
    threading.Thread(target=_exit_with_parent, daemon=True).start()


def _exit_with_parent() -> None:
    """A killed parent can't end its workers, and they would wait for tasks for ever."""
    multiprocessing.parent_process().join()
    os._exit(1)


@contextlib.contextmanager
def hidden_main() -> Iterator[None]:
    """Hide the main script from the processes that start meanwhile.

    Such a child runs the main script again, so a user's script without an `if __name__ == "__main__"` would start itself
    over and over. The tasks are importable functions of scbench: no child needs the script.
    """
    main = sys.modules["__main__"]
    hidden = {name: main.__dict__[name] for name in ("__file__", "__spec__") if name in main.__dict__}
    main.__dict__.pop("__file__", None)
    main.__spec__ = None
    try:
        yield
    finally:
        main.__dict__.update(hidden)
