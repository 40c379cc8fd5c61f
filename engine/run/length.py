"""`loop.minutes`: as many steps as fit into a time, measured once at the start of a run.

Updates and parts of evaluations are timed on the run's own machine and data, and undone. The number of steps is written
to minutes.json in the run folder; from then on the run is one of that many steps, also when it is resumed on a slower
machine. The minutes include the start of the script, evaluations, and the files at the end.
"""

import math
from collections.abc import Callable, Iterable
from contextlib import closing
from pathlib import Path
from time import monotonic

import torch

from engine.config import TrainingConfig
from engine.plan import Plan, plan_streams
from engine.run.loop import Run
from engine.run.lr_finder import undone
from utils.config.schema import Strict
from utils.errors import UserError
from utils.io.files import output_errors, write_json
from utils.ranks import distributed
from utils.ranks.signals import check_stop
from utils.record.logging import get_logger
from utils.start import STARTED

log = get_logger(__name__)

_FILE = "minutes.json"
_WARM_UP = 3  # updates, and evaluations of a batch: the first are slow
_SHARE = 0.02  # of the time for each of two timings of updates, of each of `loop.phases`
_MOST_UPDATES = 50  # of a timing
_SLOW = 8  # if fewer updates than this fit into a timing, one warm-up update is enough
_DRAIN = 2  # first use up twice the batches that workers read ahead, so that the timing waits for data as the run will
_BATCHES = 8  # of an evaluation
_END_SEC = 4.5  # the last pictures and weights


class Found(Strict):
    """What the first start of a run has found. words: the recipe that `loop.minutes` planned."""

    minutes: float
    steps: int
    words: list[str]


def use_minutes(config: TrainingConfig, folder: Path, overrides: Iterable[str]) -> TrainingConfig:
    """Return the config with the number of steps that an earlier start of the run has found, if it has.

    overrides: the words of the command. Raises UserError (`loop.minutes`) for a length beside the minutes, for other
    minutes, or for a damaged file.
    """
    minutes = config.loop.minutes
    if minutes is None:
        return config
    lengths = [word for word in overrides if word.startswith(("loop.total_steps=", "loop.total_epochs="))]
    beside = [word for word in lengths if not word.endswith("=null")]
    if beside:
        raise UserError(f"loop.minutes: {minutes:g} sets the length, and so does {beside[0]}; give one of them")
    found = read_minutes(folder, minutes)
    return _of_length(config, None if found is None else found.steps)


def read_minutes(folder: Path, minutes: float) -> Found | None:
    """Return what an earlier start of the run has found; None without one.

    Raises UserError (`loop.minutes`) for other minutes, or for a damaged file.
    """
    file = folder / _FILE
    if not file.exists():
        return None
    try:
        found = Found.model_validate_json(file.read_bytes())
    except ValueError as error:
        raise UserError(f"loop.minutes: {file} is damaged; give another run_dir") from error
    if found.minutes != minutes:
        raise UserError(
            f"loop.minutes: {minutes:g}, but {folder} was planned for {found.minutes:g}; set "
            f"loop.minutes={found.minutes:g}, or give another run_dir"
        )
    return found


def _of_length(config: TrainingConfig, steps: int | None) -> TrainingConfig:
    return config.model_copy(update={"loop": config.loop.model_copy(update={"total_steps": steps})})


def fit_minutes(run: Run) -> None:
    """Measure, choose the number of steps, write it, and give the run its plan, unless an earlier start did.

    Raises UserError (`loop.minutes`) if no step fits.
    """
    minutes = run.config.loop.minutes
    file = run.folder.path / _FILE
    if minutes is None or file.exists():
        return

    def plan_of(steps: int) -> Plan:
        return plan_streams(_of_length(run.config, steps), run.streams, run.plan.world_size)

    step_sec = _time_steps(run, _SHARE * 60 * minutes)
    evaluation_sec = _time_evaluation(run)
    start_sec = monotonic() - STARTED
    left = 60 * minutes - start_sec - _END_SEC
    steps = distributed.rank_zero_call(lambda: _count_steps(left, step_sec, evaluation_sec, plan_of))
    step = f"{step_sec[0]:.3g} s, after the first epoch {step_sec[1]:.3g} s"
    found = f"a step takes {step}, an evaluation {evaluation_sec:.3g} s, the start took {start_sec:.3g} s"
    if steps < 1:
        raise UserError(f"loop.minutes: {minutes:g} are too few: {found}; set more")
    run.plan = plan_of(steps)
    run.learner.use_length(run.plan)
    run.recorder.use_plan(run.plan)
    warmup = f", {run.plan.warmup_steps:,} steps of warm-up" if run.plan.warmup_steps else ""
    length = f"{steps:,} steps, {run.plan.epoch_at(steps):.3g} epochs{warmup}"
    log.info("loop.minutes=%g: %s; %s", minutes, length, found)
    if distributed.is_main():
        with output_errors("run_dir", file):
            write_json(file, Found(minutes=minutes, steps=steps, words=list(run.folder.job.planned)).model_dump())


def _count_fitting(seconds: float, epoch: int, step_sec: tuple[float, float]) -> int:
    """Return the number of steps that fit; step_sec: of each of the first `epoch` ones, and of a later one."""
    first, later = step_sec
    more = seconds - epoch * first
    return int(epoch + more / later if more > 0 else seconds / first)


def _count_steps(
    left: float, step_sec: tuple[float, float], evaluation_sec: float, plan_of: Callable[[int], Plan]
) -> int:
    """Return the number of steps that leave time for their evaluations and for a range test."""
    steps = int(left / min(step_sec))
    while steps >= 1:  # fewer steps may have fewer evaluations
        plan = plan_of(steps)
        evaluations = math.ceil(plan.epoch_at(steps) / plan.evaluate_every_epochs - 1e-9)
        epoch = plan.epoch_length // plan.batch_size
        fewer = _count_fitting(left - evaluations * evaluation_sec, epoch, step_sec) - plan.range_test_steps
        if fewer >= steps:
            break
        steps = fewer
    return steps


def _time_steps(run: Run, seconds: float) -> tuple[float, float]:
    """Return the mean seconds of an update in the first epoch, and after it, when images come from the memory cache.

    The same updates are timed twice, of all streams by their share of the run. seconds: of each timing.
    """
    shares = [phase.fraction for phase in run.config.loop.phases or ()]
    shares.append(1 - math.fsum(shares))
    first = later = 0.0
    for number, share in enumerate(shares):
        count, stream_sec = _time_stream(run, number, seconds)
        first += share * stream_sec
        later += share * _time_stream(run, number, seconds, count)[1]
    return first, later


def _time_stream(run: Run, phase: int, seconds: float, count: int | None = None) -> tuple[int, float]:
    """Return the number of updates of one stream that were timed, and their mean seconds. The updates are undone."""
    learner = run.learner

    def time_updates(count: int) -> float:
        started = monotonic()
        for number in range(count):
            run.recorder.phase(0, f"loop.minutes, update {number + 1}")
            check_stop()
            learner.update(next(batches))
        wait_for(learner.runtime.device)
        return distributed.rank_zero_call(lambda: (monotonic() - started) / count)

    with undone(learner), closing(run.read(phase, run.plan.total_steps)) as batches:
        time_updates(1)  # may compile
        for _ in range(_WARM_UP):
            about = time_updates(1)
            if about > seconds / _SLOW:
                break
        if count is None:
            count = min(_MOST_UPDATES, int(seconds / max(about, 1e-6)))
        if count < 1:
            return 0, about
        ahead = learner.runtime.workers * learner.runtime.prefetch_batches  # batches that workers read meanwhile
        if ahead:
            time_updates(min(_DRAIN * ahead, count))
        return count, time_updates(count)


def _time_evaluation(run: Run) -> float:
    """Return the seconds of an evaluation, from its first batches."""
    batches = max([len(loader) for loader in run.streams.evaluation.values()], default=0)
    if not (run.streams.evaluation_samples and batches):
        return 0.0

    def seconds(most: int) -> float:
        started = monotonic()
        run.measure(only_draws=False, most=most)
        wait_for(run.learner.runtime.device)
        return monotonic() - started

    seconds(1)
    first = seconds(1)
    most = min(batches, _BATCHES)
    rest = (seconds(most) - first) / (most - 1) if most > 1 else 0.0
    return first + max(0.0, rest) * (batches - 1)


def wait_for(device: torch.device) -> None:
    """Wait until a GPU has done its work."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
