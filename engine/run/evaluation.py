"""The evaluations of a run: the figures of the exported weights, and the best weights by one of the figures."""

import math
import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, field

import torch

from engine.config import TrainingConfig
from engine.run.checkpoint import Saver
from engine.run.recorder import Recorder
from engine.task import Finish, Loaders, Report, Streams, checkpointed_state
from engine.update.learner import Learner
from utils.contracts import Batch
from utils.io.files import Json, Values, ignore_write_errors, write_json
from utils.ranks import distributed
from utils.ranks.signals import Stopped, check_stop
from utils.record.figures import COUNTS, interval, show_evaluated
from utils.record.logging import log
from utils.record.progress import track
from utils.record.run_reader import RESULT_FILE

_SHOWN_FIGURES = 3  # figures of an evaluation in the log line


@dataclass(frozen=True)
class Best:
    """The task's best_metric at an evaluation, its 95 % interval if it has one, and the step.

    weights: the checksum of the weight file. figures: the scalars of the evaluation.
    """

    value: float | None = None
    step: int | None = None
    interval: Sequence[float] | None = None
    weights: str = ""
    figures: Values = field(default_factory=dict)


@dataclass
class Evaluator:
    """Evaluate the weights of a run, save the best weights, and tell when the run has stalled.

    gain: the last evaluation that was better than the gain before it by more than `loop.early_stop_least`. report,
    step: the scalars and the step of the newest evaluation. A checkpoint holds these and `best`. tables: the tables of
    the newest evaluation of this process. seconds: the time of the newest evaluation; 0 before the first one.
    finish: completes the weights before the last evaluation.
    """

    learner: Learner
    streams: Streams
    config: TrainingConfig
    recorder: Recorder
    saver: Saver
    best: Best = Best()
    gain: Best = Best()
    report: Values = field(default_factory=dict)
    step: int = 0
    tables: Values = field(default_factory=dict)
    seconds: float = 0.0
    finish: Finish | None = None

    @property
    def has_stalled(self) -> bool:
        """Whether the last gain is `loop.early_stop_epochs` or more before the newest evaluation."""
        patience = self.config.loop.early_stop_epochs
        if patience is None or self.gain.step is None:
            return False
        plan = self.learner.plan
        return plan.epoch_at(self.step) - plan.epoch_at(self.gain.step) >= patience - 1e-9

    @property
    def is_owed(self) -> bool:
        """Whether this step's evaluation is due and not done. In a resumed run, a stop request has interrupted it."""
        plan, step = self.learner.plan, self.learner.step
        return self.step < step and plan.is_due(step, plan.evaluate_every_epochs)

    def evaluate(self) -> None:
        """Evaluate the exported weights (averaged, if averages are exported), and save them if they are the best."""
        learner = self.learner
        recorder = self.recorder
        step = learner.step
        plan = learner.plan
        started = time.perf_counter()
        recorder.enters(step, "evaluating")
        learner.sync_buffers()
        with learner.evaluated():
            trained = []
            if 0 < step == plan.total_steps and self.finish is not None:
                trained = [(tensor, tensor.clone()) for tensor in checkpointed_state(learner.task).values()]
                self.finish.complete(plan.epoch_at(step))
            try:
                report = self.measure(only_draws=self.streams.evaluation_samples == 0)
            except Stopped:  # the resumed run completes the weights again
                for tensor, values in trained:
                    tensor.copy_(values)
                raise
            self._keep_best(report, step)
        prefix = "ema/" if learner.exports_average else ""
        self.report = {f"{prefix}{name}": value for name, value in report.scalars.items()}
        self.step = step
        self.tables = report.tables
        self.write_result()
        if self.report:
            recorder.add_row(step, "evaluate", {"epoch": plan.epoch_at(step), **self.report})
        names = [name for name in report.scalars if name not in COUNTS][:_SHOWN_FIGURES]
        shown = [f"{show_evaluated(prefix + name)} {report.scalars[name]:.4g}" for name in names]
        if self.best.value is not None:
            shown.append(f"best {self.name_best()}")
        log.info("%s", "  ".join([plan.show_epochs(step), *shown]))
        draws = self.has_stalled or recorder.may_draw(step)  # always before stopping early
        recorder.add_report(step, report, draws=draws)
        if step > 0:  # a run without steps has no curves
            recorder.plot(step, draws=draws)
        self.seconds = time.perf_counter() - started

    def _keep_best(self, report: Report, step: int) -> None:
        """Save the weights if their figure is the best. On a tie the later evaluation wins: it has trained longer."""
        task = self.learner.task
        value = report.scalars.get(task.best_metric, math.nan)
        may_be_best = self.streams.evaluation_samples >= task.best_needs
        is_best = may_be_best and self._gain(value, self.best) >= 0
        written = is_best and self.saver.write_alone(self.learner, "best_weights.safetensors")
        if written:
            figures = {name: each for name, each in report.scalars.items() if math.isfinite(each)}
            self.best = Best(value, step, interval(task.best_metric, figures), written, figures)
            self.recorder.best = value
        if self._gain(value, self.gain) > self.config.loop.early_stop_least:
            self.gain = Best(value, step)

    def _gain(self, value: float, before: Best) -> float:
        """Return by how much a figure is better than the figure of another evaluation; NaN if it is not finite."""
        sign = -1 if self.learner.task.best_is_lowest else 1
        known = -sign * math.inf if before.value is None else before.value
        return sign * (value - known)

    def begin(self) -> None:
        """Show what the task draws before the first update, such as pictures of the base model.

        If the weights of the task are complete at the start, evaluate them, too.
        """
        self.recorder.enters(0, "evaluating")
        drawn = self.measure(only_draws=True).images
        self.recorder.add_report(0, Report(images={f"{name}_before": image for name, image in drawn.items()}))
        if self.finish is not None and self.streams.evaluation_samples:
            self.evaluate()

    def measure(self, *, only_draws: bool) -> Report:
        """Return the task's report on the due loaders, or only its pictures of prompts.

        If the device runs out of memory, the copy of the images and recorded updates are dropped, and the evaluation
        begins again.
        """
        try:
            return self._measure(only_draws)
        except torch.OutOfMemoryError:
            dropped = [stream.drop_copy() for stream in self.streams.in_order]
            if not any([*dropped, self.learner.drop_recordings()]):
                raise
        return self._measure(only_draws)

    @torch.no_grad()
    def _measure(self, only_draws: bool) -> Report:
        learner = self.learner
        learner.task.eval()
        try:
            with learner.runtime.autocast():
                if only_draws:
                    return learner.task.draw()
                return learner.task.evaluate(self._due_loaders(), learner.step)
        finally:
            learner.task.train()

    def _due_loaders(self) -> Loaders:
        """Return the loaders due at this step. If micro-batches are chosen or halved, batches have their size."""
        learner = self.learner
        size = learner.micro_batches.size
        is_chosen = self.config.loop.micro_batch_size == "auto" or size < learner.plan.micro_batch_size
        due = {}
        for name, loader in self.streams.evaluation.items():
            every = self.streams.every_epochs.get(name)
            if every is None or learner.plan.is_due(learner.step, every, since=self.step):
                loader = loader.in_batches(size) if is_chosen else loader
                due[name] = track(self._watch(name, loader), len(loader), f"evaluating {name}")
        return due

    def _watch(self, name: str, loader: Iterable[Batch]) -> Iterator[Batch]:
        """Yield a loader's batches; each counts as progress."""
        for batch in loader:
            check_stop()
            self.recorder.enters(self.learner.step, f"evaluating {name}", batch)
            yield batch

    def write_result(self) -> None:
        """Write `result` into result.json on rank 0."""
        file = self.recorder.folder / RESULT_FILE
        if distributed.is_main():
            with ignore_write_errors(file):
                write_json(file, self.result)

    @property
    def result(self) -> Json:
        """The best figure, and what speaks against it."""
        task = self.learner.task
        best = {"metric": task.best_metric, **asdict(self.best), "is_lowest_best": task.best_is_lowest}
        return {**best, "findings": self.streams.findings}

    def name_best(self, shown: str = "") -> str:
        """Return the best figure, or `shown`, and its epoch."""
        shown = shown or f"{show_evaluated(self.learner.task.best_metric)} {self.best.value:.4g}"
        return f"{shown} at epoch {self.learner.plan.shown_epoch(self.best.step):g}"

    def state(self) -> Json:
        """Return the state for a checkpoint (JSON values)."""
        return {
            "best": asdict(self.best),
            "gain": asdict(self.gain),
            "last_report": self.report,
            "last_evaluated": self.step,
        }

    def load_state(self, state: Values, *, same_metric: bool) -> None:
        """Restore the state of a checkpoint. same_metric: the run still chooses by the same figure (`loop.best`)."""
        if same_metric:
            self.best = Best(**state["best"])
            self.gain = Best(**state.get("gain", state["best"]))
            self.recorder.best = self.best.value
        self.report = state["last_report"]
        self.step = state["last_evaluated"]
