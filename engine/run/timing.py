"""Measure at the start of a run how many steps fit into `loop.minutes`.

Updates and parts of evaluations are timed on the machine and the data of the run, then undone. The minutes include the
start of the script, the evaluations, and the files at the end. engine/run/pace.py keeps the number and corrects it.
"""

import math
from collections.abc import Callable
from contextlib import closing
from time import monotonic

import torch
from torch import Tensor, nn

from engine.plan import Plan, plan_streams
from engine.run.loop import Run
from engine.run.pace import Length, Pace, Speed, read_minutes
from engine.update.runtime import Runtime
from utils.ranks import distributed
from utils.ranks.signals import check_stop
from utils.record.logging import log
from utils.start import STARTED

_WARM_UP_UPDATES = 3  # the first ones are slow
_TIMING_SHARE = 0.02  # of the time for a timing of updates; a stream has two
_MOST_TIMED_UPDATES = 50  # of a timing
_FEW_UPDATES = 8  # if fewer updates than this fit into a timing, one warm-up update is enough
_TIMED_BATCHES = 8  # of an evaluation
_LEAST_SHARE = 0.1  # of the minutes is for updates, even if the start has taken the others
_END_SEC = 4.5  # the last pictures and weights
_NETWORK_SEC = {"cpu": 1.0, "cuda": 0.3}  # of a network alone; on an idle GPU the times are equal


def fit_minutes(run: Run) -> None:
    """Give the run the number of steps that fit into its minutes, measured now or by its first start.

    Steps have a tenth of the minutes at least: if the start took too long, the run takes longer than its minutes.
    """
    minutes = run.config.loop.minutes
    length = read_minutes(run.folder.path, minutes)
    speed = None
    finish = run.evaluator.finish
    end_sec = _END_SEC + (0.0 if finish is None else finish.seconds)
    if length is None:
        speed = _time_steps(run, _TIMING_SHARE * 60 * minutes)
        length, late_sec = _measure_length(run, minutes, speed, end_sec)
        end_sec -= late_sec
    run.pace = Pace(run.folder.path, length, run.recorder.clock.mark(run.step), speed, end_sec)
    run.use_length(length.steps_before(run.step))


def _measure_length(run: Run, minutes: float, speed: Speed, end_sec: float) -> tuple[Length, float]:
    """Time an evaluation. Return the length of the run, with the number of steps that fit, and the seconds beyond."""

    def plan_of(steps: int) -> Plan:
        return plan_streams(run.config, run.streams, run.plan.world_size, steps)

    run.evaluator.seconds = _time_evaluation(run)
    start_sec = monotonic() - STARTED
    left = 60 * minutes - start_sec - end_sec
    most = max(left, _LEAST_SHARE * 60 * minutes + run.evaluator.seconds)
    steps = max(1, distributed.rank_zero_call(lambda: _count_steps(most, speed, run.evaluator.seconds, plan_of)))
    plan = plan_of(steps)
    late_sec = speed.seconds_to(steps) + plan.evaluations_after(0) * run.evaluator.seconds - left
    step = f"{speed.first:.3g} s, after the first epoch {speed.later:.3g} s"
    measured = f"a step takes {step}, an evaluation {run.evaluator.seconds:.3g} s, the start took {start_sec:.3g} s"
    warmup = f", {plan.warmup_steps:,} steps of warm-up" if plan.warmup_steps else ""
    length = f"{steps:,} steps, {plan.epoch_at(steps):.3g} epochs{warmup}"
    log.info("loop.minutes=%g: %s; %s", minutes, length, measured)
    if late_sec > 0:
        log.warning("loop.minutes: %g are too few: the run takes about %.3g s more", minutes, late_sec)
    return Length(minutes=minutes, steps=steps, words=list(run.folder.job.planned)), max(0.0, late_sec)


def _count_steps(left: float, speed: Speed, evaluation_sec: float, plan_of: Callable[[int], Plan]) -> int:
    """Return the number of steps that leave time for evaluations and a range test."""
    steps = int(left / min(speed.first, speed.later))
    while steps >= 1:  # fewer steps may have fewer evaluations
        plan = plan_of(steps)
        fewer = speed.count(left - plan.evaluations_after(0) * evaluation_sec) - plan.range_test_steps
        if fewer >= steps:
            break
        steps = fewer
    return steps


def _time_steps(run: Run, seconds: float) -> Speed:
    """Return the speed of updates: the mean of all streams by their share of the run. The same updates are timed twice.

    seconds: the duration of a timing.
    """
    shares = [phase.fraction for phase in run.config.loop.phases or ()]
    shares.append(1 - math.fsum(shares))
    first = later = 0.0
    for number, share in enumerate(shares):
        count, stream_sec = _time_stream(run, number, seconds)
        first += share * stream_sec
        later += share * _time_stream(run, number, seconds, count)[1]
    return Speed(first, later, run.plan.epoch_length // run.plan.batch_size)


def _time_stream(run: Run, phase: int, seconds: float, count: int | None = None) -> tuple[int, float]:
    """Time updates of one stream and undo them. Return the number of updates and their mean seconds."""
    from engine.run.lr_finder import undone

    learner = run.learner

    def time_updates(count: int) -> float:
        started = monotonic()
        for number in range(count):
            run.recorder.enters(0, f"loop.minutes, update {number + 1}")
            check_stop()
            learner.update(next(batches))
        wait_for(learner.runtime.device)
        return distributed.rank_zero_call(lambda: (monotonic() - started) / count)

    with undone(learner), closing(run.read(phase, run.plan.total_steps)) as batches:
        time_updates(1)  # may compile
        for _ in range(_WARM_UP_UPDATES):
            about = time_updates(1)
            if about > seconds / _FEW_UPDATES:
                break
        # Batches that are read ahead are used up first: the timing then waits for data as the run will.
        ahead = learner.runtime.workers * learner.runtime.prefetch_batches
        if count is None:
            count = min(max(_MOST_TIMED_UPDATES, ahead), int(seconds / max(about, 1e-6)))
        if count < 1:
            return 0, about
        if ahead:
            time_updates(min(ahead, count))
        return count, time_updates(count)


def _time_evaluation(run: Run) -> float:
    """Return the seconds of an evaluation, estimated from its first batches."""
    batches = max([len(loader) for loader in run.streams.evaluation.values()], default=0)
    if not (run.streams.evaluation_samples and batches):
        return 0.0

    def seconds(most: int) -> float:
        started = monotonic()
        run.evaluator.measure(only_draws=False, most=most)
        wait_for(run.learner.runtime.device)
        return monotonic() - started

    seconds(1)
    first = seconds(1)
    most = min(batches, _TIMED_BATCHES)
    rest = (seconds(most) - first) / (most - 1) if most > 1 else 0.0
    return first + max(0.0, rest) * (batches - 1)


def wait_for(device: torch.device) -> None:
    """Wait until a GPU has done its work."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def time_update(network: nn.Module, images: Tensor, runtime: Runtime) -> float:
    """Return the seconds of an update of a network by a batch of images, without the time to read images."""
    from engine.update.graphs import record_graph

    optimizer = torch.optim.SGD(network.parameters(), lr=0.0, momentum=0.9)

    def update() -> None:
        with runtime.autocast():
            loss = network(images).float().square().mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    for _ in range(_WARM_UP_UPDATES):
        update()
    try:
        repeat, _ = record_graph(update, runtime.device)
    except RuntimeError:  # the network waits for the GPU, as its training will
        repeat = update
    started = monotonic()
    count = 0
    while monotonic() < started + _NETWORK_SEC[runtime.device.type]:
        repeat()
        wait_for(runtime.device)
        count += 1
    return (monotonic() - started) / count
