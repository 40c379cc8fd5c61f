"""The parts of a run, and how they are built."""

from dataclasses import dataclass

import torch

from engine.config import TrainingConfig
from engine.evaluator import Evaluator
from engine.learner import Learner
from engine.plan import Plan
from engine.recorder import Recorder
from engine.runtime import Runtime
from engine.saver import Saver
from engine.streams import Streams
from engine.task import Task, fingerprint_frozen
from utils.ranks.signals import StopRequest
from utils.record.run_folder import RunFolder


@dataclass
class Run:
    """One run: learner, recorder, evaluator and saver, and what connects them.

    passed_over_steps: steps whose samples roll-backs have passed over in the stream.
    """

    learner: Learner
    recorder: Recorder
    evaluator: Evaluator
    saver: Saver
    streams: Streams
    plan: Plan
    stop: StopRequest
    fingerprints: dict[str, str]
    passed_over_steps: int = 0

    @property
    def step(self) -> int:
        """Updates done."""
        return self.learner.step

    @property
    def must_stop(self) -> bool:
        """Whether this rank asks to end the run: a signal came, or a checkpoint could not be written."""
        return self.stop.requested or self.saver.writer.failed

    def open_records(self) -> None:
        """Open the files that are written row by row, without rows beyond this step."""
        self.recorder.open(self.step, self.streams.train.path_of)

    def save(self, *, last: bool) -> None:
        """Write a checkpoint of this step; as `Saver.save`."""
        state = {
            "precision": self.learner.runtime.precision,
            "threads": torch.get_num_threads(),
            "world_size": self.plan.world_size,
            "position": (self.step + self.passed_over_steps) * self.plan.global_batch_size,
            "passed_over": self.passed_over_steps,
            "fingerprints": self.fingerprints,
            "origin": self.learner.task.origin,
            **self.evaluator.state(),
        }
        self.saver.save(self.learner, self.recorder, state, best_step=self.evaluator.best.step, last=last)


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
    recorder = Recorder(config, plan, learner.schedule, runtime, folder.path)
    saver = Saver(folder, config.loop, frozen)
    evaluator = Evaluator(streams, plan, config.loop.evaluate_every_epochs, recorder, saver)
    fingerprints = {**streams.fingerprints, **{f"frozen.{name}": value for name, value in frozen.items()}}
    return Run(learner, recorder, evaluator, saver, streams, plan, stop, fingerprints)
