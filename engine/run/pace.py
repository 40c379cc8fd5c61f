"""The pace of a run with `loop.minutes`: plan its number of steps from its first updates, and correct it by the clock.

minutes.json keeps the numbers, each with the step from which it holds. A resumed run repeats the corrections of the
first process and makes no further ones. The minutes include the start of the script, the evaluations, and the files at
the end.
"""

import math
from logging import DEBUG, INFO
from pathlib import Path
from time import monotonic
from typing import TYPE_CHECKING, NamedTuple

from engine.plan import Plan
from engine.run.timing import wait_for
from utils.config.schema import Strict
from utils.errors import UserError
from utils.io.files import output_errors, write_json
from utils.ranks import distributed
from utils.record.logging import log
from utils.start import STARTED

if TYPE_CHECKING:
    from engine.run.loop import Run

_FILE = "minutes.json"
_LAST_SHARE = 0.02  # of the steps follow the last correction
_LATER = 16  # the first correction after the first epoch comes after a 16th of its steps
_END_SEC = 4.5  # the last pictures and weights
UPDATE = 3  # the time of an image in an update, as a multiple of that in the fit of a head: 1.1 to 2.9
LEAST_UPDATES = 8  # fewer gain less than larger images (docs/results.md#from-weights-in-two-minutes)
_PICTURES_SEC = 2.0  # of an evaluation
_TOLD = 0.05  # the screen has corrections by more than this share
EVALUATED = 1 / 3  # the time of an image in an evaluation, as a multiple of that in training


class Length(Strict):
    """The length of a run. words: the recipe that `loop.minutes` planned. steps: the number until the first correction.

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
    """Return the length that an earlier start of the run has kept; None without an earlier start.

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

    The first step, which may compile, is not measured. Corrections double their distance from the start, and from the
    end of the first epoch; later they halve the rest. Steps between two corrections are of one epoch's kind.
    """

    def __init__(self, run: "Run") -> None:
        minutes = run.config.loop.minutes
        length = read_minutes(run.folder.path, minutes)
        self._run = run
        self._file = run.folder.path / _FILE
        self._epoch = run.plan.epoch_length // run.plan.batch_size
        self._speed = None
        self._since = None
        self._next = -1  # step of the next correction
        self._length = length or Length(minutes=minutes, steps=run.plan.total_steps, words=[*run.folder.job.planned])
        if self._length.steps and not self._length.corrected:
            self._next = run.step + 1
            self._write()
        run.use_length(self._length.steps_before(run.step))

    def _write(self) -> None:
        if distributed.is_main():
            with output_errors("run_dir", self._file):
                write_json(self._file, self._length.model_dump())

    def begin(self) -> None:
        """End a run whose fitted head is the result because few updates fit. All ranks call it before the first one."""
        run = self._run
        finish = run.evaluator.finish
        if self._next != 1 or finish is None:
            return
        update_sec = UPDATE * finish.seconds / finish.images * run.plan.batch_size / run.plan.world_size
        left = self._left() - run.evaluator.seconds
        if distributed.rank_zero_call(lambda: left < LEAST_UPDATES * update_sec):
            what = "loop.minutes=%g: fewer than %d updates fit; the fitted head is the result"
            log.info(what, self._length.minutes, LEAST_UPDATES)
            self._length = self._length.changed({"steps": 0})
            self._write()
            run.use_length(0)

    def _left(self) -> float:
        """Return the seconds that are left for updates and evaluations."""
        finish = self._run.evaluator.finish
        end_sec = _END_SEC if finish is None else _END_SEC + finish.seconds
        return 60 * self._length.minutes - (monotonic() - STARTED) - end_sec

    def correct(self) -> None:
        """Give the run the number of steps that holds after its updates so far. All ranks call it before an update.

        Raises UserError (`run_dir`) if a correction cannot be written.
        """
        run = self._run
        step = run.step
        corrected = self._length.corrected
        if step == self._next:
            if self._learns(step):
                corrected[step] = distributed.rank_zero_call(lambda: self._count(step))
                self._write()
            self._next = self._after(step, corrected.get(step, run.plan.total_steps))
        if corrected.get(step, run.plan.total_steps) != run.plan.total_steps:
            run.use_length(corrected[step])

    def _after(self, step: int, steps: int) -> int:
        """Return the step of the correction that follows one after `step` of `steps` updates."""
        rest = steps - step
        if rest <= _LAST_SHARE * steps:
            return -1
        apart = step if step < self._epoch else max(step - self._epoch, self._epoch // _LATER, 1)
        after = step + min(apart, math.ceil(rest / 2))
        return min(after, self._epoch) if step < self._epoch else after

    def _count(self, step: int) -> int:
        """Return the number of steps that fit, if the steps keep the speed that they have had lately."""
        run = self._run
        evaluator = run.evaluator
        speed = self._speed
        images = evaluator.streams.evaluation_samples
        each = evaluator.seconds or _PICTURES_SEC + EVALUATED * speed.first * images / run.plan.batch_size
        left = self._left()
        steps = math.inf
        fewer = speed.count(speed.seconds_to(step) + left)
        while fewer < steps:  # fewer steps may have fewer evaluations
            steps = max(step + 1, fewer)
            plan = run.plan_of(steps)
            rest = left - plan.evaluations_after(step) * each
            fewer = max(step + 1, speed.count(speed.seconds_to(step) + rest))
        self._tell(plan, speed.seconds_to(steps) - speed.seconds_to(step) - rest, each)
        return steps

    def _tell(self, plan: Plan, late_sec: float, evaluation_sec: float) -> None:
        """Log the first correction and great ones. late_sec: the seconds beyond the minutes."""
        minutes = self._length.minutes
        is_first = not self._length.corrected
        before = self._run.plan.total_steps
        if is_first and late_sec > 0:
            log.warning("loop.minutes: %g are too few: the run takes about %.3g s more", minutes, late_sec)
        is_new = is_first or abs(plan.total_steps - before) > _TOLD * before
        length = f"{plan.total_steps:,} steps, {plan.epoch_at(plan.total_steps):.3g} epochs"
        words = "loop.minutes=%g: %s; a step takes %.3g s, an evaluation %.3g s"
        log.log(INFO if is_new else DEBUG, words, minutes, length, self._speed.later, evaluation_sec)

    def _learns(self, step: int) -> bool:
        """Measure the speed of the steps since the last call. Return whether there was one."""
        wait_for(self._run.learner.runtime.device)
        now = self._run.recorder.clock.mark(step)
        if self._since is not None:
            step_sec = (now.seconds - self._since.seconds) / (step - self._since.step)
            first = step_sec if self._speed is None or step <= self._epoch else self._speed.first
            self._speed = Speed(first, step_sec, self._epoch)
        self._since = now
        return self._speed is not None
