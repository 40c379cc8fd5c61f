"""The state of a training run, and what happens when something is due: log, evaluate, checkpoint, weights.

`train_one_epoch` decides when; here stands what.
"""

import math
import time
from collections.abc import Iterable, Mapping, Sized
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from engine.checkpoint import count_bytes, refusals, remove_old, save_checkpoint
from engine.config import LoopConfig
from engine.meters import Meter
from engine.parallel import is_sharded, part_again
from engine.plan import Plan
from engine.runtime import Runtime
from engine.skips import SkipWatch
from engine.step import LossScale
from engine.task import Batch, Report, Task
from engine.writer import CheckpointWriter, Groups
from optim.ema import EMA
from optim.schedules import Schedule
from optim.state import optimizer_state
from utils.errors import UserError
from utils.io.files import spared
from utils.io.weights import write_weights
from utils.ranks import distributed, sharded
from utils.ranks.signals import StopRequest
from utils.ranks.watchdog import Watchdog
from utils.record import plots
from utils.record.logging import get_logger
from utils.record.metrics_log import MetricsLog
from utils.record.progress import Bar, format_duration, track
from utils.record.report_files import write_report
from utils.record.run_folder import RunFolder
from utils.record.sample_log import SampleLog
from utils.record.trackers import Tracker

log = get_logger(__name__)


@dataclass
class Best:
    """The best evaluation so far: value of the task's best_metric, and its step."""

    value: float | None = None
    step: int | None = None


@dataclass
class Training:
    """All that one run consists of. `step` counts the updates done.

    `passed_over` counts the steps' worth of samples that roll-backs have left out of the stream.
    `rare_loaders` names loaders of `evaluation` that are used only every so many epochs.
    """

    task: Task
    model: nn.Module
    optimizer: torch.optim.Optimizer
    scale: LossScale
    ema: EMA | None
    schedule: Schedule
    plan: Plan
    loop: LoopConfig
    seed: int
    runtime: Runtime
    folder: RunFolder
    evaluation: Mapping[str, Iterable[Batch]]
    fingerprints: dict[str, str]
    metrics: MetricsLog | None
    samples: SampleLog | None
    watchdog: Watchdog
    stop: StopRequest
    bar: Bar
    log_meter: Meter
    epoch_meter: Meter
    writer: CheckpointWriter
    skips: SkipWatch
    step: int = 0
    passed_over: int = 0
    best: Best = field(default_factory=Best)
    last_report: dict[str, float] = field(default_factory=dict)
    rare_loaders: Mapping[str, float] = field(default_factory=dict)
    tracker: Tracker | None = None
    _window: tuple[int, float] = (0, 0.0)

    @property
    def must_stop(self) -> bool:
        """Return whether this rank asks for the end of the run: a signal came, or a checkpoint was refused."""
        return self.stop.requested or self.writer.failed

    # ------------------------------------------------------------------------------------------------------ figures

    def start_clock(self) -> None:
        """Begin to measure throughput at this step; called again after what is no training."""
        self._window = (self.step, time.perf_counter())

    def add_row(self, kind: str, figures: dict[str, Any]) -> None:
        """Write a row of metrics, on rank 0."""
        if self.metrics is not None:
            self.metrics.add(self.step, kind, figures)
        if self.tracker is not None:
            self.tracker.add_row(self.step, kind, figures)

    def log_step(self) -> None:
        """Write the means since the last log; the loop's only regular host synchronisation."""
        means = self.log_meter.means()
        first, since = self._window
        seconds = time.perf_counter() - since
        values = self.schedule.at(self.step - 1)
        speed = (self.step - first) * self.plan.global_batch_size / seconds
        self.add_row(
            "train", {"epoch": self.plan.epoch_at(self.step), **means, "lr": values.lr, "images_per_sec": speed}
        )
        left_sec = self.bar.remaining_sec(self.step)
        log.info(
            "step %d/%d  epoch %.2f  loss %.4f  lr %.2e  grad norm %.2f  %.0f images/s  ETA %s",
            self.step, self.plan.total_steps, self.plan.epoch_at(self.step), means["loss"], values.lr,
            means["grad_norm"], speed, format_duration(left_sec),
        )  # fmt: skip
        epochs = [self.plan.epoch_of(step - 1) + 1 for step in (self.step, self.plan.total_steps)]
        figures = f"loss {means['loss']:.4f}  lr {values.lr:.2e}  {speed:,.0f} images/s"
        self.bar.show(f"epoch {epochs[0]}/{epochs[1]}", figures, left_sec)
        if means["skipped_steps"]:
            log.warning("%d steps were left out before step %d", means["skipped_steps"], self.step)
            self.skips.read(self.step)
            self.skips.check(self.step, last=self.step == self.plan.total_steps)
        else:
            self.skips.forget(self.step)
        self.start_clock()

    def end_epoch(self, epoch: int) -> None:
        """Write the epoch's row: its mean losses beside the newest evaluation."""
        means = self.epoch_meter.means()
        figures = {f"train/{name}": value for name, value in means.items()}
        self.add_row(
            "epoch", {"epoch": epoch + 1, **figures, "lr": self.schedule.at(self.step - 1).lr, **self.last_report}
        )

    # --------------------------------------------------------------------------------------------------- evaluation

    def sync_buffers(self) -> None:
        """Give every rank the batch statistics of rank 0, and their average."""
        if distributed.is_distributed():
            kept = self.ema.tensors if self.ema is not None else {}
            # What is no state, such as a table of positions, has no average.
            averages = [kept[name] for name, _ in self.task.network.named_buffers() if name in kept]
            for tensor in [*self.task.buffers(), *averages]:
                dist.broadcast(tensor, src=0)

    @torch.no_grad()
    def _report(self) -> Report:
        self.task.eval()
        try:
            with self.runtime.autocast():
                return self.task.evaluate(self._watched_loaders(), self.step)
        finally:
            self.task.train()
            part_again(self.model)

    def _watched_loaders(self) -> dict[str, Iterable[Batch]]:
        """Return the loaders that are due, each of their batches counting as progress."""

        def watched(name: str, loader: Iterable[Batch]) -> Iterable[Batch]:
            for batch in loader:
                self.watchdog.progress(f"step {self.step}: evaluating {name}")
                yield batch

        def tracked(name: str, loader: Iterable[Batch]) -> Iterable[Batch]:
            total = len(loader) if isinstance(loader, Sized) else None
            return track(watched(name, loader), total, f"evaluating {name}")

        def due(name: str) -> bool:
            every = self.rare_loaders.get(name)
            return every is None or self.plan.is_due_among(self.step, every, self.loop.evaluate_every_epochs)

        return {name: tracked(name, loader) for name, loader in self.evaluation.items() if due(name)}

    def evaluate(self) -> None:
        """Measure the weights and, where there is one, their average; keep the best of what is exported."""
        self.watchdog.progress(f"step {self.step}: evaluating")
        self.sync_buffers()
        report = self._report()
        scalars = dict(report.scalars)
        decisive = scalars[self.task.best_metric]
        if self.ema is not None:
            with self.ema.swapped():
                report = self._report()
            scalars |= {f"ema/{name}": value for name, value in report.scalars.items()}
            decisive = report.scalars[self.task.best_metric]
        self.last_report = scalars
        self.add_row("evaluate", {"epoch": self.plan.epoch_at(self.step), **scalars})
        log.info("step %d  %s", self.step, "  ".join(f"{name} {value:.4f}" for name, value in scalars.items()))
        better = self.best.value is None or (
            decisive < self.best.value if self.task.best_is_lowest else decisive > self.best.value
        )
        if better and math.isfinite(decisive) and self._write_best():
            self.best = Best(decisive, self.step)
        if distributed.is_main():
            with spared(self.folder.path / "tables"):
                write_report(self.folder.path, report.tables, report.images)
        if self.tracker is not None:
            for name, image in report.images.items():
                self.tracker.add_image(self.step, name, image)
        self.plot()

    def plot(self) -> None:
        """Draw the curves of the run so far, on rank 0."""
        self.watchdog.progress(f"step {self.step}: plotting")  # on all ranks: the watchdog compares their counts
        if self.metrics is not None:
            path = self.folder.plots / "curves.png"
            with spared(path):
                plots.plot_curves(self.metrics, path, self.folder.path.resolve().name)
        self.start_clock()

    # -------------------------------------------------------------------------------------------------- checkpoints

    def _write_weights(self, which: str, tensors: Mapping[str, torch.Tensor], *, average: bool, step: int) -> None:
        """Write weights/<which>_weights.safetensors; on rank 0, from any thread."""
        metadata = {
            "format": 1,
            "script": self.folder.job.script,
            "task": self.folder.config["task"],
            "model": self.folder.config["model"],
            "step": step,
            "average": average,
            **self.task.metadata(),
        }
        with refusals(self.folder.weights, f"the {which} weights of step {step}", count_bytes({"": tensors})):
            write_weights(self.folder.weights / f"{which}_weights.safetensors", tensors, metadata)

    def _write_best(self) -> bool:
        """Write the best weights; returns whether the disk took them where the run goes on without. On all ranks."""
        average = self.ema is not None
        tensors = sharded.gather_parts(self.ema.tensors if average else self.task.network.state_dict())
        return distributed.rank_zero_call(lambda: self._try_best(tensors, average))

    def _try_best(self, tensors: Mapping[str, torch.Tensor], average: bool) -> bool:
        try:
            self._write_weights("best", tensors, average=average, step=self.step)
        except UserError as error:
            if not self.writer.retries:
                raise
            log.error("%s\nThe run goes on; the best weights stay those of before (loop.on_failed_save=retry)", error)
            return False
        return True

    def _groups(self) -> tuple[dict[str, dict[str, torch.Tensor]], dict[str, Any]]:
        """Return the run's tensors by group and name, and what of the optimiser's state is no tensor; on all ranks.

        Where ranks share the task, the tensors are copies on rank 0 and absent elsewhere.
        """
        tensors, others = optimizer_state(self.optimizer)
        groups = {"task": self.task.state_dict(), "optimizer": tensors, "scale": self.scale.state()}
        if self.ema is not None:
            groups["ema"] = self.ema.tensors
        return {name: sharded.gather_parts(group) for name, group in groups.items()}, others

    def save(self, *, last: bool) -> None:
        """Write a checkpoint of this step, and the weights that go with it: all of it is on the disk when it is the
        run's last, else it is written while training goes on.

        Raises UserError where the disk refused the last one, or an earlier one that the run must not go on without.
        """
        self.watchdog.progress(f"step {self.step}: saving")
        self.sync_buffers()
        self.skips.read(self.step)
        groups, others = self._groups()
        state = {
            "config": self.folder.config,
            "precision": self.runtime.precision,
            "threads": torch.get_num_threads(),
            "world_size": self.plan.world_size,
            "position": (self.step + self.passed_over) * self.plan.global_batch_size,
            "passed_over": self.passed_over,
            "skipped": self.skips.steps,
            "skipped_empty": self.skips.empty,
            "best": {"value": self.best.value, "step": self.best.step},
            "last_report": self.last_report,
            "meters": {"log": self.log_meter.state(), "epoch": self.epoch_meter.state()},
            "optimizer": others,
            "fingerprints": self.fingerprints,
        }
        if self.samples is not None and not self._sync_samples(last):
            return
        if distributed.is_main():
            step, best_step = self.step, self.best.step
            self.writer.submit(
                groups,
                lambda groups: self._write(step, groups, state, best_step),
                f"saved {self.folder.checkpoints}/step_{step:08d}",
                copied=is_sharded(self.model),
            )
        if last:
            distributed.rank_zero_call(self.writer.finish)
        self.start_clock()

    def _sync_samples(self, last: bool) -> bool:
        """Bring every rank's record of samples to the disk before the checkpoint that lies beyond it.

        Returns whether that went well, where the run goes on without.
        """
        problem = None
        try:
            with refusals(self.folder.path / "samples", "the record of samples", 0):
                self.samples.sync()
        except UserError as error:
            problem = error
        problems = [found for found in distributed.gather_objects(problem) if found is not None]
        if problems and (last or not self.writer.retries):
            raise problems[0]
        if problems:
            log.error("%s\nThe run goes on and tries again at its next save (loop.on_failed_save=retry)", problems[0])
        return not problems

    def _write(self, step: int, groups: Groups, state: dict[str, Any], best_step: int | None) -> None:
        """Bring a state to the disk; on rank 0, in the writer's thread."""
        with refusals(self.folder.checkpoints, f"the checkpoint of step {step}", count_bytes(groups)):
            for rows in (self.metrics, self.skips):
                rows.sync()
            save_checkpoint(self.folder.checkpoints, step, groups, state)
            remove_old(self.folder.checkpoints, self.loop.keep_checkpoints, step, best_step)
        network = {
            name.removeprefix("network."): tensor
            for name, tensor in groups["task"].items()
            if name.startswith("network.")
        }
        self._write_weights("last", network, average=False, step=step)
        if self.ema is not None:
            self._write_weights("ema", groups["ema"], average=True, step=step)
