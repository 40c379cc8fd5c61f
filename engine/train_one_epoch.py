"""train_one_epoch: the only loop. Every entry point runs it.

One pass of the body is one optimiser update. What is due after it depends on the step alone, so a resumed run does the
same things at the same steps.
"""

from collections.abc import Iterator

import torch
from torch import Tensor

from engine.config import LoopConfig
from engine.recorder import memory_by_part, show_memory
from engine.resume import save
from engine.run_parts import Run
from engine.step import Asks, StepResult
from utils.contracts import Batch
from utils.ranks import distributed
from utils.record.logging import get_logger

log = get_logger(__name__)


class Vote:
    """Learn, without waiting for the device, what any rank asks for, so that all stop, or save, at the same step.

    On a GPU the counts are copied in the background, and read one step later.
    """

    def __init__(self) -> None:
        self._pending: tuple[Tensor, torch.cuda.Event] | None = None

    def read(self, result: StepResult, own: Asks) -> Asks:
        """Return what any rank asked for at this step, or at the step before (GPU ranks). own: of a single process."""
        if not distributed.is_distributed():
            return own
        counts: Tensor | None = result.asked
        if result.asked.device.type == "cuda":
            counts, copy = None, torch.empty(2, dtype=result.asked.dtype, pin_memory=True)
            if self._pending is not None:
                counts, event = self._pending
                event.synchronize()
            self._pending = copy.copy_(result.asked, non_blocking=True), torch.cuda.Event()
            self._pending[1].record()
        return Asks() if counts is None else Asks(*(count > 0 for count in counts.tolist()))


def train_one_epoch(run: Run, stream: Iterator[list[Batch]], loop: LoopConfig, epoch: int, vote: Vote) -> bool:
    """Run the stream to the end of an epoch, or of the run; returns False where it was asked to stop (and has saved).

    Raises UserError where the last checkpoint cannot be written or too many steps were skipped. `stream` yields this
    rank's micro-batches of step after step, beginning with the run's next step.
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
        is_due = run.saver.is_due()
        result = learner.update(batches, Asks(run.must_stop, is_due))

        # 3. The record.
        recorder.add_step(learner.step, batches, result)
        if not run.memory:
            run.memory = memory_by_part(learner)
            log.info("memory at the first step: %s", show_memory(run.memory))

        # 4. What is due. Figures come before the checkpoint, so that a resumed run has them.
        step = learner.step
        last = step == plan.total_steps
        asked = vote.read(result, Asks(run.must_stop, is_due))
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
        if step % loop.checkpoint_every_steps == 0 or any(asked) or last:
            save(run, last=last or asked.stop)
        if last or asked.stop:
            return last
    return True
