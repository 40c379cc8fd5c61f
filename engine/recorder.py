"""What a run writes down about itself while it trains: exact means, seconds and memory; metrics, tracker, progress
bar, curves, the audit of samples, skipped steps, and the phases that the watchdog sees.
"""

import resource
import sys
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from engine.batch_size import shape_of
from engine.config import TrainingConfig
from engine.learner import Learner
from engine.plan import Plan
from engine.skips import SkipWatch
from engine.step import StepResult
from engine.task import Report, networks_of
from utils.contracts import Batch, TrainStream
from utils.io.files import ignore_write_errors
from utils.ranks import distributed
from utils.ranks.sharded import own_part
from utils.ranks.watchdog import Watchdog
from utils.record.figures import name_figures, show_duration
from utils.record.logging import get_logger
from utils.record.metrics_log import MetricsLog
from utils.record.progress import Bar
from utils.record.report import write_report
from utils.record.run_folder import mark_complete
from utils.record.sample_log import SampleLog
from utils.record.trackers import RunInfo, Tracker, start_tracker

log = get_logger(__name__)

MUCH_WAITING = 0.1  # of the time of training, for data; the bar shows it, and the end says what helps
_FIRST_PLOT_SEC = 10.0  # a run that is shorter draws at its end alone
_PLOT_PAUSE = 50  # times the duration of a drawing: curves are drawn in at most 2 % of the time


# ------------------------------------------------------------------------------------------- means, seconds and memory


class Meter:
    """Sum (sum, count) pairs in float64; `means` is the only host synchronisation."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._sums: dict[tuple[str, ...], Tensor] = {}  # [N, 2] by the N names of a step

    def add(self, result: StepResult) -> None:
        """Take one step's figures; a skipped step counts only as skipped."""
        names, figures = result.figures
        before = self._sums.get(tuple(names))
        self._sums[tuple(names)] = figures if before is None else before + figures

    def state(self) -> dict[str, list[float]]:
        """Return the sums as numbers, exact in JSON."""
        state: dict[str, list[float]] = {}
        for names, sums in self._sums.items():
            for name, (total, count) in zip(names, sums.tolist()):
                before = state.get(name, (0.0, 0.0))
                state[name] = [before[0] + total, before[1] + count]
        return state

    def load(self, state: Mapping[str, list[float]]) -> None:
        """Restore saved sums."""
        self._sums = {}
        if state:
            pairs = [state[name] for name in sorted(state)]
            self._sums[tuple(sorted(state))] = torch.tensor(pairs, dtype=torch.float64, device=self._device)

    def means(self, *, resets: bool = True) -> dict[str, float]:
        """Return the means and reset; `skipped_steps` is a count. A mean over nothing is NaN."""
        means = {}
        for name, (total, count) in self.state().items():
            means[name] = total if name == "skipped_steps" else (total / count if count else float("nan"))
        if resets:
            self._sums = {}
        return means


class Clock:
    """The seconds of training so far, over all resumptions, without evaluations, drawings and checkpoints.

    waited: the seconds among them in which the loop waited for data.
    """

    def __init__(self) -> None:
        self.seconds = self.waited = 0.0
        self._since, self._trains, self._waits = time.perf_counter(), False, False

    def turn(self, *, trains: bool, waits: bool = False) -> None:
        """Say what the time from now on is for."""
        self.read()
        self._trains, self._waits = trains, waits

    def read(self) -> float:
        """Return the seconds, up to now."""
        now = time.perf_counter()
        self.seconds += (now - self._since) * self._trains
        self.waited += (now - self._since) * self._waits
        self._since = now
        return self.seconds


def memory_by_part(learner: Learner) -> dict[str, float]:
    """Return GiB by part, as they are after an update; without parts of 0 GiB.

    Gradients count as in the backward pass; they are freed after it. On a GPU, `peak` is the most that was allocated so
    far, and `activations` is the rest of it, beside the other parts on the GPU. An average in the host's memory is
    `averages on the host`.
    """
    task, device = learner.task, learner.runtime.device
    helpers = _tensors_of(networks_of(task, task.helpers).values())
    known = {id(tensor) for tensor in helpers}
    averages = [] if learner.averages is None else list(learner.averages.tensors().values())
    states = [value for state in learner.optimizer.state.values() for value in state.values()]
    parts = {
        "weights": [tensor for tensor in _tensors_of([task]) if id(tensor) not in known],
        "gradients": [parameter for group in learner.optimizer.param_groups for parameter in group["params"]],
        "optimiser state": [value for value in states if isinstance(value, Tensor)],
        "averages": [tensor for tensor in averages if tensor.device.type == device.type],
        "frozen networks": helpers,
    }
    found = {name: sum(own_part(tensor).nbytes for tensor in tensors) / 2**30 for name, tensors in parts.items()}
    if device.type == "cuda":
        peak = torch.cuda.max_memory_allocated(device) / 2**30
        found |= {"activations": peak - sum(found.values()), "peak": peak}
    host = [tensor for tensor in averages if tensor.device.type != device.type]
    found["averages on the host"] = sum(tensor.nbytes for tensor in host) / 2**30
    return {name: gib for name, gib in found.items() if gib > 0}


def show_memory(parts: dict[str, float]) -> str:
    """Return the parts in a line: `weights 9.56 GiB, gradients 812.0 MiB`."""
    sizes = {name: f"{gib:.2f} GiB" if gib >= 1 else f"{1024 * gib:.1f} MiB" for name, gib in parts.items()}
    return ", ".join(f"{name} {size}" for name, size in sizes.items())


def _tensors_of(modules: Iterable[nn.Module]) -> list[Tensor]:
    return [tensor for module in modules for tensor in (*module.parameters(), *module.buffers())]


# ------------------------------------------------------------------------------------------------------------ recorder


class Recorder:
    """Record one run. `watchdog` and `bar` are started by the run; the files are opened by `open`."""

    def __init__(self, config: TrainingConfig, plan: Plan, learner: Learner, folder: Path) -> None:
        self.folder, self.clock = folder, Clock()
        self.watchdog = Watchdog(config.runtime.hang_timeout_sec)
        self.bar = Bar("training", plan.total_steps)
        self.skips = SkipWatch(config.loop.max_skipped_steps)
        self._device = learner.runtime.device
        self.log_meter, self.epoch_meter = Meter(self._device), Meter(self._device)
        self._tracking, self._plan, self._learner = config.tracking, plan, learner
        self._metrics: MetricsLog | None = None
        self._samples: SampleLog | None = None
        self._tracker: Tracker | None = None
        self._readings: Callable[[], Mapping[str, float]] = dict
        self._logged, self._epoch = (0, 0.0, 0.0), (0, 0.0)  # step, seconds, waited: of the last log, the epoch's start
        self._next_plot, self._has_stepped = time.perf_counter() + _FIRST_PLOT_SEC, False
        self.stage, self.batch = "the start", ("images", 1)  # of an error's message
        self._earlier_peak_gib = 0.0
        if self._device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self._device)  # a notebook runs several in one process

    # ------------------------------------------------------------------------------------------------- open and close

    def start_tracker(self, run_config: dict[str, Any], step: int, sweep: str | None) -> None:
        """Start what `tracking` names, on rank 0. sweep: the name of the run's multirun."""
        info = RunInfo(self.folder, run_config, step, self._plan.global_batch_size, sweep)
        self._tracker = start_tracker(self._tracking, info)

    def open(self, step: int, train: TrainStream | None, *, goes_on: bool = True) -> None:
        """Open the files that are written row by row, without rows beyond `step`.

        train: names samples, and reads the data's caches. goes_on: the run trains, so that the row of an epoch that an
        earlier end has cut is dropped, too.
        """
        self._readings = dict if train is None else train.readings
        self._logged = (step, self.clock.read(), self.clock.waited)
        if distributed.is_main():
            mark_complete(self.folder, None)
            self._metrics = MetricsLog(self.folder, step, self._plan.epoch_start(step) if goes_on else step)
        if self._tracking.samples:
            self._samples = SampleLog(self.folder, step)
        self.skips.open(self.folder, str if train is None else train.path_of, step)

    def close(self, *, completed_step: int | None, metadata: dict[str, Any] | None = None) -> None:
        """Close all files at the end of a run, or of its part.

        completed_step: the last step of a run that is complete; None: the run goes on later. metadata: of the weights
        that W&B gets then, the best ones or else the last ones, where `tracking.model_artifact` is set.
        """
        if distributed.is_main() and completed_step is not None:
            mark_complete(self.folder, completed_step)
            if self._tracker is not None and self._tracking.name == "wandb" and self._tracking.model_artifact:
                self._tracker.add_model(self.folder / "weights", metadata or {})
        for record in (self._metrics, self._samples):
            if record is not None:
                record.close()
        if self._tracker is not None:
            self._tracker.close(goes_on=completed_step is None)

    def abandon(self) -> None:
        """End the watch and the tracker of a run that failed."""
        self.watchdog.abandon()
        if self._tracker is not None:
            self._tracker.close(failed=True)

    def sync(self) -> None:
        """Flush rank 0's rows to the disk; before a checkpoint beyond them is published. From any thread."""
        if self._metrics is not None:
            self._metrics.sync()

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
        waits = name == "loading" and self._has_stepped
        self.clock.turn(trains=name in ("loading", "computing"), waits=waits)

    @property
    def wait_share(self) -> float:
        """The share of the seconds of training in which the loop waited for data."""
        return self.clock.waited / max(self.clock.read(), 1e-9)

    def _speed(self, step: int, since: tuple[int, float]) -> dict[str, float]:
        """Return the images per second of training since then (NaN where it took no time), and the most memory."""
        seconds = self.clock.read() - since[1]
        rate = (step - since[0]) * self._plan.global_batch_size / seconds if seconds > 0 else float("nan")
        return {"images_per_sec": rate, "peak_memory_gib": self.peak_gib}

    @property
    def peak_gib(self) -> float:
        """The most memory that the run has used, over all resumptions: allocated on its GPU, or resident on a CPU."""
        if self._device.type == "cuda":
            peak = torch.cuda.max_memory_allocated(self._device)
        else:
            unit = 1 if sys.platform == "darwin" else 1024  # Linux counts KiB
            peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
        return max(self._earlier_peak_gib, peak / 2**30)

    def add_samples(self, step: int, batches: Sequence[Batch]) -> None:
        """Record which samples update number `step` (from 1) takes, where `tracking.samples` is set."""
        if self._samples is not None:
            self._samples.add(step, batches)

    def add_step(self, step: int, batches: Sequence[Batch], result: StepResult) -> None:
        """Take the result of update number `step` (from 1); nothing is read from the device."""
        self.log_meter.add(result)
        self.epoch_meter.add(result)
        self.skips.add(step, batches, result)
        self.bar.advance(step)
        if not self._has_stepped:
            self._has_stepped = True
            log.info("memory at the first step: %s", show_memory(memory_by_part(self._learner)))

    def add_row(self, step: int, kind: str, figures: dict[str, Any]) -> None:
        """Write a row of metrics, on rank 0."""
        if self._metrics is not None:
            self._metrics.add(step, kind, figures)
        if self._tracker is not None:
            self._tracker.add(step, name_figures(kind, figures))

    def add_report(self, step: int, report: Report) -> None:
        """Write an evaluation's tables and pictures as files, and send them to the tracker, on rank 0."""
        if distributed.is_main():
            with ignore_write_errors(self.folder / "tables"):
                write_report(self.folder, report.tables, report.images)
        if self._tracker is not None:
            values: dict[str, Any] = {f"images/{name}": image for name, image in report.images.items()}
            self._tracker.add(step, values | {f"tables/{name}": rows for name, rows in report.tables.items() if rows})

    def log_step(self, step: int) -> None:
        """Write the means since the last log: the only regular host synchronisation.

        Raises as `SkipWatch.check` does where too many steps were skipped.
        """
        plan, means = self._plan, self.log_meter.means()  # waits for the device, so that the seconds are its own
        since, speed = self._logged, self._speed(step, self._logged[:2])
        self._logged = (step, self.clock.seconds, self.clock.waited)
        readings = {"wait_sec": (self.clock.waited - since[2]) / max(1, step - since[0]), **self._readings()}
        scheduled = self._scheduled(step)
        row = {"epoch": plan.epoch_at(step), **means, **scheduled, **speed}
        self.add_row(step, "train", row | {f"data/{name}": value for name, value in readings.items()})
        left_sec, rate = self.bar.left_sec, speed["images_per_sec"]
        figures = f"train loss {means['loss']:.4g}  lr {scheduled['lr']:.3g}"
        log.info(
            "step %d/%d (epoch %.4g)  %s  %s images/s  %s left",
            step, plan.total_steps, plan.shown_epoch(step), figures,
            f"{rate:,.0f}" if rate >= 10 else f"{rate:.2g}", show_duration(left_sec),
        )  # fmt: skip
        waits = f"  data {self.wait_share:.0%}" if self.wait_share > MUCH_WAITING else ""
        self.bar.show(f"epoch {plan.shown_epoch(step):g}/{plan.shown_epoch(plan.total_steps):g}", figures + waits)
        if means["skipped_steps"]:
            log.warning("%d steps were skipped before step %d", means["skipped_steps"], step)
            self.skips.read(step)
            self.skips.check(step, last=step == plan.total_steps)

    def _scheduled(self, step: int) -> dict[str, float]:
        """Return the scheduled figures of update number `step`, from 1; the momentum only where it moves."""
        values = self._learner.schedule.at(step - 1)
        return {"lr": values.lr} | ({} if values.momentum is None else {"momentum": values.momentum})

    def end_epoch(self, step: int, epoch: int, last_report: dict[str, float]) -> None:
        """Write the epoch's row: its mean losses, the newest evaluation, the schedule, speed, time and memory.

        Where the run ends within the epoch, its sums are kept, so that a longer run writes the row of the whole epoch.
        """
        is_whole = self._plan.epoch_start(step) == step
        means = {f"train/{name}": value for name, value in self.epoch_meter.means(resets=is_whole).items()}
        speed = self._speed(step, self._epoch)
        speed = {"images_per_sec": speed.pop("images_per_sec"), "seconds": self.clock.seconds, **speed}
        if is_whole:
            self._epoch = (step, self.clock.seconds)
        self.add_row(step, "epoch", {"epoch": epoch + 1, **means, **last_report, **self._scheduled(step), **speed})

    def plot(self, step: int, *, may_skip: bool = False) -> None:
        """Draw the curves of the run so far, on rank 0.

        may_skip: not if they were drawn shortly before, unless this is the last step.
        """
        self.phase(step, "plotting")  # on all ranks: the watchdog compares their counts
        started = time.perf_counter()
        skipped = may_skip and started < self._next_plot and step != self._plan.total_steps
        if self._metrics is None or skipped:
            return
        from utils.record.plots import plot_curves  # imports matplotlib

        path = self.folder / "plots" / "curves.png"
        with ignore_write_errors(path):
            plot_curves(self._metrics, path, self.folder.resolve().name)
        ended = time.perf_counter()
        self._next_plot = ended + _PLOT_PAUSE * (ended - started)

    # ---------------------------------------------------------------------------------------------------- checkpoints

    def state(self) -> dict[str, Any]:
        """Return what a checkpoint keeps (JSON values)."""
        return {
            "meters": {"log": self.log_meter.state(), "epoch": self.epoch_meter.state()},
            "skipped": self.skips.steps,
            "clock": {"seconds": self.clock.read(), "waited": self.clock.waited, "epoch": self._epoch},
            "peak_memory_gib": self.peak_gib,
        }

    def load_state(self, state: dict[str, Any]) -> None:
        """Restore what `state` returned."""
        self.log_meter.load(state["meters"]["log"])
        self.epoch_meter.load(state["meters"]["epoch"])
        self.skips.steps = [tuple(skipped) for skipped in state["skipped"]]
        self.clock.seconds, self.clock.waited = state["clock"]["seconds"], state["clock"]["waited"]
        self._epoch = tuple(state["clock"]["epoch"])
        self._earlier_peak_gib = state["peak_memory_gib"]
