"""The evaluator: measures a run's weights, and keeps the best of what is exported."""

import math
from collections.abc import Iterable, Mapping, Sized
from dataclasses import asdict, dataclass, field
from typing import Any

import torch

from engine.config import LoopConfig
from engine.learner import Learner
from engine.parallel import reshard
from engine.plan import Plan
from engine.recorder import Recorder
from engine.saver import Saver
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

    best: of what is exported, the average where there is one; best_raw: then that of the weights themselves, where
    `loop.evaluate_raw` asks for it.
    """

    streams: Streams
    plan: Plan
    loop: LoopConfig
    recorder: Recorder
    saver: Saver
    best: Best = field(default_factory=Best)
    best_raw: Best = field(default_factory=Best)
    last_report: dict[str, float] = field(default_factory=dict)
    last_step: int = 0  # of the newest evaluation
    _before: dict[str, Best] = field(default_factory=dict)  # while newer best weights are being written

    @property
    def has_stalled(self) -> bool:
        """Whether the newest evaluation is `loop.early_stop_epochs` or more after the best one."""
        patience = self.loop.early_stop_epochs
        if patience is None or self.best.step is None:
            return False
        return self.plan.epoch_at(self.last_step) - self.plan.epoch_at(self.best.step) >= patience - 1e-9

    def evaluate(self, learner: Learner) -> None:
        """Measure what is exported, and the weights beside their average where asked; write the best of each.

        The best weights are copied while the network holds the weights that were measured.
        """
        step, scalars = learner.step, {}
        self.recorder.phase(step, "evaluating")
        learner.sync_buffers()
        self.settle()
        if not learner.exports_average or self.loop.evaluate_raw:
            report = self._measure(learner)
            scalars |= report.scalars
            self._keep_best(learner, report, "best_raw" if learner.exports_average else "best", averaged=False)
        if learner.exports_average:
            with learner.averages.swapped():
                report = self._measure(learner)
                scalars |= {f"ema/{name}": value for name, value in report.scalars.items()}
                self._keep_best(learner, report, "best", averaged=True)
        self.last_report, self.last_step = scalars, step
        self.recorder.add_row(step, "evaluate", {"epoch": self.plan.epoch_at(step), **scalars})
        log.info("%s", self._line(step, scalars))
        self.recorder.add_report(step, report.tables, report.images)
        if step > 0:  # a run of no steps has no curves
            self.recorder.plot(step, may_skip=not self.has_stalled)  # they end where the run stops early

    def _line(self, step: int, scalars: Mapping[str, float]) -> str:
        """Return an evaluation's line: the first figures of each report, and the best value so far."""
        shown = {"": 0, "ema/": 0}
        parts = [f"epoch {self.plan.shown_epoch(step):g}/{self.plan.epochs:g}"]
        for name, value in scalars.items():
            prefix = "ema/" if name.startswith("ema/") else ""
            shown[prefix] += 1
            if shown[prefix] <= _SHOWN:
                parts.append(f"{show_evaluated(name)} {value:.4g}")
        return "  ".join([*parts, *([] if self.best.value is None else [f"best {self.best.value:.4g}"])])

    def settle(self) -> None:
        """Wait for best weights that are being written; where the disk refused them, the best before them stays.

        On all ranks, before what is best is saved or compared.
        """
        for name in self.saver.take_refused():
            setattr(self, name, self._before[name])
        self._before.clear()

    def state(self) -> dict[str, Any]:
        """Return what a checkpoint keeps (JSON values)."""
        return {
            "best": asdict(self.best),
            "best_raw": asdict(self.best_raw),
            "last_report": self.last_report,
            "last_evaluated": self.last_step,
        }

    def load_state(self, state: dict[str, Any]) -> None:
        """Restore what `state` returned."""
        self.best, self.last_report = Best(**state["best"]), state["last_report"]
        # Older checkpoints have neither.
        self.best_raw, self.last_step = Best(**state.get("best_raw", {})), state.get("last_evaluated", 0)

    @torch.no_grad()
    def _measure(self, learner: Learner) -> Report:
        learner.task.eval()
        try:
            with learner.runtime.autocast():
                return learner.task.evaluate(self._due_loaders(learner.step), learner.step)
        finally:
            learner.task.train()
            reshard(learner.model)

    def _keep_best(self, learner: Learner, report: Report, name: str, *, averaged: bool) -> None:
        """Write the exported networks as they are now where the report is better than the best named `name`."""
        task, value, best = learner.task, report.scalars[learner.task.best_metric], getattr(self, name)
        if not math.isfinite(value):
            log.warning("step %d: %s is %s, so these are not the best weights", learner.step, task.best_metric, value)
            return
        if best.value is not None and (value >= best.value if task.best_is_lowest else value <= best.value):
            return
        self.saver.write_best(learner, name, averaged=averaged)
        self._before[name] = best
        setattr(self, name, Best(value, learner.step))

    def _due_loaders(self, step: int) -> dict[str, Iterable[Batch]]:
        """Return the loaders that are due; each of their batches counts as progress."""

        def watched(name: str, loader: Iterable[Batch]) -> Iterable[Batch]:
            for batch in loader:
                self.recorder.phase(step, f"evaluating {name}", batch)
                yield batch

        def tracked(name: str, loader: Iterable[Batch]) -> Iterable[Batch]:
            total = len(loader) if isinstance(loader, Sized) else None
            return track(watched(name, loader), total, f"evaluating {name}")

        def is_due(name: str) -> bool:
            every = self.streams.every_epochs.get(name)
            return every is None or self.plan.is_due_among(step, every, self.plan.evaluate_every_epochs)

        return {name: tracked(name, loader) for name, loader in self.streams.evaluation.items() if is_due(name)}
