"""The learning-rate range test: updates at rising learning rates before the first update, which are then undone.

The rate rises by a constant factor from 1e-5 to 10 over at least 100 updates. The run takes the rate at which the
smoothed loss has risen from its minimum by a quarter of its fall (the edge of stability). Adaptive optimisers take a
tenth of it, because their first updates tolerate higher rates than a whole run. Changes within the noise are ignored.

The updates use the run's precision, accumulation, clipping, ranks and parameter groups. Their samples come from beyond
the end of the run, so no augmented sample is seen twice.
Source: Smith, "Cyclical Learning Rates for Training Neural Networks", WACV 2017 (arXiv:1506.01186), section 3.3.
"""

import copy
import math
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path

import numpy as np
import torch

from engine.plan import Plan
from engine.run.recorder import Recorder
from engine.task import checkpointed_state
from engine.update.learner import Learner
from optim.groups import set_peak_lr
from optim.schedules import GroupValues
from utils.contracts import Batch
from utils.io.files import ignore_write_errors, write_json
from utils.ranks import distributed
from utils.ranks.signals import check_stop
from utils.record.logging import log
from utils.record.progress import track

_LOWEST_RATE = 1e-5
_HIGHEST_RATE = 10.0
_SMOOTHED_LOSSES = 9  # losses per mean
_RISE_SHARE = 0.25  # as a share of the fall before
_NOISE_STDS = 3.0  # least fall and rise, in standard deviations of a mean
_ADAPTIVE_SHARE = 0.1
_MOST_SKIPPED = 4  # in a row, because the loss scale of fp16 may be too high at times; blank updates do not count


@dataclass
class _Curve:
    """Ascending learning rates and their losses. diverged: whether the loss diverged, which ends the test early."""

    rates: list[float] = field(default_factory=list)
    losses: list[float] = field(default_factory=list)
    diverged: bool = False

    @property
    def smoothed(self) -> np.ndarray:
        """The moving average of the losses, over _SMOOTHED_LOSSES losses or fewer at the ends."""
        half = _SMOOTHED_LOSSES // 2
        windows = [self.losses[max(0, index - half) : index + half + 1] for index in range(len(self.losses))]
        return np.array([np.mean(window) for window in windows])


def suggest(curve: _Curve, *, adaptive: bool) -> tuple[float | None, str]:
    """Return the suggested learning rate, or None, and the reason."""
    count = len(curve.losses)
    if count < 2 * _SMOOTHED_LOSSES:
        return None, f"the loss diverged after {count} updates"
    # Estimate the noise of a mean from the differences of successive losses at low rates.
    noise = (
        _NOISE_STDS
        * float(np.std(np.diff(curve.losses[: max(_SMOOTHED_LOSSES, count // 3)])))
        / math.sqrt(2 * _SMOOTHED_LOSSES)
    )
    first = float(np.median(curve.losses[: 2 * _SMOOTHED_LOSSES]))
    lowest = np.minimum.accumulate(curve.smoothed)
    falls = first - lowest
    rises = curve.smoothed - lowest
    if falls[-1] <= noise:
        return None, f"the loss does not fall by more than its noise (from {first:.4g} to {lowest[-1]:.4g})"
    edges = np.flatnonzero((falls > noise) & (rises > np.maximum(_RISE_SHARE * falls, noise)))
    if not len(edges) and not curve.diverged:
        return None, f"the loss still falls at a rate of {curve.rates[-1]:.3g}"
    rate = curve.rates[edges[0] if len(edges) else -1]
    if adaptive:
        return _ADAPTIVE_SHARE * rate, f"a tenth of {rate:.3g}, where the loss rises, for an adaptive optimiser"
    return rate, "where the loss rises"


@contextmanager
def undone(learner: Learner) -> Iterator[None]:
    """Undo all updates made inside the context, bit for bit. Averages are not updated. Copies are in host memory."""
    tensors = [(tensor, tensor.to("cpu", copy=True)) for tensor in checkpointed_state(learner.task).values()]
    optimizer = copy.deepcopy(learner.optimizer.state_dict())
    device = learner.runtime.device
    others = {name: getattr(learner, name) for name in ("step", "averages", "scale")}
    learner.averages = None
    try:
        with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
            yield
    finally:
        with torch.no_grad():
            for tensor, before in tensors:
                tensor.copy_(before)
        learner.optimizer.zero_grad(set_to_none=True)
        learner.optimizer.load_state_dict(optimizer)
        for name, value in others.items():
            setattr(learner, name, value)


def rate_at(number: int, steps: int) -> float:
    """Return the learning rate of update `number` (from 0) of a range test."""
    return _LOWEST_RATE * (_HIGHEST_RATE / _LOWEST_RATE) ** (number / (steps - 1))


def range_test(learner: Learner, batches: Iterator[Sequence[Batch]], plan: Plan, recorder: Recorder) -> _Curve:
    """Make up to `plan.range_test_steps` updates at rising rates, inside `undone`; raise Stopped on request.

    The test ends when the loss is not finite or has doubled. Groups frozen only at first (`optim.rules`) are trained.
    """
    curve = _Curve()
    skipped = 0
    steps = plan.range_test_steps
    decay = learner.schedule.at(0).weight_decay
    for group in learner.optimizer.param_groups:
        if group["freeze_steps"] < plan.total_steps:
            group["freeze_steps"] = 0
    for number in track(range(steps), steps, "learning-rate range test"):
        recorder.enters(0, f"range test, update {number + 1} of {steps}")
        values = GroupValues(rate_at(number, steps), decay)
        set_peak_lr(learner.optimizer, values.lr)
        check_stop()
        result = learner.update(next(batches), values)
        if result.applied:
            total, weight = (float(value) for value in result.sums["loss"])
            curve.rates.append(values.lr)
            curve.losses.append(total / weight)
            skipped = 0
        elif result.weight > 0 and curve.losses:  # the first loss scale of fp16 may be far too high
            skipped += 1
        first = curve.losses[0] if curve.losses else math.inf
        if skipped >= _MOST_SKIPPED or np.mean(curve.losses[-_SMOOTHED_LOSSES:] or 0.0) > first + abs(first):
            curve.diverged = True
            break
    return curve


def find_lr(learner: Learner, batches: Iterator[Sequence[Batch]], plan: Plan, recorder: Recorder) -> float | None:
    """Find the peak learning rate by a range test. Return None to keep the configured rate.

    Writes lr_finder.json and plots/lr_finder_plot.png. Raises Stopped on request.
    """
    started = time.perf_counter()
    with undone(learner):
        curve = range_test(learner, batches, plan, recorder)
    rate, reason = suggest(curve, adaptive=not isinstance(learner.optimizer, torch.optim.SGD))
    seconds = time.perf_counter() - started
    if rate is None:
        log.warning("lr_finder: no answer: %s. The rate stays %.3g", reason, plan.lr)
    else:
        log.info("lr_finder: takes %.3g, %s; the configured rate is %.3g; %.1f s", rate, reason, plan.lr, seconds)
    if distributed.is_main():
        smoothed = curve.smoothed.tolist()
        about = {"configured": plan.lr, "taken": rate, "reason": reason, "seconds": seconds, "smoothed": smoothed}
        file = recorder.folder / "lr_finder.json"
        with ignore_write_errors(file):
            write_json(file, {**about, **asdict(curve)})
        if curve.losses:
            _draw(recorder.folder, curve, rate)
    return rate


def _draw(folder: Path, curve: _Curve, rate: float | None) -> None:
    from utils.record.plots import plot_range_test  # imports matplotlib

    title = f"{folder.resolve().name}: range test, {len(curve.losses)} updates"
    picture = folder / "plots/lr_finder_plot.png"
    with ignore_write_errors(picture):
        plot_range_test(curve.rates, (curve.losses, curve.smoothed), rate, title, picture)
    log.info("lr_finder: see %s", picture)
