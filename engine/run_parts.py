"""The parts of a run, and how they are built."""

from dataclasses import dataclass, field, replace

import torch

from engine.batch_size import shape_of
from engine.checkpoint import Saver
from engine.config import TrainingConfig
from engine.evaluator import Evaluator
from engine.learner import Learner
from engine.plan import Plan
from engine.recorder import Recorder
from engine.runtime import Runtime
from engine.step import fits_alone
from engine.streams import Streams
from engine.task import Task, fingerprint_frozen
from optim.groups import set_peak_lr
from utils.ranks import distributed
from utils.ranks.signals import StopRequest
from utils.record.run_folder import RunFolder


@dataclass
class Run:
    """One run: learner, recorder, evaluator and saver, and what connects them.

    found_lr: the peak rate that a range test has found; it is checkpointed, so a resumed run does not search again.
    memory: GiB by part at the first step of this process (engine/recorder.py).
    """

    learner: Learner
    recorder: Recorder
    evaluator: Evaluator
    saver: Saver
    streams: Streams
    plan: Plan
    stop: StopRequest
    fingerprints: dict[str, str]
    found_lr: float | None = None
    memory: dict[str, float] = field(default_factory=dict)

    @property
    def step(self) -> int:
        """Updates done."""
        return self.learner.step

    @property
    def is_complete(self) -> bool:
        """Whether all steps are done, or the best value is too old (`loop.early_stop_epochs`)."""
        is_measured = self.plan.total_steps > 0 or bool(self.evaluator.last_report)
        return (self.step >= self.plan.total_steps and is_measured) or self.evaluator.has_stalled

    @property
    def must_stop(self) -> bool:
        """Whether this rank asks to end: a signal came."""
        return self.stop.requested

    def rehearse(self) -> None:
        """Halve the micro-batches, on all ranks alike, until every rank can make a pass over each shape.

        The optimiser's state and the ranks' buckets of gradients, which do not exist yet, take their share of memory.
        """
        learner, train, device = self.learner, self.streams.train, self.learner.runtime.device
        trained = sum(parameter.nbytes for group in learner.optimizer.param_groups for parameter in group["params"])
        reserve = torch.empty(3 * trained if device.type == "cuda" else 0, dtype=torch.uint8, device=device)
        for shape in range(train.shapes):
            batch = train.trial_batch(shape, self.plan.micro_batch_size)
            while not all(distributed.gather_objects(fits_alone(learner, learner.micro_batches.split([batch])[0]))):
                part = learner.micro_batches.split([batch])[0]
                learner.micro_batches.halve(shape_of(part), len(part["weight"]))
        del reserve
        if device.type == "cuda":
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats(device)

    def use_lr(self, lr: float) -> None:
        """Take a peak learning rate that was found, in place of the configured one."""
        self.found_lr = lr
        self.learner.schedule = replace(self.learner.schedule, lr=lr)
        set_peak_lr(self.learner.optimizer, lr)

    def open_records(self) -> None:
        """Open the files that are written row by row, without rows beyond this step."""
        train = self.streams.train
        self.recorder.open(self.step, train.path_of, goes_on=not self.is_complete, readings=train.readings)


def build_run(
    task: Task,
    streams: Streams,
    config: TrainingConfig,
    plan: Plan,
    runtime: Runtime,
    folder: RunFolder,
    stop: StopRequest,
) -> Run:
    """Build learner, recorder, evaluator and saver for a run folder."""
    frozen = fingerprint_frozen(task)
    learner = Learner(task, config, plan, runtime)
    recorder = Recorder(config, plan, learner.values_at, runtime, folder.path)
    saver = Saver(folder, config.loop, frozen)
    evaluator = Evaluator(streams, plan, config.loop, recorder, saver)
    fingerprints = {**streams.fingerprints, **{f"frozen.{name}": value for name, value in frozen.items()}}
    return Run(learner, recorder, evaluator, saver, streams, plan, stop, fingerprints)
