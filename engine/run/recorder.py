"""Record a run: metrics, memory, tracker, progress bar, curves, samples, skipped steps, watchdog phases."""

import json
import math
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

import torch

from engine.config import TrainingConfig
from engine.plan import Plan
from engine.run.clock import Clock, Mark
from engine.run.skips import SkipWatch
from engine.task import Report
from engine.update.batch_size import show_samples
from engine.update.learner import Learner
from engine.update.step import StepResult
from utils.contracts import Batch, Figures, StepStream
from utils.hardware import peak_memory
from utils.io.files import AppendFile, Json, ignore_write_errors, sha256_text
from utils.io.weights import hash_tensors
from utils.ranks import distributed
from utils.ranks.watchdog import Watchdog
from utils.record.figures import show_duration
from utils.record.logging import log
from utils.record.metrics_log import MetricsLog, keep_rows
from utils.record.progress import Bar
from utils.record.report import keep_pictures, write_report
from utils.record.run_folder import mark_complete
from utils.record.run_reader import write_progress

_FIRST_PLOT_SEC = 10.0  # a shorter run draws only at its end
_PROGRESS_PAUSE_SEC = 5.0  # between two writes of the progress
_PLOT_PAUSE = 50  # as a multiple of the drawing time, so drawing takes at most 2 % of the time


# --------------------------------------------------------------------------------------------------- means and samples


class _Meter:
    """Sum (sum, count) pairs in float64; `means` is the only host synchronisation."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._sums = {}  # [N, 2] by the N names of a step

    def add(self, result: StepResult) -> None:
        """Add one step's figures; a skipped step only adds to `skipped_steps`."""
        self._sums[result.names] = self._sums.get(result.names, 0.0) + result.figures

    def state(self) -> dict[str, list[float]]:
        """Return the sums as JSON values."""
        state = {}
        for names, sums in self._sums.items():
            for name, (total, count) in zip(names, sums.tolist()):
                pair = state.setdefault(name, [0.0, 0.0])
                pair[0] += total
                pair[1] += count
        return state

    def load(self, state: Mapping[str, list[float]]) -> None:
        """Restore saved sums."""
        pairs = torch.tensor(list(state.values()), dtype=torch.float64, device=self._device)
        self._sums = {tuple(state): pairs} if state else {}

    def means(self, *, resets: bool = True) -> Figures:
        """Return the means, and `skipped_steps` as a count; an empty mean is NaN. Then reset."""
        means = {}
        for name, (total, count) in self.state().items():
            if name != "skipped_steps":
                total = total / count if count else math.nan
            means[name] = total
        if resets:
            self._sums = {}
        return means


class _SampleLog(AppendFile):
    """One rank's samples of each step (`tracking.samples`), to audit exactness or explain loss spikes.

        samples/rank_00000.jsonl    {"step": 12, "ids": [...], "keys": [...], "hash": "..."}, one row per step

    `hash` covers every tensor of the step's batches before `Learner.prepare`: equal hashes mean equal samples. Where a
    GPU cuts the images (data/images/caches.py), it covers their places in memory. It costs a host synchronisation per
    step. All ranks create theirs together.
    """

    def __init__(self, folder: Path, last_step: int) -> None:
        folder = folder / "samples"
        folder.mkdir(exist_ok=True)
        if distributed.is_main():
            for path in folder.glob("rank_*.jsonl"):
                keep_rows(path, last_step)
        distributed.barrier()
        super().__init__(folder / f"rank_{distributed.rank():05d}.jsonl")

    def add(self, step: int, batches: Sequence[Batch]) -> None:
        """Record the micro-batches of step number `step` (from 1)."""
        ids = torch.cat([batch["sample_id"] for batch in batches]).tolist()
        keys = torch.cat([batch["key"] for batch in batches]).tolist()
        digest = sha256_text("".join(hash_tensors(batch) for batch in batches))[:16]
        self.write(json.dumps({"step": step, "ids": ids, "keys": keys, "hash": digest}) + "\n")


# ------------------------------------------------------------------------------------------------------------ recorder


class Recorder:
    """Record one run. The run starts `watchdog` and `bar`; `open` opens the files.

    stage: what the main thread does; samples: what it does it with. Both are for messages. best: the best figure.
    """

    def __init__(self, config: TrainingConfig, learner: Learner, folder: Path) -> None:
        self.folder = folder
        self.watchdog = Watchdog(config.runtime.hang_timeout_sec)
        self.skips = SkipWatch()
        self.clock = Clock()
        self.stage = "the start"
        self.samples = "a batch"
        self._device = learner.runtime.device
        self.log_meter = _Meter(self._device)
        self.epoch_meter = _Meter(self._device)
        self._tracking = config.tracking
        self._learner = learner
        self.bar = Bar("training", learner.plan.total_steps)
        self._metrics = None
        self._samples = None
        self._tracker = None
        self._readings = dict
        self._step = 0
        self._logged = Mark()  # the last log
        self._epoch = Mark()  # the epoch's start
        self._next_plot = time.perf_counter() + _FIRST_PLOT_SEC
        self._next_progress = -math.inf
        self.best = None
        if self._device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self._device)  # a notebook may run several in one process

    @property
    def _plan(self) -> Plan:
        return self._learner.plan

    # ------------------------------------------------------------------------------------------------- open and close

    def open(self, step: int, train: StepStream, run_config: Json | None, evaluates: bool = False) -> None:
        """Open the row files, drop their rows beyond `step`, and start the tracker.

        run_config: the tracker's copy of the configuration. None for a complete run, which needs no tracker and keeps
        the row of its last, partial epoch. evaluates: this step's evaluation is still to come, as at a start from zero.
        """
        self._step = step
        self._logged = self.clock.mark(step)
        self._readings = train.readings
        if distributed.is_main():
            if run_config is not None and self._tracking.name != "jsonl":
                from utils.record.trackers import Tracker

                # First, because W&B reads the rows dropped below.
                self._tracker = Tracker(self._tracking.name, self.folder, run_config, step)
            mark_complete(self.folder, None)
            self._write_progress("running")
            is_whole = self._plan.epoch_of(step) > self._plan.epoch_of(step - 1)
            limits = {} if run_config is None or is_whole else {"epoch": step - 1}
            if evaluates:  # a kill after the evaluation may have left its rows
                limits = {"evaluate": step - 1, "epoch": step - 1}
            self._metrics = MetricsLog(self.folder, step, limits)
        if self._tracking.samples:
            self._samples = _SampleLog(self.folder, step)
        self.skips.open(self.folder, train.path_of, step)

    @property
    def _files(self) -> list[AppendFile]:
        """This rank's open row files."""
        return [file for file in (self._metrics, self._samples) if file is not None]

    def sync(self) -> None:
        """Flush this rank's rows before a checkpoint is published. Any thread may call it."""
        for file in self._files:
            file.sync()

    def close(self, *, completed_step: int | None = None, failed: bool = False) -> None:
        """Close all files. completed_step: the last step of a complete run; None if the run will be resumed."""
        if distributed.is_main():
            state = "failed" if failed else "stopped"
            if completed_step is not None:
                mark_complete(self.folder, completed_step)
                state = "finished"
            self._write_progress(state)
        for file in self._files:
            file.close()
        if self._tracker is not None:
            stopped = None if completed_step is None else 0
            self._tracker.close(1 if failed else stopped)

    # ---------------------------------------------------------------------------------------------------------- steps

    def enters(self, step: int, name: str, batch: Batch | None = None) -> None:
        """Report what the main thread begins to do, to the watchdog; each call counts as progress."""
        self.stage = f"step {step}: {name}"
        self.watchdog.progress(self.stage)
        if batch is not None:
            self.samples = show_samples(batch)
        self.clock.enter(name)
        self._step = step
        if self._metrics is not None and time.perf_counter() >= self._next_progress:
            self._write_progress("running")

    def _speed(self, since: Mark, step: int) -> Figures:
        """Return the images per second since a moment, the seconds of the run, and the peak memory of this process.

        The memory is what was allocated on the GPU, or what was resident on a CPU.
        """
        now = self.clock.mark(step)
        seconds = now.seconds - since.seconds
        rate = (step - since.step) * self._plan.batch_size / seconds if seconds > 0 else float("nan")
        peak = torch.cuda.max_memory_allocated(self._device) if self._device.type == "cuda" else peak_memory()
        return {"images_per_sec": rate, "peak_memory_gib": peak / 2**30, "seconds": now.seconds}

    def add_step(self, step: int, batches: Sequence[Batch], result: StepResult) -> None:
        """Record update number `step` (from 1), without a host synchronisation."""
        if self._samples is not None:
            self._samples.add(step, batches)
        self.log_meter.add(result)
        self.epoch_meter.add(result)
        self.skips.add(step, batches, result)
        self.bar.advance(step)
        self.clock.has_stepped = True

    def _write_progress(self, state: str) -> None:
        """Write what the run is doing, for the page."""
        self._next_progress = time.perf_counter() + _PROGRESS_PAUSE_SEC
        left = self.bar.left_sec if state == "running" else None
        figures = {"step": self._step, "total_steps": self._plan.total_steps, "left_sec": left, "best": self.best}
        figures["metric"] = self._learner.task.best_metric
        write_progress(self.folder, state, **figures)

    def add_row(self, step: int, kind: str, figures: Json) -> None:
        """Write a row of metrics, on rank 0."""
        if self._metrics is not None:
            self._metrics.add(step, kind, figures)
        if self._tracker is not None:
            numbers = {f"{kind}/{name}": value for name, value in figures.items() if isinstance(value, int | float)}
            self._tracker.add(step, {name: value for name, value in numbers.items() if math.isfinite(value)})

    def add_report(self, step: int, report: Report, *, draws: bool = True) -> None:
        """Write an evaluation's tables and pictures as files, and send them to the tracker, on rank 0.

        draws: also draw the pictures that are functions; else they are left out.
        """
        drawn = {name: image for name, image in report.images.items() if not callable(image)}
        if draws:
            with self._drawing():
                drawn = report.draw()
        if distributed.is_main():
            with ignore_write_errors(self.folder / "tables"):
                write_report(self.folder, report.tables, drawn)
                keep_pictures(self.folder, step, drawn)
        if self._tracker is not None:
            images = {f"images/{name.removesuffix('_before')}": image for name, image in drawn.items()}
            self._tracker.add(
                step, images | {f"tables/{name}": [*rows] for name, rows in report.tables.items() if rows}
            )

    def log_step(self, step: int) -> None:
        """Write the means since the last log: the only regular host synchronisation.

        Raises UserError if too many steps were skipped (`SkipWatch.check`).
        """
        plan = self._plan
        means = self.log_meter.means()  # waits for the device, so the time below includes its work
        since = self._logged
        speed = self._speed(since, step)
        self._logged = self.clock.mark(step)
        scheduled = self._scheduled(step)
        wait = (self._logged.waited - since.waited) / max(1, step - since.step)
        readings = {f"data/{name}": value for name, value in {"wait_sec": wait, **self._readings()}.items()}
        self.add_row(step, "train", {"epoch": plan.epoch_at(step), **means, **scheduled, **speed, **readings})
        rates = [f"  {name} {scheduled[name]:.3g}" for name in ("lr", "d") if name in scheduled]
        figures = f"train loss {means['loss']:.4g}{''.join(rates)}"
        log.info(
            "step %d/%d (epoch %.4g)  %s  %s images/s  %s left",
            step, plan.total_steps, plan.shown_epoch(step), figures,
            f"{speed['images_per_sec']:,.2f}", show_duration(self.bar.left_sec),
        )  # fmt: skip
        self.bar.advance(step, description=plan.show_epochs(step), figures=figures)
        if means["skipped_steps"]:
            log.warning("%d steps were skipped before step %d", means["skipped_steps"], step)
            self.skips.read(step)
            self.skips.check(step, last=step == plan.total_steps)

    def _scheduled(self, step: int) -> Figures:
        """Return the rate of update number `step` (from 1), the momentum if it is scheduled, and Prodigy's d."""
        values = self._learner.schedule.at(step - 1)
        figures = {"lr": values.lr, "momentum": values.momentum, "d": self._learner.optimizer.param_groups[0].get("d")}
        return {name: value for name, value in figures.items() if value is not None}

    def end_epoch(self, step: int, epoch: int, last_report: Figures) -> None:
        """Write the epoch's row. A partial last epoch keeps its sums, so that a longer run can complete the row."""
        is_whole = self._plan.epoch_of(step) > epoch
        means = {f"train/{name}": value for name, value in self.epoch_meter.means(resets=is_whole).items()}
        speed = self._speed(self._epoch, step)
        if is_whole:
            self._epoch = self.clock.mark(step)
        self.add_row(step, "epoch", {"epoch": epoch + 1, **means, **last_report, **self._scheduled(step), **speed})

    def may_draw(self, step: int) -> bool:
        """Return whether this is the last step, or the last drawing was long ago."""
        return time.perf_counter() >= self._next_plot or step == self._plan.total_steps

    def plot(self, step: int, *, draws: bool = True) -> None:
        """Draw the run's curves, on rank 0, if `draws`."""
        self.enters(step, "plotting")  # on all ranks, because the watchdog compares their counts
        if self._metrics is None or not draws:
            return
        path = self.folder / "plots/curves.png"
        with self._drawing(), ignore_write_errors(path):
            from utils.record.plots import plot_curves  # imports matplotlib

            plot_curves(self._metrics.rows, path, self.folder.resolve().name)

    @contextmanager
    def _drawing(self) -> Iterator[None]:
        """Put off the next drawing by a multiple of the time of this one."""
        started = time.perf_counter()
        yield
        ended = time.perf_counter()
        self._next_plot = max(self._next_plot, ended) + _PLOT_PAUSE * (ended - started)

    # ---------------------------------------------------------------------------------------------------- checkpoints

    def state(self) -> Json:
        """Return the state for a checkpoint (JSON values)."""
        return {
            "meters": {"log": self.log_meter.state(), "epoch": self.epoch_meter.state()},
            "skipped": self.skips.steps,
            "clock": (self.clock.seconds, self.clock.waited, self._epoch),
        }

    def load_state(self, state: Json) -> None:
        """Restore the state of a checkpoint."""
        self.log_meter.load(state["meters"]["log"])
        self.epoch_meter.load(state["meters"]["epoch"])
        self.skips.steps = [tuple(skipped) for skipped in state["skipped"]]
        self.clock.seconds, self.clock.waited, epoch = state["clock"]
        self._epoch = Mark(*epoch)
