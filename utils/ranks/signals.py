"""Stop on request: SIGINT (Ctrl-C), SIGTERM, SIGUSR1 and SIGUSR2 ask a run to finish its step, save and exit.

Where a command has nothing to save, or keeps a journal, they end it at once.

A second signal exits at once. Through submitit, SLURM sends SIGUSR2 before a preemption or the end of the job's time.
"""

import os
import signal
import time
from contextlib import suppress
from types import FrameType

from utils.errors import EXIT_STOPPED
from utils.ranks import distributed
from utils.record.logging import own_place

SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2)
REPEAT_SEC = 1.0  # earlier signals belong to the first request: a launcher forwards signals that its ranks have, too

_current: "StopRequest | None" = None


def is_stop_requested() -> bool:
    """Return whether the current run has been asked to stop. Any thread may call it."""
    request = _current
    return request is not None and request.requested


def _tell(number: int, text: str) -> None:
    """Write to stderr without its buffer, which the signal may have interrupted. Ignores errors."""
    with suppress(OSError):
        os.write(2, f"{own_place()}{signal.Signals(number).name}{text}\n".encode())


def leave_to_parent() -> None:
    """Ignore stop signals in a worker: a scheduler signals all processes."""
    for number in SIGNALS:
        signal.signal(number, signal.SIG_IGN)


class Stopped(Exception):
    """All ranks end the run now; the same command resumes it."""


class Terminated(KeyboardInterrupt):
    """A stop signal where nothing has to be saved first."""


def check_stop(*, alone: bool = False) -> None:
    """Raise Stopped if the current run has been asked to stop: on all ranks if any has been asked, which all call this.

    For each pass of a loop that takes more than a second. alone: for work of this rank inside `rank_zero_call`.
    """
    if _current is not None and (_current.requested if alone else any(distributed.any_rank(_current.requested))):
        raise Stopped


class StopRequest:
    """A context manager that records stop signals and then restores the old handlers.

    at_once: raise Terminated at a signal, except for Ctrl-C, which raises KeyboardInterrupt.
    """

    def __init__(self, *, at_once: bool = False) -> None:
        self.requested = False
        self._since = 0.0
        self._at_once = at_once
        self._old = {}

    def __enter__(self) -> "StopRequest":
        global _current
        _current = None if self._at_once else self
        for number in SIGNALS[self._at_once :]:
            self._old[number] = signal.signal(number, self._handle)
        return self

    def __exit__(self, *error: object) -> None:
        global _current
        _current = None
        for number, handler in self._old.items():
            signal.signal(number, handler)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        now = time.monotonic()
        if not self.requested:
            self._since = now
            self.requested = True
            if self._at_once:
                raise Terminated(signal.Signals(number).name)
            _tell(number, ": finishing the step, then saving; once more leaves at once")
        elif now - self._since >= REPEAT_SEC:
            _tell(number, " again: leaving at once, without saving")
            os._exit(EXIT_STOPPED)
