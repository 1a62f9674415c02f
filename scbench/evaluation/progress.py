"""A progress bar that shows on a terminal only, and only for work that takes more than two seconds."""

import contextlib
import time
from collections.abc import Callable, Iterator

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

_PATIENCE = 2.0  # seconds


@contextlib.contextmanager
def progress_bar(description: str, total: int, visible: bool) -> Iterator[Callable[[int], None]]:
    """Yield a function that takes how many more of `total` are done. The bar goes to stderr and leaves nothing behind."""
    console = Console(stderr=True)
    if not (visible and console.is_terminal):
        yield lambda done: None
        return
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    progress = Progress(*columns, console=console, transient=True)
    task = progress.add_task(description, total=total)
    began = time.monotonic()

    def advance(done: int) -> None:
        progress.advance(task, done)
        if not progress.live.is_started and time.monotonic() - began > _PATIENCE:
            progress.start()

    try:
        yield advance
    finally:
        progress.stop()
