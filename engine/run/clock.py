"""The training time of a run, over all its starts, and the stages of a start."""

import time
from typing import NamedTuple


class Stages:
    """The seconds of each stage of a start; the first ends now. started: by time.monotonic."""

    def __init__(self, first: str, started: float) -> None:
        self._last = started
        self._said = "start:"
        self.end(first)

    def end(self, name: str) -> str:
        """End a stage, and say in a line what all of them have taken."""
        before = self._last
        self._last = time.monotonic()
        self._said += f" {name} {self._last - before:.1f} s"
        return self._said


class Mark(NamedTuple):
    """A moment of a run: updates done, and the clock's seconds then."""

    step: int = 0
    seconds: float = 0.0
    waited: float = 0.0


class Clock:
    """Count `seconds` of training, without evaluations, plots and checkpoints, and those `waited` for data."""

    def __init__(self) -> None:
        self.seconds = 0.0
        self.waited = 0.0
        self._phase = ""
        self._since = time.perf_counter()
        self._has_stepped = False

    def enter(self, phase: str) -> None:
        """Begin a phase of the main thread; `loading` and `computing` are training."""
        self.count()
        self._phase = phase

    def count(self) -> None:
        """Add the time since the last call."""
        now = time.perf_counter()
        if self._phase in ("loading", "computing"):
            self.seconds += now - self._since
        if self._phase == "loading" and self._has_stepped:  # before the first step, the workers start
            self.waited += now - self._since
        self._since = now

    def end_step(self) -> None:
        """Note that an update is done."""
        self._has_stepped = True

    def mark(self, step: int) -> Mark:
        """Return the moment after `step` updates."""
        self.count()
        return Mark(step, self.seconds, self.waited)

    @property
    def wait_share(self) -> float:
        """The share of training time spent waiting for data."""
        return self.waited / max(self.seconds, 1e-9)
