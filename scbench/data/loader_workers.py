"""Processes that read and draw for the loader: started by spawn, bounded by their pipes, gone when the loader is.

Worker w of N of rank r does what rank r·N + w of world·N would do. Slices of a batch nest (⌊(r·N)·B / (W·N)⌋ = ⌊r·B / W⌋), so
the workers' slices, one after the other, are the rank's own, bit for bit. A worker is at most one slice ahead of what its
pipe holds: it draws the next one while the last waits to be taken.
"""

import multiprocessing
import signal
import traceback
from collections.abc import Iterator
from multiprocessing.connection import Connection
from multiprocessing.context import SpawnProcess
from multiprocessing.util import Finalize

from scbench.data.drawing import Drawn, Share
from scbench.data.workers import WorkerKilledError, hidden_main, start_worker
from scbench.errors import UserError


def drawn_by_workers(shares: list[Share], start_step: int) -> Iterator[list[Drawn]]:
    """What `shares` draw, a process each; an item is their slices of one batch, in order. They start now.

    Raises
    ------
    WorkerKilledError
        If a worker died.
    UserError
        What a worker raised, with the worker's name. Any other exception comes as it was, its own traceback in a note.
    """
    workers = [_Worker(number, share, start_step) for number, share in enumerate(shares)]
    return _slices(workers)


def _slices(workers: list["_Worker"]) -> Iterator[list[Drawn]]:
    try:
        while True:
            yield [worker.receive() for worker in workers]
    finally:
        for worker in workers:
            worker.end()


class _Worker:
    def __init__(self, number: int, share: Share, start_step: int) -> None:
        self._name = f"loader worker {number} of {share.world}"
        spawn = multiprocessing.get_context("spawn")  # TensorStore and CUDA do not survive a fork
        self._connection, theirs = spawn.Pipe(duplex=False)
        self._process = spawn.Process(target=_work, args=(theirs, share, start_step), name=self._name, daemon=True)
        with hidden_main():
            self._process.start()
        theirs.close()  # else its end would not be the end of the pipe
        # called by `end`, when this is collected, and when the interpreter exits, before it waits for its processes
        self.end = Finalize(self, _end, (self._process, self._connection), exitpriority=10)

    def receive(self) -> Drawn:
        try:
            message = self._connection.recv()
        except (EOFError, OSError) as error:
            raise WorkerKilledError(
                f"{self._name} (process {self._process.pid}) was killed, probably for want of memory: go on with --resume and "
                "fewer --loader-workers."
            ) from error
        if isinstance(message, UserError):
            raise type(message)(f"{self._name}: {message}")
        if isinstance(message, BaseException):
            raise message
        return message


def _end(process: SpawnProcess, connection: Connection) -> None:
    process.kill()
    process.join()
    connection.close()


def _work(connection: Connection, share: Share, start_step: int) -> None:
    start_worker()
    signal.signal(signal.SIGTERM, signal.SIG_IGN)  # sent to all of a job, it asks for a checkpoint: till then it needs batches
    try:
        for drawn in share.drawn(start_step):
            connection.send(drawn)
    except BrokenPipeError:
        return  # the loader was closed
    except UserError as error:
        connection.send(error)
    except Exception as error:
        error.add_note(f"In {multiprocessing.current_process().name}:\n{traceback.format_exc()}")
        connection.send(error)
