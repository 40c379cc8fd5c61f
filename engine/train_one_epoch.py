"""train_one_epoch: the only loop. Every entry point runs it.

One pass of the body is one optimiser update. What is due after it depends on the step alone, so a resumed run does the
same things at the same steps.
"""

from collections.abc import Iterator

import torch

from engine.config import LoopConfig
from engine.recorder import memory_by_part, show_memory
from engine.run_parts import Run
from engine.step import STOP, StepResult
from utils.contracts import Batch
from utils.ranks import distributed
from utils.record.logging import get_logger

log = get_logger(__name__)


class Vote:
    """Learn, without waiting for the device, what the ranks ask for: to stop, or to save.

    On a GPU the sum over ranks is copied in the background and read one step later. All ranks read the same number, so
    all stop, or save, at the same step.
    """

    def __init__(self) -> None:
        self._pending: tuple[torch.Tensor, torch.cuda.Event] | None = None

    def read(self, result: StepResult, ask: float) -> float:
        """Return what was asked for at the step before (GPU ranks), or at this one; at least STOP, SAVE or 0."""
        if not distributed.is_distributed():
            return ask
        if result.asked.device.type != "cuda":
            return float(result.asked)
        earlier = self._pending
        copy, event = torch.empty((), dtype=result.asked.dtype, pin_memory=True), torch.cuda.Event()
        copy.copy_(result.asked, non_blocking=True)
        event.record()
        self._pending = (copy, event)
        if earlier is None:
            return 0.0
        earlier[1].synchronize()
        return float(earlier[0])


def train_one_epoch(run: Run, stream: Iterator[list[Batch]], loop: LoopConfig, epoch: int, vote: Vote) -> bool:
    """Run the stream to the end of an epoch, or of the run; returns False where it was asked to stop (and has saved).

    Raises UserError where a checkpoint could not be written or too many steps were skipped. `stream` yields this rank's
    micro-batches of step after step, beginning with the run's next step.
    """
    learner, recorder, plan = run.learner, run.recorder, run.plan
    end = plan.epoch_end(epoch)
    while learner.step < end:
        # 1. Data.
        recorder.phase(learner.step, "loading")
        batches = next(stream)
        recorder.add_samples(learner.step + 1, batches)

        # 2. The update.
        recorder.phase(learner.step, "computing", batches[0])
        ask = run.asks_for(may_save=True)
        result = learner.update(batches, ask=ask)

        # 3. The record.
        recorder.add_step(learner.step, batches, result)
        if not run.memory:
            run.memory = memory_by_part(learner)
            log.info("memory at the first step: %s", show_memory(run.memory))

        # 4. What is due. Figures come before the checkpoint, so that a resumed run has them.
        step = learner.step
        last = step == plan.total_steps
        asked = vote.read(result, max(ask, run.asks_for()))
        stopping = asked >= STOP
        evaluates = plan.is_due(step, plan.evaluate_every_epochs)
        may_end = last or (evaluates and loop.early_stop_epochs is not None)
        if step % loop.log_every_steps == 0 or may_end:
            recorder.log_step(step)
        if loop.plot_every_steps is not None and step % loop.plot_every_steps == 0:
            recorder.plot(step)
        if evaluates:
            if loop.batch_size == "auto" or learner.micro_batches.sizes:
                for loader in run.streams.evaluation.values():
                    loader.set_batch_size(learner.micro_batches.smallest)
            run.evaluator.evaluate(learner)
        last = run.is_complete
        if step == end or last:
            recorder.end_epoch(step, epoch, run.evaluator.last_report)
        if step % loop.checkpoint_every_steps == 0 or asked or last:
            run.save(last=last or stopping)
        if last or stopping:
            return last
    return True
