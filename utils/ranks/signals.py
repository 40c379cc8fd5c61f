"""Stop on request: SIGINT (Ctrl-C), SIGTERM, SIGUSR1 and SIGUSR2 ask the loop to finish its step, save and leave; a
second one leaves at once. SIGUSR2 is what submitit has SLURM send before a preemption or the end of the time.
"""

import os
import signal
import time
from contextlib import suppress
from types import FrameType

from utils.errors import EXIT_STOPPED
from utils.record.logging import environment_rank, is_launched, place_of

SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2)
# A launcher forwards to its ranks a signal that they received as well: one request, milliseconds apart. A second
# request of a user or scheduler comes later; without a launcher, a tenth of this later.
REPEAT_SEC = 2.0

_current: "StopRequest | None" = None


def is_stop_requested() -> bool:
    """Return whether the run under way has been asked to stop. From any thread."""
    request = _current
    return request is not None and request.requested


def _tell(number: int, text: str) -> None:
    """Write to stderr past its buffer, which the signal may have interrupted; errors are ignored."""
    with suppress(OSError):
        os.write(2, f"{place_of(environment_rank())}{signal.Signals(number).name}{text}\n".encode())


class StopRequest:
    """Record that a signal came; a context manager that restores the old handlers."""

    def __init__(self) -> None:
        self.requested, self._since = False, 0.0
        self._old: dict[int, object] = {}

    def __enter__(self) -> "StopRequest":
        global _current
        _current = self
        for number in SIGNALS:
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
            self._since, self.requested = now, True
            _tell(number, ": finishing the step, then saving; once more leaves at once")
        elif now - self._since >= REPEAT_SEC * (1.0 if is_launched() else 0.1):
            _tell(number, " again: leaving at once, without saving")
            os._exit(EXIT_STOPPED)
