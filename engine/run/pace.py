"""The pace of a run with `loop.minutes`: keep its number of steps in minutes.json, and correct the number by the clock.

engine/run/timing.py measures the number at the start of a run. A corrected number holds from a step on. A resumed run
repeats the corrections of the first process and makes no further ones.
"""

import math
from pathlib import Path
from time import monotonic
from typing import NamedTuple

from engine.plan import Plan
from engine.run.clock import Clock, Mark
from utils.config.schema import Strict
from utils.errors import UserError
from utils.io.files import output_errors, write_json
from utils.ranks import distributed
from utils.record.logging import log
from utils.start import STARTED

_FILE = "minutes.json"
_FIRST_SHARE = 0.15  # of the steps precede the first correction; the next ones halve the rest
_LAST_SHARE = 0.02  # of the steps follow the last correction


class Length(Strict):
    """The length of a run. words: the recipe that `loop.minutes` planned. steps: the number measured at the start.

    corrected: the corrected numbers, by the step after which a number holds.
    """

    minutes: float
    steps: int
    words: list[str]
    corrected: dict[int, int] = {}

    def steps_before(self, step: float) -> int:
        """Return the number of steps that held before a step's correction, if it has one."""
        earlier = [number for number in self.corrected if number < step]
        return self.corrected[max(earlier)] if earlier else self.steps


def read_minutes(folder: Path, minutes: float) -> Length | None:
    """Return the length that an earlier start of the run has measured; None without an earlier start.

    Raises UserError (`loop.minutes`) for other minutes, or for a damaged file.
    """
    file = folder / _FILE
    if not file.exists():
        return None
    try:
        length = Length.model_validate_json(file.read_bytes())
    except ValueError as error:
        raise UserError(f"loop.minutes: {file} is damaged; give another run_dir") from error
    if length.minutes != minutes:
        raise UserError(
            f"loop.minutes: {minutes:g}, but {folder} was planned for {length.minutes:g}; set "
            f"loop.minutes={length.minutes:g}, or give another run_dir"
        )
    return length


class Speed(NamedTuple):
    """The seconds of a step in the first epoch, and in later epochs, whose images come from the memory cache."""

    first: float
    later: float
    epoch: int  # steps

    def seconds_to(self, step: int) -> float:
        """Return the seconds that the first `step` steps take."""
        return min(step, self.epoch) * self.first + max(0, step - self.epoch) * self.later

    def count(self, seconds: float) -> int:
        """Return the number of steps that fit into some seconds."""
        more = seconds - self.epoch * self.first
        return int(self.epoch + more / self.later if more > 0 else seconds / self.first)


class Pace:
    """Correct the number of steps of a run, so that it ends with its minutes.

    speed: the expected speed from `start` on, in the process that began the run. None in another process, which repeats
    the corrections. end_sec: the time after the last evaluation, and of its preparation.
    """

    def __init__(self, folder: Path, length: Length, start: Mark, speed: Speed | None, end_sec: float) -> None:
        self._file = folder / _FILE
        self._length = length
        self._next = -1  # step of the next correction
        self._since = start
        self._speed = speed
        self._end_sec = end_sec
        if speed is not None:
            self._next = start.step + math.ceil(_FIRST_SHARE * (length.steps - start.step))
            self._write()

    def _write(self) -> None:
        if distributed.is_main():
            with output_errors("run_dir", self._file):
                write_json(self._file, self._length.model_dump())

    def steps_at(self, step: int, plan: Plan, clock: Clock, evaluation_sec: float) -> int:
        """Return the number of steps after `step` updates. All ranks call it. evaluation_sec: of an evaluation.

        Raises UserError (`run_dir`) if a correction cannot be written.
        """
        corrected = self._length.corrected
        if self._speed is not None and step == self._speed.epoch:  # no measurement is of steps before and after it
            self._learn(step, clock)
        if step == self._next and not plan.phase_ends:
            steps = distributed.rank_zero_call(lambda: self._count(step, plan, clock, evaluation_sec))
            if steps != plan.total_steps:
                log.info("loop.minutes: %d steps in place of %d, by the clock", steps, plan.total_steps)
            corrected[step] = steps
            self._next = step + (steps - step) // 2 if steps - step > _LAST_SHARE * steps else -1
            self._write()
        return corrected.get(step, plan.total_steps)

    def _count(self, step: int, plan: Plan, clock: Clock, evaluation_sec: float) -> int:
        """Return the number of steps that fit, if the steps keep the speed that they have had lately."""
        self._learn(step, clock)
        left = 60 * self._length.minutes - (monotonic() - STARTED) - self._end_sec
        left -= plan.evaluations_after(step) * evaluation_sec
        return max(step + 1, self._speed.count(self._speed.seconds_to(step) + left))

    def _learn(self, step: int, clock: Clock) -> None:
        """Measure the speed of the steps since the last call, which are of the first epoch, or of later ones."""
        now = clock.mark(step)
        if step > self._since.step:
            step_sec = (now.seconds - self._since.seconds) / (step - self._since.step)
            name = "first" if step <= self._speed.epoch else "later"
            self._speed = self._speed._replace(**{name: step_sec})
            self._since = now
