"""train_one_epoch: the only loop. Every entry point runs it.

One pass of the body is one optimiser update; what is due after it is a question of the step alone, so a resumed run
does the same things at the same steps.
"""

from collections.abc import Iterator

import torch

from engine.step import StepResult, train_step
from engine.task import Batch, Knobs
from engine.training import Training
from optim.ema import ema_decay_at
from optim.groups import set_group_values
from utils.ranks import distributed


class StopVote:
    """Learn, without waiting for the device, whether any rank was asked to stop.

    On a GPU the sum over ranks is copied in the background and read one step later; all ranks read the same number, so
    all stop at the same step.
    """

    def __init__(self) -> None:
        self._pending: tuple[torch.Tensor, torch.cuda.Event] | None = None

    def read(self, result: StepResult, requested: bool) -> bool:
        """Return the vote on the step before (GPU ranks), or on this one."""
        if not distributed.is_distributed():
            return requested
        if result.stop.device.type != "cuda":
            return bool(result.stop > 0)
        earlier = self._pending
        copy, event = torch.empty((), dtype=result.stop.dtype, pin_memory=True), torch.cuda.Event()
        copy.copy_(result.stop, non_blocking=True)
        event.record()
        self._pending = (copy, event)
        if earlier is None:
            return False
        earlier[1].synchronize()
        return bool(earlier[0] > 0)


def _knobs(training: Training) -> Knobs:
    """Return this step's scheduled values as device scalars; a fill needs no host synchronisation."""
    values = training.schedule.knobs_at(training.step)
    return {name: torch.full((), value, device=training.runtime.device) for name, value in values.items()}


def train_one_epoch(training: Training, stream: Iterator[list[Batch]], epoch: int, vote: StopVote) -> bool:
    """Run the stream to the end of an epoch; returns False where the run was asked to stop (and has saved).

    Raises UserError where a checkpoint was refused or too many steps were left out, TooManySkipped for a roll-back.
    `stream` yields this rank's micro-batches of step after step, beginning with the step that `training` is at.
    """
    plan, loop = training.plan, training.loop
    end = plan.epoch_end(epoch)
    while training.step < end:
        # 1. Data and this step's scheduled values.
        training.watchdog.progress(f"step {training.step}: loading")
        batches = next(stream)
        if training.samples is not None:
            training.samples.add(training.step + 1, batches)
        training.watchdog.progress(f"step {training.step}: computing")
        knobs = _knobs(training)
        values = training.schedule.at(training.step)
        set_group_values(training.optimizer, values.lr, values.weight_decay, values.momentum)

        # 2. The update, and what follows the weights.
        result = train_step(
            training.model, training.task, batches, training.optimizer, training.scale, knobs,
            step=training.step, seed=training.seed, clip_grad_norm=loop.clip_grad_norm, runtime=training.runtime,
            stop=training.must_stop,
        )  # fmt: skip
        training.task.after_step(training.step, knobs, result.applied)
        if training.ema is not None:
            training.ema.update(ema_decay_at(training.step, loop.ema_decay), result.applied)
        training.log_meter.add(result)
        training.epoch_meter.add(result)
        training.step += 1
        training.skips.add(training.step, batches, result)
        training.bar.advance(training.step)

        # 3. What is due. Figures come before the checkpoint, so that a resumed run has them.
        last = training.step == plan.total_steps
        stopping = vote.read(result, training.must_stop)
        if training.step % loop.log_every_steps == 0 or last:
            training.log_step()
        if loop.plot_every_steps is not None and training.step % loop.plot_every_steps == 0:
            training.plot()
        if plan.is_due(training.step, loop.evaluate_every_epochs):
            training.evaluate()
        if training.step == end:
            training.end_epoch(epoch)
        if training.step % loop.checkpoint_every_steps == 0 or last or stopping:
            training.save(last=last or stopping)
        if stopping and not last:
            return False
    return True
