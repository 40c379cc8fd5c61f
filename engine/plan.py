"""The values derived from the configuration: micro-batch, accumulation, steps, warm-up, learning rate."""

import math
from dataclasses import dataclass
from itertools import accumulate

from engine.config import TrainingConfig
from engine.task import COMPARED, Streams
from optim.config import OneCycleConfig
from utils.record.logging import log

_LEAST_STEPS = 100  # of `loop.total_epochs=auto`: fewer updates learn little, with any batch size
# `loop.evaluate_every_epochs=auto`: at least 5 evaluations; more while they read at most a fifth of training's images.
_EVALUATIONS = 5
_EVALUATION_SHARE = 0.2
# Small collections have short epochs: at least 25 updates lie between two evaluations, and a run has at most 20.
_LEAST_BETWEEN = 25
_MOST_EVALUATIONS = 20
# With loop.minutes: at most a 20th of the time. An image takes a third of its time in training, and the pictures of an
# evaluation take two seconds.
_TIMED_SHARE = 0.15
_EVALUATIONS_A_MINUTE = 1.5
_TEST_SHARE = 0.1  # of a run's updates; lr_finder.enabled=auto makes no longer range test


@dataclass(frozen=True)
class Plan:
    """The derived values of a run. Only the micro-batches and accum_steps depend on the number of ranks.

    phase_ends: the last steps of `loop.phases`; the rest of the run has the run's own size.
    """

    world_size: int
    batch_size: int
    micro_batch_size: int
    accum_steps: int
    epoch_length: int
    total_steps: int
    warmup_steps: int
    lr: float
    evaluate_every_epochs: float = 1.0
    range_test_steps: int = 0  # updates before the first one (engine/run/lr_finder.py)
    phase_ends: tuple[int, ...] = ()

    def epoch_at(self, step: int) -> float:
        """Return the epochs read after `step` updates, as a fraction."""
        return step * self.batch_size / self.epoch_length

    def shown_epoch(self, step: int) -> float:
        """Return the epochs read after `step` updates, rounded to one decimal."""
        return round(self.epoch_at(step), 1)

    def show_epochs(self, step: int) -> str:
        """Return the epochs read after `step` updates and the epochs of the run, as text."""
        return f"epoch {self.shown_epoch(step):g}/{self.shown_epoch(self.total_steps):g}"

    def epoch_end(self, epoch: int) -> int:
        """Return the step that completes epoch number `epoch` (from 0), or the last step of the run."""
        return min(-(-(epoch + 1) * self.epoch_length // self.batch_size), self.total_steps)

    def epoch_of(self, step: int) -> int:
        """Return the epoch of the update that follows `step` updates."""
        return step * self.batch_size // self.epoch_length

    def evaluations_after(self, step: int) -> int:
        """Return the number of evaluations that are due after `step` updates."""
        every = self.evaluate_every_epochs
        return math.ceil(self.epoch_at(self.total_steps) / every - 1e-9) - self._multiples(step, every)

    def is_due(self, step: int, every_epochs: float, since: int | None = None) -> bool:
        """Return whether `step` ends the run or passes a multiple of `every_epochs` after `since` (or step - 1)."""
        before = self._multiples(step - 1 if since is None else since, every_epochs)
        return self._multiples(step, every_epochs) > before or step == self.total_steps

    def _multiples(self, step: int, every_epochs: float) -> int:
        return math.floor(self.epoch_at(step) / every_epochs + 1e-9)


def plan_streams(config: TrainingConfig, streams: Streams, world_size: int, steps: int | None = None) -> Plan:
    """Return the plan of a run on its streams. steps: the length of a run that measures it."""
    loop = config.loop
    size = loop.batch_size
    epoch_length = streams.train.epoch_length
    micro, accum = loop.micro_batches(world_size, streams.train.chunk)
    total = _count_steps(config, epoch_length) if steps is None else steps
    warmup = 0
    if not isinstance(config.schedule, OneCycleConfig):
        stated = count_stated(config, epoch_length / size, total)
        warmup = min(stated, int(config.schedule.warmup_most * total + 1e-9))
    # An evaluation reads the images of all loaders, a probe's too.
    reads = sum(loader.samples for name, loader in streams.evaluation.items() if name != COMPARED)
    every = _evaluate_every(config, total, epoch_length / size, reads / epoch_length)
    ends = tuple(round(total * share) for share in accumulate(phase.fraction for phase in loop.phases or ()))
    rate = config.optim.base_lr * size / 256 if config.optim.lr is None else config.optim.lr
    return Plan(
        world_size=world_size,
        batch_size=size,
        micro_batch_size=micro,
        accum_steps=accum,
        epoch_length=epoch_length,
        total_steps=total,
        warmup_steps=warmup,
        lr=rate,
        evaluate_every_epochs=every,
        range_test_steps=_count_test_steps(config, total),
        phase_ends=ends,
    )


def _count_steps(config: TrainingConfig, epoch_length: int) -> int:
    """Return the updates of the run."""
    loop = config.loop
    if loop.total_steps is not None:
        return loop.total_steps
    epochs = loop.total_epochs
    if epochs == "auto":
        few = min(loop.auto.samples / epoch_length, loop.auto.most_epochs or math.inf)
        epochs = max(loop.auto.epochs, few, _LEAST_STEPS * loop.batch_size / epoch_length)
    return max(1, math.ceil(epochs * epoch_length / loop.batch_size - 1e-9))


def count_stated(config: TrainingConfig, per_epoch: float, total: int) -> int:
    """Return the stated warm-up steps, which a short run cuts. total: the updates of the run.

    A run longer than `loop.auto.epochs` warms up longer, in proportion.
    """
    schedule = config.schedule
    if schedule.warmup_steps is not None:
        return schedule.warmup_steps
    longer = 1.0
    if config.loop.total_epochs == "auto":
        longer = max(1.0, total / per_epoch / config.loop.auto.epochs)
    return round(schedule.warmup_epochs * longer * per_epoch)


def _evaluate_every(config: TrainingConfig, total: int, per_epoch: float, share: float) -> float:
    """Return the epochs between two evaluations. total: updates; share: the part of an epoch that an evaluation reads.

    An evaluation reads no more images than training has read since the last evaluation; only the last one may.
    """
    loop = config.loop
    epochs = total / per_epoch
    if loop.evaluate_every_epochs != "auto":
        return loop.evaluate_every_epochs
    if loop.minutes is not None:
        most = min(_TIMED_SHARE * epochs / share if share else math.inf, _EVALUATIONS_A_MINUTE * loop.minutes)
        return epochs / max(int(most), 1) or 1.0
    every = max(1.0, share / _EVALUATION_SHARE)
    if per_epoch < _LEAST_BETWEEN:
        every = max(every, max(_LEAST_BETWEEN, total / _MOST_EVALUATIONS) / per_epoch)
    return max(share, min(every, epochs / _EVALUATIONS or 1.0))


def _count_test_steps(config: TrainingConfig, total: int) -> int:
    finder = config.lr_finder
    if finder.only:
        return finder.steps
    if not finder.enabled or config.optim.lr is not None:
        return 0
    is_known = config.loop.minutes is None
    if finder.enabled == "auto" and not (is_known and finder.steps <= _TEST_SHARE * total):
        why = f"too short for a test of {finder.steps} updates" if is_known else "of loop.minutes and has no test"
        log.warning("lr_finder: the run is %s; enabled=true makes one", why)
        return 0
    return finder.steps
