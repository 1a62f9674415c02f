"""Leaving before the end, with a checkpoint: signals and the time limit.

    SIGTERM                         exit code 143
    SIGUSR1 (SLURM's warning)       exit code 75: saved, and the same command with --resume goes on
    --time-limit                    exit code 75

(75 is EX_TEMPFAIL of sysexits.h. A job script requeues on it, and not on the SIGTERM of scancel.)

Each rank has its own signals and clock. The loop adds all ranks' wishes in a reduction that it makes anyway, so that all
leave after the same step. A second signal only repeats the wish: it cannot break the checkpoint that the first one asked for.
"""

import signal
import threading
import time
from collections import deque

SIGNALS = (signal.SIGTERM, signal.SIGUSR1)
WISHES = ("SIGTERM", "SIGUSR1", "--time-limit")
SAVED, TERMINATED = 75, 128 + signal.SIGTERM
SAVE_SECONDS, SAVE_RATE = 5.0, 100e6  # a first checkpoint, which nobody has timed yet: so long, and bytes a second


class Stopping:
    """This process's wishes to leave: a context manager, inside which the signals do nothing but wish.

    Parameters
    ----------
    time_limit
        Seconds from the start of the process, or None.
    state_bytes
        Size of a checkpoint, which tells how long the first one may take.
    lag
        Steps between a wish and the moment when the loop hears of it.
    """

    def __init__(self, time_limit: float | None, state_bytes: int, lag: int) -> None:
        self.deadline = None if time_limit is None else _process_start() + time_limit
        self.longest_save = SAVE_SECONDS + state_bytes / SAVE_RATE
        self.longest_validation = 0.0
        self._saved = False
        self._steps: deque[float] = deque(maxlen=lag + 2)
        self._signals: set[int] = set()
        self._before: dict[int, object] = {}

    def wishes(self) -> list[float]:
        """1 for each of WISHES that is wished, else 0; to be asked once at the start of each step."""
        now = time.monotonic()
        self._steps.append(now)
        coming = (now - self._steps[0]) + self.longest_validation + self.longest_save
        late = self.deadline is not None and now + coming >= self.deadline
        return [float(number in self._signals) for number in SIGNALS] + [float(late)]

    def saved(self, seconds: float) -> None:
        """A checkpoint took so long."""
        self.longest_save = max(self.longest_save, seconds) if self._saved else seconds
        self._saved = True

    def validated(self, seconds: float) -> None:
        """A validation took so long."""
        self.longest_validation = max(self.longest_validation, seconds)

    def __enter__(self) -> "Stopping":
        if threading.current_thread() is threading.main_thread():
            for number in SIGNALS:
                self._before[number] = signal.signal(number, lambda number, _: self._signals.add(number))
        return self

    def __exit__(self, kind: type | None, *_: object) -> None:
        if kind is SystemExit:  # the process leaves: one more signal must not change its exit code
            return
        for number, handler in self._before.items():
            signal.signal(number, handler)


def reason(wishes: list[float]) -> str | None:
    """What all ranks' wishes, added, come to."""
    return next((name for name, wished in zip(WISHES, wishes, strict=True) if wished), None)


def exit_code(why: str) -> int:
    """The exit code of a run that left for a `reason`."""
    return TERMINATED if why == "SIGTERM" else SAVED


def _process_start() -> float:
    """When this process started, on the monotonic clock."""
    import psutil

    return time.monotonic() - (time.time() - psutil.Process().create_time())
