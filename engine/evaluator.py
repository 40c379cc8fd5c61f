"""The evaluator: measures the weights that a run exports, and keeps the best of them."""

import math
from collections.abc import Iterable, Mapping, Sized
from contextlib import nullcontext
from dataclasses import dataclass, field

import torch

from engine.checkpoint import Saver
from engine.config import LoopConfig
from engine.learner import Learner
from engine.parallel import reshard
from engine.plan import Plan
from engine.recorder import Recorder
from engine.streams import Streams
from engine.task import Report
from utils.contracts import Batch
from utils.record.figures import show_evaluated
from utils.record.logging import get_logger
from utils.record.progress import track

log = get_logger(__name__)

_SHOWN = 3  # figures of a report on the screen


@dataclass
class Best:
    """The best evaluation so far: value of the task's best_metric, and its step."""

    value: float | None = None
    step: int | None = None


@dataclass
class Evaluator:
    """Evaluate a learner on the evaluation streams, every `plan.evaluate_every_epochs`.

    What is exported is measured: the average where there is one. last_report, last_step: of the newest evaluation.
    """

    streams: Streams
    plan: Plan
    loop: LoopConfig
    recorder: Recorder
    saver: Saver
    best: Best = field(default_factory=Best)
    last_report: dict[str, float] = field(default_factory=dict)
    last_step: int = 0
    _before: Best | None = None  # while newer best weights are being written

    @property
    def has_stalled(self) -> bool:
        """Whether the newest evaluation is `loop.early_stop_epochs` or more after the best one."""
        patience = self.loop.early_stop_epochs
        if patience is None or self.best.step is None:
            return False
        return self.plan.epoch_at(self.last_step) - self.plan.epoch_at(self.best.step) >= patience - 1e-9

    def evaluate(self, learner: Learner) -> None:
        """Measure what is exported, and write its weights where they are the best."""
        step, plan = learner.step, self.plan
        self.recorder.phase(step, "evaluating")
        learner.sync_buffers()
        self.settle()
        averaged = learner.exports_average
        with learner.averages.swapped() if averaged else nullcontext():
            report = self._measure(learner)
            if self._is_best(learner, report):
                self.saver.write_best(learner)  # copied while the network holds them
                self._before, self.best = self.best, Best(report.scalars[learner.task.best_metric], step)
        self.last_report = {f"ema/{name}" if averaged else name: value for name, value in report.scalars.items()}
        self.last_step = step
        self.recorder.add_row(step, "evaluate", {"epoch": plan.epoch_at(step), **self.last_report})
        shown = [f"{show_evaluated(name)} {value:.4g}" for name, value in list(self.last_report.items())[:_SHOWN]]
        shown += [] if self.best.value is None else [f"best {self.best.value:.4g}"]
        log.info("%s", "  ".join([f"epoch {plan.shown_epoch(step):g}/{plan.epochs:g}", *shown]))
        self.recorder.add_report(step, report.tables, report.images)
        if step > 0:  # a run of no steps has no curves
            self.recorder.plot(step, may_skip=not self.has_stalled)  # they end where the run stops early

    def settle(self) -> None:
        """Wait for best weights that are being written; where the disk refused them, the best before them stays.

        On all ranks, before what is best is saved or compared.
        """
        if self._before is not None and not self.saver.best_is_written():
            self.best = self._before
        self._before = None

    @torch.no_grad()
    def _measure(self, learner: Learner) -> Report:
        learner.task.eval()
        try:
            with learner.runtime.autocast():
                return learner.task.evaluate(self._due_loaders(learner.step), learner.step)
        finally:
            learner.task.train()
            reshard(learner.model)

    def _is_best(self, learner: Learner, report: Report) -> bool:
        task = learner.task
        value, best = report.scalars[task.best_metric], self.best.value
        if not math.isfinite(value):
            log.warning("step %d: %s is %s, so these are not the best weights", learner.step, task.best_metric, value)
            return False
        return best is None or (value < best if task.best_is_lowest else value > best)

    def _due_loaders(self, step: int) -> Mapping[str, Iterable[Batch]]:
        """Return the loaders that are due; each of their batches counts as progress."""

        def watched(name: str, loader: Iterable[Batch]) -> Iterable[Batch]:
            for batch in loader:
                self.recorder.phase(step, f"evaluating {name}", batch)
                yield batch

        due = {}
        for name, loader in self.streams.evaluation.items():
            every = self.streams.every_epochs.get(name)
            if every is None or self.plan.is_due_among(step, every, self.plan.evaluate_every_epochs):
                total = len(loader) if isinstance(loader, Sized) else None
                due[name] = track(watched(name, loader), total, f"evaluating {name}")
        return due
