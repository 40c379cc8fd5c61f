"""The training time of a run, over all its starts, and the stages of a start."""

import time
from typing import NamedTuple

from utils.start import STARTED


class Stages:
    """Measure the stages of a start. The first stage, the imports, has just ended."""

    def __init__(self) -> None:
        self._last = STARTED
        self._line = "start:"
        self.end("imports")

    def end(self, name: str) -> str:
        """End a stage. Return a line with the seconds of all stages so far."""
        now = time.monotonic()
        self._line += f" {name} {now - self._last:.1f} s"
        self._last = now
        return self._line


class Mark(NamedTuple):
    """A moment of a run: the number of updates, and the seconds of the clock."""

    step: int = 0
    seconds: float = 0.0
    waited: float = 0.0


class Clock:
    """Count the seconds of training, without evaluations, plots and checkpoints. waited: the seconds without data.

    has_stepped: whether this process has made an update.
    """

    def __init__(self) -> None:
        self.seconds = 0.0
        self.waited = 0.0
        self._phase = ""
        self._since = time.perf_counter()
        self.has_stepped = False

    def enter(self, phase: str) -> None:
        """Begin a phase of the main thread; `loading` and `computing` are training."""
        self.count()
        self._phase = phase

    def count(self) -> None:
        """Add the time since the last call."""
        now = time.perf_counter()
        if self._phase in ("loading", "computing"):
            self.seconds += now - self._since
        if self._phase == "loading" and self.has_stepped:  # before the first step, the workers start
            self.waited += now - self._since
        self._since = now

    def mark(self, step: int) -> Mark:
        """Return the moment after `step` updates."""
        self.count()
        return Mark(step, self.seconds, self.waited)
