"""The learning-rate range test: the run's own updates at rising rates, before the first one, and then undone.

    find_lr(run, config)      on all ranks; sets the run's rate, or says why it stays

The updates are those of the run: its precision, accumulation, clipping, ranks and parameter groups, whose rates keep
their ratios. Their samples come from beyond the end of the run, so the run reads none of them with the same key.
Source: Smith, "Cyclical Learning Rates for Training Neural Networks", WACV 2017 (arXiv:1506.01186), section 3.3.
"""

import copy
import math
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import Any

import torch

from engine.config import LRFinderConfig, TrainingConfig
from engine.learner import Learner
from engine.lr_suggestion import Curve, Suggestion, smooth, suggest
from engine.run_parts import Run
from engine.task import checkpointed_state
from optim.groups import set_peak_lr
from optim.schedules import GroupValues, Schedule
from utils.contracts import Batch
from utils.io.files import ignore_write_errors, write_json
from utils.ranks import distributed
from utils.record.logging import get_logger
from utils.record.progress import counting

log = get_logger(__name__)

_LEAST_UPDATES = 30  # with fewer, what is suggested varies by more than a factor 3
_LEAST_BEFORE_DIVERGING = 5  # updates whose noise does not count as divergence
_MOST_SKIPPED = 4  # in a row, by the loss scale of fp16: gradients that have grown more than 8 times diverge


@dataclass(frozen=True)
class RangeSweep:
    """A stand-in for a run's schedule: a rising rate; momentum as the optimiser has it, the rest as the run begins."""

    base: Schedule
    config: LRFinderConfig
    steps: int

    def at(self, step: int) -> GroupValues:
        """Return the values of update number `step` (from 0) of the sweep."""
        low, high, fraction = self.config.start_lr, self.config.end_lr, step / max(1, self.steps - 1)
        exponential = self.config.curve == "exponential"
        rate = low * (high / low) ** fraction if exponential else low + (high - low) * fraction
        return GroupValues(rate, self.base.at(0).weight_decay)

    def knobs_at(self, step: int) -> dict[str, float]:
        """Return the task's scheduled values as the run begins."""
        return self.base.knobs_at(0)


@contextmanager
def undone(learner: Learner) -> Iterator[None]:
    """Undo all updates of the learner that are made inside the context, bit for bit.

    Restored are the task's tensors (buffers included), the optimiser's state and group values, the loss scale, the
    schedule, the step and torch's generators. Averages take no part.
    """
    tensors = [(tensor, tensor.clone()) for tensor in checkpointed_state(learner.task).values()]
    optimizer, scale = learner.optimizer, {name: value.clone() for name, value in learner.scale.state().items()}
    state = {parameter: _copy_values(values) for parameter, values in optimizer.state.items()}
    groups = [{key: copy.deepcopy(group[key]) for key in group if key != "params"} for group in optimizer.param_groups]
    schedule, step, averages = learner.schedule, learner.step, learner.averages
    learner.averages = None
    device = learner.runtime.device
    try:
        with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
            yield
    finally:
        with torch.no_grad():
            for tensor, before in tensors:
                tensor.copy_(before)
        optimizer.zero_grad(set_to_none=True)
        optimizer.state.clear()
        optimizer.state.update(state)
        for group, before in zip(optimizer.param_groups, groups):
            parameters = group["params"]
            group.clear()
            group.update({"params": parameters, **before})
        learner.scale.load(scale)
        learner.schedule, learner.step, learner.averages = schedule, step, averages


def _copy_values(values: dict[str, Any]) -> dict[str, Any]:
    return {
        key: value.clone() if isinstance(value, torch.Tensor) else copy.deepcopy(value) for key, value in values.items()
    }


def range_test(run: Run, batches: Iterator[Sequence[Batch]], config: LRFinderConfig, steps: int) -> Curve | None:
    """Make at most `steps` updates at rising rates; returns the curve, None where a rank was asked to stop.

    Call it inside `undone`. Groups that the run freezes only at first (`optim.rules`) are trained: the rate is theirs,
    too.
    """
    learner = run.learner
    for group in learner.optimizer.param_groups:
        if group["freeze_steps"] < run.plan.total_steps:
            group["freeze_steps"] = 0
    sweep = RangeSweep(learner.schedule, config, steps)
    learner.schedule = sweep
    rates: list[float] = []
    losses: list[float] = []
    smoothed: list[float] = []
    first_update_sec, skipped, started = 0.0, 0, time.perf_counter()
    with counting("learning-rate range test") as report:
        for number in range(steps):
            run.recorder.phase(0, f"range test, update {number + 1} of {steps}")
            set_peak_lr(learner.optimizer, sweep.at(number).lr)
            result = learner.update(next(batches), stop=run.must_stop)
            if result.stop > 0:
                return None
            first_update_sec = first_update_sec or time.perf_counter() - started
            report(number + 1, steps)
            total, weight = (float(value) for value in result.sums["loss"])
            if result.weight == 0:
                continue  # no image could be read
            if not result.applied:
                skipped += 1
                # At first the loss scale of fp16 is too high, later for a moment: no fault of the rate.
                if learner.scale.enabled and (not losses or skipped < _MOST_SKIPPED):
                    continue
                return Curve(rates, losses, smoothed, True, first_update_sec)
            skipped = 0
            rates.append(sweep.at(number).lr)
            losses.append(total / weight)
            smoothed = smooth(losses, config.smoothing)
            if len(losses) > _LEAST_BEFORE_DIVERGING and smoothed[-1] > config.diverge_factor * min(smoothed):
                return Curve(rates, losses, smoothed, True, first_update_sec)
    return Curve(rates, losses, smoothed, skipped > 0 and not losses, first_update_sec)


def find_lr(run: Run, config: TrainingConfig) -> bool:
    """Find the run's peak rate by a range test and use it; keep the configured one where the curve has no answer.

    Returns False where the run was asked to stop meanwhile.
    """
    finder, plan, started = config.lr_finder, run.plan, time.perf_counter()
    share = math.floor(finder.max_share * plan.total_steps)
    steps = min(finder.steps, share)
    if steps < _LEAST_UPDATES:
        limit, remedy = "lr_finder.steps", f"set lr_finder.steps to {_LEAST_UPDATES} or more"
        if share <= finder.steps:
            limit = f"lr_finder.max_share={finder.max_share:g} of the run"
            needed = math.ceil(_LEAST_UPDATES / finder.max_share)
            remedy = f"a run of {needed} steps has a range test, or one with a higher lr_finder.max_share"
        log.warning(
            "lr_finder: %d steps are %s, and %d are needed; the rate stays %.3g. For a range test: %s",
            steps, limit, _LEAST_UPDATES, plan.lr, remedy,
        )  # fmt: skip
        return True
    batches = run.streams.train.steps(plan.total_steps, plan)
    try:
        with undone(run.learner):
            curve = range_test(run, batches, finder, steps)
    finally:
        batches.close()
    if curve is None:
        log.warning("lr_finder: stopped on request; the same command makes the range test again")
        return False
    adaptive = not isinstance(run.learner.optimizer, torch.optim.SGD)
    found = suggest(curve, finder.suggestion, finder.smoothing, adaptive=adaptive)
    seconds = time.perf_counter() - started
    if found.taken is None:
        log.warning("lr_finder: no answer in the curve: %s. The rate stays %.3g", found.reason, plan.lr)
    else:
        listed = ", ".join(f"{name} {rate:.3g}" for name, rate in found.rates.items())
        log.info("lr_finder: %s; takes %.3g (%s); configured was %.3g", listed, found.taken, found.reason, plan.lr)
        run.use_lr(found.taken)
    if found.warning is not None:
        log.warning("lr_finder: %s", found.warning)
    log.info("lr_finder: %d updates with a loss in %.1f s, undone", len(curve.losses), seconds)
    distributed.rank_zero_call(lambda: _write(run, curve, found, seconds))
    return True


def _write(run: Run, curve: Curve, found: Suggestion, seconds: float) -> None:
    """Write lr_finder.json and, of a curve with points, plots/lr_finder_plot.png; on rank 0."""
    from utils.record.lr_plot import plot_range_test  # imports matplotlib

    folder = run.saver.folder
    file, picture = folder.path / "lr_finder.json", folder.plots / "lr_finder_plot.png"
    with ignore_write_errors(file):
        values = {"configured": run.plan.lr, **asdict(found), "seconds": seconds, "curve": asdict(curve)}
        write_json(file, values)
    if not curve.losses:
        return  # nothing to draw
    with ignore_write_errors(picture):
        outcome = "no answer" if found.taken is None else f"takes {found.taken:.3g}"
        title = f"{folder.path.resolve().name}: range test, {len(curve.losses)} updates, {outcome}"
        plot_range_test(curve.rates, (curve.losses, curve.smoothed), found.rates, found.method, title, picture)
    log.info("lr_finder: see %s", picture)
