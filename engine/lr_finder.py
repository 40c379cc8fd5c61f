"""The learning-rate range test: the run's own updates at rising rates, before the first one, and then undone.

    find_lr(run, config)      on all ranks; sets the run's rate, or says why it stays

The rule: the rate rises by a constant factor from 1e-5 to 10 over at least 100 updates. The run takes the rate at which
the smoothed loss has risen from its lowest by a quarter of its fall, the edge of stability; an adaptive optimiser,
whose first updates bear more than a run does, takes a tenth of it. Falls and rises of no more than noise do not count.

The updates are those of the run: its precision, accumulation, clipping, ranks and parameter groups, whose rates keep
their ratios. Their samples come from beyond the end of the run, so the run reads none of them with the same key.
Source: Smith, "Cyclical Learning Rates for Training Neural Networks", WACV 2017 (arXiv:1506.01186), section 3.3.
"""

import copy
import math
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np
import torch

from engine.config import TrainingConfig
from engine.learner import Learner
from engine.plan import shortest_tested
from engine.run_parts import Run
from engine.step import Asks
from engine.task import checkpointed_state
from optim.groups import set_peak_lr
from optim.schedules import GroupValues, Schedule
from utils.contracts import Batch
from utils.io.files import ignore_write_errors, write_json
from utils.ranks import distributed, sharded
from utils.record.logging import get_logger
from utils.record.progress import counting

log = get_logger(__name__)

_LOWEST_RATE, _HIGHEST_RATE = 1e-5, 10.0
_WIDTH = 9  # losses in a mean
_RISE = 0.25  # of the fall before
_NOISE = 3.0  # standard deviations of such a mean: the least fall, and the least rise
_ADAPTIVE_SHARE = 0.1
_MOST_SKIPPED = 4  # in a row, by the loss scale of fp16: gradients that have grown more than 8 times diverge


@dataclass
class Curve:
    """A range test: learning rates, ascending, and the losses at them.

    diverged: the losses ended early; first_update_sec: the first update, which compiles where the run is compiled.
    """

    rates: list[float] = field(default_factory=list)
    losses: list[float] = field(default_factory=list)
    diverged: bool = False
    first_update_sec: float = 0.0

    @property
    def smoothed(self) -> np.ndarray:
        """The mean of each loss and its neighbours, _WIDTH in all; fewer at the ends."""
        losses, half = np.asarray(self.losses), _WIDTH // 2
        places = range(len(losses))
        return np.array([losses[max(0, place - half) : place + half + 1].mean() for place in places])


def suggest(curve: Curve, *, adaptive: bool) -> tuple[float | None, str]:
    """Return the rate that a curve suggests, None where it has no answer; and the reason."""
    count = len(curve.losses)
    if count < 2 * _WIDTH:
        return None, f"the loss diverged after {count} updates"
    smoothed = curve.smoothed
    # The noise of one loss, from the differences of neighbours where the rates are low; then of a mean.
    noise = float(np.std(np.diff(curve.losses[: max(_WIDTH, count // 3)]))) / math.sqrt(2 * _WIDTH)
    first, lowest, edge = float(np.median(curve.losses[: 2 * _WIDTH])), math.inf, count - 1 if curve.diverged else None
    for place, loss in enumerate(smoothed):
        lowest = min(lowest, loss)
        fall, rise = first - lowest, loss - lowest
        if fall > _NOISE * noise and rise > max(_RISE * fall, _NOISE * noise):
            edge = place
            break
    if first - lowest <= _NOISE * noise:
        return None, f"the loss does not fall by more than its noise (from {first:.4g} to {lowest:.4g})"
    if edge is None:
        return None, f"the loss still falls at a rate of {curve.rates[-1]:.3g}"
    rate = curve.rates[edge]
    if adaptive:
        return _ADAPTIVE_SHARE * rate, f"a tenth of {rate:.3g}, where the loss rises, for an adaptive optimiser"
    return rate, "where the loss rises"


@dataclass(frozen=True)
class RangeSweep:
    """A stand-in for a run's schedule: a rising rate; momentum as the optimiser has it, the rest as the run begins."""

    base: Schedule
    steps: int

    def at(self, step: int) -> GroupValues:
        """Return the values of update number `step` (from 0) of the sweep."""
        rate = _LOWEST_RATE * (_HIGHEST_RATE / _LOWEST_RATE) ** (step / (self.steps - 1))
        return GroupValues(rate, self.base.at(0).weight_decay)

    def progress_at(self, step: int) -> float:
        """Return 0: the run begins."""
        return 0.0


@contextmanager
def undone(learner: Learner) -> Iterator[None]:
    """Undo all updates of the learner that are made inside the context, bit for bit.

    Restored are the task's tensors (buffers included), the optimiser's state and group values, the loss scale, the
    schedule, the step and torch's generators. Averages take no part. The task's tensors are kept in the host's memory.
    """
    own = map(sharded.own_part, checkpointed_state(learner.task).values())
    tensors = [(tensor, tensor.to("cpu", copy=True)) for tensor in own]
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


def thaw(learner: Learner, total_steps: int) -> None:
    """Train what a run of `total_steps` freezes only at first (`optim.rules`); inside `undone`."""
    for group in learner.optimizer.param_groups:
        if group["freeze_steps"] < total_steps:
            group["freeze_steps"] = 0


def range_test(run: Run, batches: Iterator[Sequence[Batch]], steps: int) -> Curve | None:
    """Make at most `steps` updates at rising rates; returns the curve, None where a rank was asked to stop.

    Call it inside `undone`. It ends where the loss is not finite or has doubled. Groups that the run freezes only at
    first (`optim.rules`) are trained: the rate is theirs, too.
    """
    learner, curve, skipped, started = run.learner, Curve(), 0, time.perf_counter()
    thaw(learner, run.plan.total_steps)
    sweep = RangeSweep(learner.schedule, steps)
    learner.schedule = sweep
    with counting("learning-rate range test") as report:
        for number in range(steps):
            run.recorder.phase(0, f"range test, update {number + 1} of {steps}")
            set_peak_lr(learner.optimizer, sweep.at(number).lr)
            result = learner.update(next(batches), Asks(stop=run.must_stop))
            if result.asked[0] > 0:
                return None
            curve.first_update_sec = curve.first_update_sec or time.perf_counter() - started
            report(number + 1, steps)
            total, weight = (float(value) for value in result.sums["loss"])
            if result.weight == 0:
                continue  # no image could be read
            skipped = 0 if result.applied else skipped + 1
            # At first the loss scale of fp16 is too high, later for a moment: no fault of the rate.
            if skipped and learner.scale.enabled and (not curve.losses or skipped < _MOST_SKIPPED):
                continue
            if result.applied:
                curve.rates.append(sweep.at(number).lr)
                curve.losses.append(total / weight)
            first = curve.losses[0] if curve.losses else 0.0
            if not result.applied or np.mean(curve.losses[-_WIDTH:]) > first + abs(first):
                curve.diverged = True
                break
    return curve


def find_lr(run: Run, config: TrainingConfig) -> bool:
    """Find the run's peak rate by a range test and use it; keep the configured one where the curve has no answer.

    Returns False where the run was asked to stop meanwhile.
    """
    steps, plan, started = config.lr_finder.steps, run.plan, time.perf_counter()
    needed = shortest_tested(config.lr_finder)
    if plan.total_steps < needed:
        log.warning(
            "lr_finder: %d updates are more than lr_finder.max_share=%g of this run's %d; the rate stays %.3g. A run "
            "of %d steps has a range test",
            steps, config.lr_finder.max_share, plan.total_steps, plan.lr, needed,
        )  # fmt: skip
        return True
    batches = run.streams.train.steps(plan.total_steps, plan)
    try:
        with undone(run.learner):
            curve = range_test(run, batches, steps)
    finally:
        batches.close()
    if curve is None:
        log.warning("lr_finder: stopped on request; the same command makes the range test again")
        return False
    rate, reason = suggest(curve, adaptive=not isinstance(run.learner.optimizer, torch.optim.SGD))
    seconds = time.perf_counter() - started
    if rate is None:
        log.warning("lr_finder: no answer: %s. The rate stays %.3g", reason, plan.lr)
    else:
        log.info("lr_finder: takes %.3g, %s; configured was %.3g; %.1f s", rate, reason, plan.lr, seconds)
    distributed.rank_zero_call(lambda: _write(run, curve, rate, {"reason": reason, "seconds": seconds}))
    if rate is not None:
        run.use_lr(rate)
    return True


def _write(run: Run, curve: Curve, rate: float | None, about: dict[str, Any]) -> None:
    """Write lr_finder.json and, of a curve with points, plots/lr_finder_plot.png; on rank 0."""
    from utils.record.plots import plot_range_test  # imports matplotlib

    folder, smoothed = run.saver.folder, curve.smoothed.tolist()
    file, picture = folder.path / "lr_finder.json", folder.plots / "lr_finder_plot.png"
    with ignore_write_errors(file):
        write_json(file, {"configured": run.plan.lr, "taken": rate, **about, **asdict(curve), "smoothed": smoothed})
    if not curve.losses:
        return  # nothing to draw
    with ignore_write_errors(picture):
        outcome = "no answer" if rate is None else f"takes {rate:.3g}"
        title = f"{folder.path.resolve().name}: range test, {len(curve.losses)} updates, {outcome}"
        plot_range_test(curve.rates, (curve.losses, smoothed), rate, title, picture)
    log.info("lr_finder: see %s", picture)
