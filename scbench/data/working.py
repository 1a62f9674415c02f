"""What the long verbs on stores share: a locked directory to work in, a full disk in one sentence, progress bars."""

import contextlib
import errno
import fcntl
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

from scbench.errors import UserError


@contextlib.contextmanager
def locked(work: Path) -> Iterator[None]:
    """Hold the work directory; the lock goes with the process, however it ends."""
    with open(work / "lock", "w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UserError(
                "another scbench prepare or merge is making this store: wait for it, or give another --output."
            ) from None
        yield


@contextlib.contextmanager
def disk_errors(work: Path) -> Iterator[None]:
    """Say in one sentence that the disk is full or cannot be written."""
    try:
        yield
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise UserError(
                f"the disk is full: make room and run the same command again (it goes on with what is in {work}), "
                "or remove that directory."
            ) from error
        if error.errno in (errno.EACCES, errno.EPERM, errno.EROFS):
            raise UserError(f"{error.filename or work} cannot be written: {error.strerror}.") from error
        raise


@contextlib.contextmanager
def progress_bars() -> Iterator[Callable[[str, int], Callable[[int], None]]]:
    """A bar for each `progress(title, total)`, advanced by the function that this returns; silent if nobody is watching."""
    count = TextColumn("{task.completed:,}/{task.total:,}")
    columns = (TextColumn("{task.description}"), BarColumn(), count, TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True), transient=True, disable=not sys.stdout.isatty()) as bars:

        def add(title: str, total: int) -> Callable[[int], None]:
            bar = bars.add_task(title, total=total)
            return lambda amount: bars.advance(bar, amount)

        yield add
