"""Stop on request: SIGTERM and SIGUSR1 ask the loop to finish its step, save and leave; a second one leaves at once."""

import os
import signal
import sys
from types import FrameType

from utils.errors import EXIT_STOPPED

SIGNALS = (signal.SIGTERM, signal.SIGUSR1)


class StopRequest:
    """Remember that a signal came; use it as a context, so that the old handlers come back."""

    def __init__(self) -> None:
        self.requested = False
        self._old: dict[int, object] = {}

    def __enter__(self) -> "StopRequest":
        for number in SIGNALS:
            self._old[number] = signal.signal(number, self._handle)
        return self

    def __exit__(self, *error: object) -> None:
        for number, handler in self._old.items():
            signal.signal(number, handler)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if self.requested:
            sys.stderr.write(f"{signal.Signals(number).name} again: leaving at once, without saving\n")
            sys.stderr.flush()
            os._exit(EXIT_STOPPED)
        self.requested = True
        os.write(2, f"{signal.Signals(number).name}: finishing the step, then saving\n".encode())
