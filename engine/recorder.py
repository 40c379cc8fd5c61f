"""The recorder: what a run writes down about itself while it trains.

Metrics, tracker, live plots, progress bar, curves, the audit of samples, skipped steps, and the phases that the
watchdog sees.
"""

import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from engine.batch_size import shape_of
from engine.config import TrainingConfig
from engine.meters import Meter, PeakMemory, TrainingClock
from engine.plan import Plan
from engine.runtime import Runtime
from engine.skips import SkipWatch
from engine.step import StepResult
from engine.waiting import MUCH_WAITING
from optim.schedules import GroupValues
from utils.contracts import Batch
from utils.io.files import ignore_write_errors
from utils.ranks import distributed
from utils.ranks.watchdog import Watchdog
from utils.record.background import BackgroundTracker
from utils.record.figures import show_duration
from utils.record.live_plot import LivePlots, start_live_plots
from utils.record.logging import get_logger
from utils.record.metrics_log import MetricsLog
from utils.record.progress import Bar
from utils.record.report_files import TableRow, write_report
from utils.record.run_config import mark_complete
from utils.record.sample_log import SampleLog
from utils.record.tracker import RunInfo
from utils.record.trackers import start_tracker

log = get_logger(__name__)

_BAR_SEC = 2.0  # between two movements of the bar's figures where logs are farther apart
_ESTIMATE_STEPS = 20
_SHORT_SEC, _LONG_SEC = 60.0, 2 * 3600.0
_TRAINING_PHASES = ("loading", "computing")
_FIRST_PLOT_SEC = 10.0  # a run that is shorter draws at its end alone
_PLOT_PAUSE = 20  # times the duration of a drawing: frequent evaluations draw in at most 5 % of the time


def _scheduled(values: GroupValues) -> dict[str, float]:
    """Return the scheduled figures of a row; the momentum only where it moves."""
    return {"lr": values.lr} | ({} if values.momentum is None else {"momentum": values.momentum})


class Recorder:
    """Record one run. `watchdog` and `bar` are started by the run; the files are opened by `open`."""

    def __init__(
        self,
        config: TrainingConfig,
        plan: Plan,
        values_at: Callable[[int], GroupValues],
        runtime: Runtime,
        folder: Path,
    ) -> None:
        self.folder = folder
        self.watchdog = Watchdog(config.runtime.hang_timeout_sec)
        self.bar = Bar("training", plan.total_steps)
        self.skips = SkipWatch(config.loop.max_skipped_steps)
        self.log_meter, self.epoch_meter = Meter(runtime.device), Meter(runtime.device)
        self._tracking, self._plan, self._values_at = config.tracking, plan, values_at
        self._metrics: MetricsLog | None = None
        self._samples: SampleLog | None = None
        self._tracker: BackgroundTracker | None = None
        self._live_plots: LivePlots | None = None
        self._peak_memory = PeakMemory(runtime.device)
        self._training_clock = TrainingClock()
        self._clock = (0, 0.0, 0.0)  # step, time, and seconds waited for data
        self._readings: Callable[[], Mapping[str, float]] = dict
        self._next_plot = time.perf_counter() + _FIRST_PLOT_SEC
        self._moved = time.perf_counter()
        self.stage, self.batch = "the start", ("images", 1)  # of an error's message
        self._device, self._first_step = runtime.device.type, (0, 0.0)

    # ------------------------------------------------------------------------------------------------- open and close

    def start_tracker(self, run_config: dict[str, Any], step: int, sweep: str | None) -> None:
        """Start what `tracking` names, on rank 0. sweep: the name of the run's multirun."""
        info = RunInfo(self.folder, run_config, step, self._plan.global_batch_size, sweep)
        self._tracker = start_tracker(self._tracking, info)
        if self._tracking.live_plots:
            self._live_plots = start_live_plots(self.folder)

    def open(
        self,
        step: int,
        path_of: Callable[[int], str],
        *,
        goes_on: bool = True,
        readings: Callable[[], Mapping[str, float]] = dict,
    ) -> None:
        """Open the files that are written row by row, without rows beyond `step`.

        goes_on: the run trains, so that the row of an epoch that an earlier end has cut is dropped, too. readings: of
        the data's caches, for the rows of training.
        """
        self._readings = readings
        if distributed.is_main():
            mark_complete(self.folder, None)
            self._metrics = MetricsLog(self.folder, step, self._plan.epoch_start(step) if goes_on else step)
        if self._tracking.samples:
            self._samples = SampleLog(self.folder, step)
        self.skips.open(self.folder, path_of, step)

    def close(self, *, completed_step: int | None) -> None:
        """Close all files at the end of a run, or of its part; the live plots are drawn once more before.

        completed_step: the last step of a run that is complete; None: the run goes on later.
        """
        if distributed.is_main() and completed_step is not None:
            mark_complete(self.folder, completed_step)
        for record in (self._metrics, self._samples, self.skips, self._live_plots):
            if record is not None:
                record.close()
        if self._tracker is not None:
            self._tracker.close(goes_on=completed_step is None)

    def abandon(self) -> None:
        """End the watch, the live plots and the tracker of a run that failed."""
        self.watchdog.abandon()
        if self._live_plots is not None:
            self._live_plots.close(waits=False)
        if self._tracker is not None:
            self._tracker.close(failed=True)

    def sync(self) -> None:
        """Flush rank 0's rows to the disk; before a checkpoint beyond them is published. From any thread."""
        for rows in (self._metrics, self.skips):
            if rows is not None:
                rows.sync()

    def sync_samples(self) -> None:
        """Flush this rank's record of samples. Raises OSError where the disk refuses it."""
        if self._samples is not None:
            self._samples.sync()

    # ---------------------------------------------------------------------------------------------------------- steps

    def phase(self, step: int, name: str, batch: Batch | None = None) -> None:
        """Tell the watchdog what the main thread does next, and on what; each call counts as progress."""
        self.stage = f"step {step}: {name}"
        self.watchdog.progress(self.stage)
        if batch is not None:
            self.batch = shape_of(batch), len(batch["weight"])
        # The wait of the very first step is that of the workers' start.
        self._training_clock.turn(name in _TRAINING_PHASES, waits=name == "loading" and self._first_step[0] > 0)

    @property
    def wait_share(self) -> float:
        """The share of the seconds of training in which the loop waited for data."""
        return self._training_clock.waited / max(self._training_clock.seconds, 1e-9)

    def start_clock(self, step: int) -> None:
        """Measure throughput from this step on; called again after anything that is not training."""
        self._clock = (step, time.perf_counter(), self._training_clock.waited)

    def add_samples(self, step: int, batches: Sequence[Batch]) -> None:
        """Record which samples update number `step` (from 1) takes, where `tracking.samples` is set."""
        if self._samples is not None:
            self._samples.add(step, batches)

    def add_step(self, step: int, batches: Sequence[Batch], result: StepResult) -> None:
        """Take the result of update number `step` (from 1); without a terminal nothing is read from the device."""
        self.log_meter.add(result)
        self.epoch_meter.add(result)
        self.skips.add(step, batches, result)
        self.bar.advance(step)
        if self.bar.is_shown and time.perf_counter() - self._moved >= _BAR_SEC:  # reads from the device
            self._move_bar(step, self.log_meter.means(goes_on=True)["loss"], self.bar.remaining_sec(step))
        self._estimate(step)

    def _estimate(self, step: int) -> None:
        """Say, after the first steps of this process, how long the rest takes; the very first is not counted."""
        if self._first_step[0] == 0:
            self._first_step = (step, time.perf_counter())
        first, since = self._first_step
        if step - first == _ESTIMATE_STEPS:
            each = (time.perf_counter() - since) / _ESTIMATE_STEPS
            left_sec = each * (self._plan.total_steps - step)
            if left_sec > _SHORT_SEC:
                log.info("about %s for the steps that are left, without evaluations", show_duration(left_sec))
            if self._device == "cpu" and left_sec > _LONG_SEC:
                log.info(
                    "on a CPU that is long: half of augment.image_size_hw is a quarter of the work; a smaller model or "
                    "fewer loop.total_epochs make it shorter, too"
                )

    def add_row(self, step: int, kind: str, figures: dict[str, Any]) -> None:
        """Write a row of metrics, on rank 0."""
        if self._metrics is not None:
            self._metrics.add(step, kind, figures)
        if self._tracker is not None:
            self._tracker.add_row(step, kind, figures)

    def add_report(self, step: int, tables: Mapping[str, Sequence[TableRow]], images: Mapping[str, np.ndarray]) -> None:
        """Write an evaluation's tables and pictures as files, and send them to the tracker, on rank 0."""
        if distributed.is_main():
            with ignore_write_errors(self.folder / "tables"):
                write_report(self.folder, tables, images)
        if self._tracker is not None:
            for name, image in images.items():
                self._tracker.add_image(step, name, image)
            for name, rows in tables.items():
                self._tracker.add_table(step, name, rows)

    def add_model(self, file: Path, alias: str, metadata: dict[str, Any]) -> None:
        """Send the weights of the complete run to W&B, on rank 0, where `tracking.model_artifact` is set."""
        if self._tracker is not None and self._tracking.name == "wandb" and self._tracking.model_artifact:
            self._tracker.add_model(file, alias, metadata)

    def log_step(self, step: int) -> None:
        """Write the means since the last log: the only regular host synchronisation.

        Raises as `SkipWatch.check` does where too many steps were skipped.
        """
        plan, means = self._plan, self.log_meter.means()
        first, since, waited = self._clock
        images_per_sec = (step - first) * plan.global_batch_size / (time.perf_counter() - since)
        values = self._values_at(step - 1)
        readings = {"images_per_sec": images_per_sec, "peak_memory_gib": self._peak_memory.gib}
        data = {"wait_sec": (self._training_clock.waited - waited) / max(1, step - first), **self._readings()}
        data = {f"data/{name}": value for name, value in data.items()}
        row = {"epoch": plan.epoch_at(step), **means, **_scheduled(values), **readings, **data}
        self.add_row(step, "train", row)
        if self._live_plots is not None:
            self._live_plots.check()
        left_sec = self.bar.remaining_sec(step)
        log.info(
            "step %d/%d (epoch %.4g)  train loss %.4g  lr %.3g  %s images/s  %s left",
            step, plan.total_steps, plan.shown_epoch(step), means["loss"], values.lr,
            f"{images_per_sec:,.0f}" if images_per_sec >= 10 else f"{images_per_sec:.2g}", show_duration(left_sec),
        )  # fmt: skip
        self._move_bar(step, means["loss"], left_sec)
        if means["skipped_steps"]:
            log.warning("%d steps were skipped before step %d", means["skipped_steps"], step)
            self.skips.read(step)
            self.skips.check(step, last=step == plan.total_steps)
        else:
            self.skips.forget(step)
        self.start_clock(step)

    def _move_bar(self, step: int, loss: float, left_sec: float | None) -> None:
        """Give the progress bar its figures."""
        epochs = f"epoch {self._plan.shown_epoch(step):g}/{self._plan.epochs:g}"
        waits = f"  data {self.wait_share:.0%}" if self.wait_share > MUCH_WAITING else ""
        self.bar.show(epochs, f"train loss {loss:.4g}  lr {self._values_at(step - 1).lr:.3g}{waits}", left_sec)
        self._moved = time.perf_counter()

    def end_epoch(self, step: int, epoch: int, last_report: dict[str, float]) -> None:
        """Write the epoch's row: its mean losses, the newest evaluation, the schedule, speed, time and memory.

        Where the run ends within the epoch, its sums are kept, so that a longer run writes the row of the whole epoch.
        """
        goes_on = self._plan.epoch_start(step) < step
        means = {f"train/{name}": value for name, value in self.epoch_meter.means(goes_on=goes_on).items()}
        readings = {
            "images_per_sec": self._training_clock.end_epoch(step, goes_on=goes_on) * self._plan.global_batch_size,
            "seconds": self._training_clock.seconds,
            "peak_memory_gib": self._peak_memory.gib,
        }
        scheduled = _scheduled(self._values_at(step - 1))
        self.add_row(step, "epoch", {"epoch": epoch + 1, **means, **last_report, **scheduled, **readings})

    def plot(self, step: int, *, may_skip: bool = False) -> None:
        """Draw the curves of the run so far, on rank 0, unless another process does.

        may_skip: not if they were drawn shortly before, unless this is the last step.
        """
        self.phase(step, "plotting")  # on all ranks: the watchdog compares their counts
        started = time.perf_counter()
        skipped = may_skip and started < self._next_plot and step != self._plan.total_steps
        if self._metrics is not None and self._live_plots is None and not skipped:
            from utils.record.plots import plot_curves  # imports matplotlib

            path = self.folder / "plots" / "curves.png"
            with ignore_write_errors(path):
                plot_curves(self._metrics, path, self.folder.resolve().name)
            ended = time.perf_counter()
            self._next_plot = ended + _PLOT_PAUSE * (ended - started)
        self.start_clock(step)

    # ---------------------------------------------------------------------------------------------------- checkpoints

    def state(self) -> dict[str, Any]:
        """Return what a checkpoint keeps (JSON values)."""
        return {
            "meters": {"log": self.log_meter.state(), "epoch": self.epoch_meter.state()},
            "skipped": self.skips.steps,
            "skipped_empty": self.skips.empty,
            "clock": self._training_clock.state(),
            "peak_memory_gib": self._peak_memory.gib,
        }

    def load_state(self, state: dict[str, Any]) -> None:
        """Restore what `state` returned."""
        self.log_meter.load(state["meters"]["log"])
        self.epoch_meter.load(state["meters"]["epoch"])
        self.skips.load(state["skipped"], state["skipped_empty"])
        self._training_clock.load(state.get("clock"), state["step"])  # older checkpoints have neither
        self._peak_memory.load(state.get("peak_memory_gib"))
