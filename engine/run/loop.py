"""A run: the training loop, evaluation, saving and resuming.

Run.fit -> train_one_epoch -> Learner.update -> forward_backward (engine/update/step.py) -> task(batch, progress)
"""

import math
import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import closing
from dataclasses import asdict, dataclass, replace
from itertools import islice
from pathlib import Path

import torch

from engine.config import TrainingConfig
from engine.plan import Plan, plan_streams
from engine.run.advice import advise
from engine.run.checkpoint import Saver, read_groups, read_state
from engine.run.lr_finder import find_lr
from engine.run.minutes import Pace, of_length
from engine.run.recorder import Recorder
from engine.task import Loaders, Report, Streams, Task, fingerprint_helpers
from engine.update.learner import Learner
from engine.update.parallel import reshard
from engine.update.runtime import Runtime
from optim.build import at_average
from optim.groups import set_peak_lr
from utils.config.recipe import check_resumable, recipe_hash
from utils.contracts import Batch
from utils.io.files import Values, ignore_write_errors, write_json
from utils.io.safe_text import Lines
from utils.ranks import distributed
from utils.ranks.signals import Stopped, check_stop, is_stop_requested
from utils.record.figures import COUNTS, interval, show_duration, show_evaluated, show_interval, show_lines
from utils.record.logging import get_logger
from utils.record.progress import track
from utils.record.run_folder import RunFolder, git_state
from utils.record.run_reader import RESULT_FILE

log = get_logger(__name__)

_SHOWN = 3  # figures of an evaluation in the log line
_MUCH_WAITING = 0.1  # share of training time spent waiting for data from which the last screen has it
_WAITING = (
    "{:.0%} of the training time was spent waiting for data: raise runtime.workers or data.cache.memory_gib, pack "
    "small files into shards (prepare.py job=pack), or set augment.on_device=true"
)


@dataclass(frozen=True)
class Best:
    """The task's best_metric at the best evaluation so far, with its 95 % interval if it has one, and its step.

    weights: the checksum of their file.
    """

    value: float | None = None
    step: int | None = None
    interval: Sequence[float] | None = None
    weights: str = ""


class Run:
    """One run: learner, recorder, saver and progress.

    gain: the last evaluation that was better than the gain before it by more than `loop.early_stop_least`.
    last_report, last_evaluated: scalars and step of the newest evaluation. found_lr: the peak learning rate of the
    range test. These and `best` are checkpointed. pace: with `loop.minutes`. evaluation_sec: the seconds of the newest
    evaluation, or about those of the first one.
    """

    def __init__(
        self, task: Task, streams: Streams, plan: Plan, config: TrainingConfig, runtime: Runtime, folder: RunFolder
    ) -> None:
        self.streams = streams
        self.plan = plan
        self.config = config
        self.folder = folder
        helpers = fingerprint_helpers(task)
        self.fingerprints = {
            **streams.fingerprints,
            **{f"frozen.{name}": value for name, value in helpers.items()},
            "runtime.precision": runtime.precision,
        }
        git = distributed.rank_zero_call(git_state)
        trained_on = {
            "images": plan.epoch_length,
            "validation_images": streams.evaluation_samples,
            "fingerprint": streams.fingerprints.get("data.root"),
            "batch_size": plan.batch_size,
            "recipe": recipe_hash(folder.config),
            "commit": (git["commit"] or "unknown")[:12],  # 40 digits look like a secret, which a card hides
            **streams.trained_on,
        }
        if git["changed_files"]:
            trained_on["changed_files"] = len(git["changed_files"])
        self.learner = Learner(task, config, plan, runtime)
        self.recorder = Recorder(config, plan, self.learner, folder.path)
        self.saver = Saver(folder, config, {"trained_on": trained_on, **({"frozen": helpers} if helpers else {})})
        self._phase = 0
        self.best = Best()
        self.gain = Best()
        self.last_report: dict[str, float] = {}
        self.last_evaluated = 0
        self.found_lr: float | None = None
        self.pace: Pace | None = None
        self.evaluation_sec = 0.0
        self._tables: Values = {}  # of this process's newest evaluation

    @property
    def step(self) -> int:
        """Updates done."""
        return self.learner.step

    @property
    def has_stalled(self) -> bool:
        """Whether the last gain is `loop.early_stop_epochs` or more before the newest evaluation."""
        patience = self.config.loop.early_stop_epochs
        if patience is None or self.gain.step is None:
            return False
        return self.plan.epoch_at(self.last_evaluated) - self.plan.epoch_at(self.gain.step) >= patience - 1e-9

    @property
    def owes_evaluation(self) -> bool:
        """Whether this step's evaluation is due and not done; in a resumed run, a stop request has interrupted it."""
        return self.last_evaluated < self.step and self.plan.is_due(self.step, self.plan.evaluate_every_epochs)

    @property
    def is_complete(self) -> bool:
        """Whether all steps are done or the run stops early."""
        if self.owes_evaluation:
            return False
        is_measured = self.plan.total_steps > 0 or bool(self.last_report)
        return (self.step >= self.plan.total_steps and is_measured) or self.has_stalled

    # ------------------------------------------------------------------------------------------------------- the loop

    def fit(self, next_commands: Sequence[str] = ()) -> None:
        """Make the remaining updates. Raises Stopped after a stop request, once the checkpoint is saved.

        next_commands: shown in the summary.
        """
        plan = self.plan
        started = time.perf_counter()
        if self.is_complete:
            done = f"{self.step} of {plan.total_steps} steps are done"
            log.info("the run is complete: %s; raise loop.total_epochs, or give another run_dir", done)
            return
        if self.step == 0 and plan.total_steps > 0:
            self._draw_before()
            if self.learner.task.measures_start and self.streams.evaluation_samples:
                self.evaluate()
        if self.step == 0 and plan.range_test_steps:
            with closing(self.read(0, plan.total_steps)) as batches:
                rate = find_lr(self.learner, batches, plan, self.recorder)
            if rate is not None:
                self.use_lr(rate)
        if plan.total_steps == 0:
            self.evaluate()
            self.save(last=True)
        if self.owes_evaluation:
            self.end_step(stops=False, saves=True)
        with closing(self._steps(self.step)) as batches, self.recorder.bar.opened(self.step):
            while self.step < self.plan.total_steps and not self.has_stalled:
                self.train_one_epoch(batches)
        self._report_end(time.perf_counter() - started, next_commands)

    def train_one_epoch(self, stream: Iterator[list[Batch]]) -> None:
        """Train to the end of an epoch or of the run. Each pass of the loop is one optimiser update.

        Evaluations, logs and checkpoints depend on the step alone, so a resumed run repeats them at the same steps.
        stream: yields this rank's micro-batches of each step. Raises UserError if the last checkpoint cannot be written
        or too many steps were skipped.
        """
        learner, recorder = self.learner, self.recorder
        loop = self.config.loop
        end = self.plan.epoch_end(self.plan.epoch_of(learner.step))
        while learner.step < end and not self.is_complete:
            # 0. The length of a run that has a time.
            if self.pace is not None:
                steps = self.pace.steps_at(learner.step, self.plan, recorder.clock, self.evaluation_sec)
                if steps != self.plan.total_steps:
                    self.use_length(steps)

            # 1. Data.
            recorder.phase(learner.step, "loading")
            batches = next(stream)

            # 2. The update.
            recorder.phase(learner.step, "computing", batches[0])
            result = learner.update(batches)

            # 3. The record.
            step = learner.step
            recorder.add_step(step, batches, result)

            # 4. Log, evaluate and save. Figures come before the checkpoint, so that a resumed run has them.
            stops, saves = distributed.poll(step, is_stop_requested(), self.saver.is_due())
            evaluates = self.owes_evaluation
            may_end = step == self.plan.total_steps or (evaluates and loop.early_stop_epochs is not None)
            if step % loop.log_every_steps == 0 or may_end:
                recorder.log_step(step)
                if not evaluates:
                    recorder.plot(step, draws=recorder.may_draw(step))
            self.end_step(stops=stops, saves=saves or step % loop.checkpoint_every_steps == 0)

    def end_step(self, *, stops: bool, saves: bool) -> None:
        """Evaluate, write the epoch's row and save, as due. Raises Stopped after a stop request.

        A run that is stopped during an evaluation is saved without it, and begins with it when it is resumed.
        """
        step = self.step
        epoch = self.plan.epoch_of(step - 1)
        if self.owes_evaluation:
            try:
                self.evaluate()
            except Stopped:
                stops = True
        last = self.is_complete
        every = self.config.loop.keep_weights_every
        if every is not None and (last or step % every == 0):
            self.learner.sync_buffers()
            with self.learner.evaluated():
                self.saver.write_alone(self.learner, f"step_{step:06d}.safetensors")
        if not self.owes_evaluation and (step == self.plan.epoch_end(epoch) or last):
            self.recorder.end_epoch(step, epoch, self.last_report)
        if stops or saves or last:
            self.save(last=last or stops)
        if stops and not last:
            raise Stopped

    def _steps(self, step: int) -> Iterator[list[Batch]]:
        """Yield this rank's micro-batches of each update from `step` on, of one stream after another."""
        for phase, end in enumerate((*self.plan.phase_ends, None)):
            if end is None or step < end:
                with closing(self.read(phase, step)) as batches:
                    yield from islice(batches, None if end is None else end - step)
                step = end

    def read(self, phase: int, step: int) -> Iterator[list[Batch]]:
        """Yield the endless micro-batches of one of the streams, from `step` on."""
        if self.learner.compiles and phase != self._phase:
            torch.compiler.reset()  # else the other size counts as dynamic, unlike in a run that is resumed here
        self._phase = phase
        stream = self.streams.in_order[phase]
        self.learner.prepare = stream.prepare
        yield from stream.steps(step, self.plan.batch_size, self.plan.micro_batch_size)

    def use_length(self, steps: int) -> None:
        """Plan the run anew, with so many steps in all."""
        self.plan = plan_streams(of_length(self.config, steps), self.streams, self.plan.world_size)
        self.learner.use_length(self.plan)
        self.recorder.use_plan(self.plan)
        if self.found_lr is not None:
            self.use_lr(self.found_lr)

    def use_lr(self, lr: float) -> None:
        """Replace the configured peak learning rate with the one that the range test found."""
        self.found_lr = lr
        self.learner.schedule = replace(self.learner.schedule, lr=lr)
        set_peak_lr(self.learner.optimizer, lr)

    # ----------------------------------------------------------------------------------------------------- evaluation

    def evaluate(self) -> None:
        """Evaluate the exported weights (averaged, if averages are exported), and save them if they are the best."""
        learner, recorder, step = self.learner, self.recorder, self.step
        started = time.perf_counter()
        recorder.phase(step, "evaluating")
        learner.sync_buffers()
        with learner.evaluated():
            if step == self.plan.total_steps:
                learner.task.finish()
            report = self.measure(only_draws=self.streams.evaluation_samples == 0)
            metric = learner.task.best_metric
            value = report.scalars.get(metric, math.nan)
            # Of equal ones, the later has learned more.
            is_best = self._gain(value, self.best) >= 0 and self.streams.evaluation_samples >= learner.task.best_needs
            written = is_best and self.saver.write_alone(learner, "best_weights.safetensors")
            if written:
                self.best = Best(value, step, interval(metric, report.scalars), written)
                recorder.best = value
            if self._gain(value, self.gain) > self.config.loop.early_stop_least:
                self.gain = Best(value, step)
        prefix = "ema/" if learner.exports_average else ""
        self.last_report = {f"{prefix}{name}": value for name, value in report.scalars.items()}
        self.last_evaluated = step
        self._tables = report.tables
        self._write_result()
        if self.last_report:
            recorder.add_row(step, "evaluate", {"epoch": self.plan.epoch_at(step), **self.last_report})
        names = [name for name in report.scalars if name not in COUNTS]
        names = names[:_SHOWN] + [name for name in names[_SHOWN:] if "." in name]  # all of a judge's
        shown = [f"{show_evaluated(prefix + name)} {report.scalars[name]:.4g}" for name in names]
        if self.best.value is not None:
            shown.append(f"best {self._name_best()}")
        log.info("%s", "  ".join([self.plan.show_epochs(step), *shown]))
        draws = self.has_stalled or recorder.may_draw(step)  # always before stopping early
        recorder.add_report(step, report, draws=draws)
        if step > 0:  # a run without steps has no curves
            recorder.plot(step, draws=draws)
        self.evaluation_sec = time.perf_counter() - started

    def _gain(self, value: float, before: Best) -> float:
        """Return by how much a figure is better than that of another evaluation; NaN if it is not finite."""
        sign = -1 if self.learner.task.best_is_lowest else 1
        known = -sign * math.inf if before.value is None else before.value
        return sign * (value - known)

    def _draw_before(self) -> None:
        """Show what the task draws before the first update, such as pictures of the base model."""
        self.recorder.phase(0, "evaluating")
        drawn = self.measure(only_draws=True).images
        self.recorder.add_report(0, Report(images={f"{name}_before": image for name, image in drawn.items()}))

    @torch.no_grad()
    def measure(self, *, only_draws: bool, most: int | None = None) -> Report:
        """Return the task's report on the due loaders (`most` batches of each), or only its pictures of prompts."""
        learner = self.learner
        learner.task.eval()
        try:
            with learner.runtime.autocast():
                if only_draws:
                    return learner.task.draw()
                return learner.task.evaluate(self._due_loaders(most), learner.step)
        finally:
            learner.task.train()
            reshard(learner.model)

    def _due_loaders(self, most: int | None) -> Loaders:
        """Return the loaders due at this step, in batches that fit the device if micro-batches are chosen or halved."""
        size = self.learner.micro_batches.size
        is_chosen = self.config.loop.micro_batch_size == "auto" or size < self.plan.micro_batch_size
        due = {}
        for name, loader in self.streams.evaluation.items():
            every = self.streams.every_epochs.get(name)
            if every is None or self.plan.is_due(self.step, every, since=self.last_evaluated):
                loader = loader.in_batches(size) if is_chosen else loader
                batches = self._watch(name, loader, most)
                due[name] = track(batches, len(loader), f"evaluating {name}") if most is None else batches
        return due

    def _watch(self, name: str, loader: Iterable[Batch], most: int | None) -> Iterator[Batch]:
        """Yield a loader's batches; each counts as progress."""
        for batch in islice(loader, most):
            check_stop()
            self.recorder.phase(self.step, f"evaluating {name}", batch)
            yield batch

    # ----------------------------------------------------------------------------------------------- save and restore

    def save(self, *, last: bool) -> None:
        """Save a checkpoint, on all ranks; `last` and errors as in `Saver.save`."""
        learner, recorder = self.learner, self.recorder
        recorder.phase(self.step, "saving")
        learner.sync_buffers()
        recorder.skips.read(self.step)
        state = {
            "config": self.folder.config,
            "fingerprints": self.fingerprints,
            "origin": learner.task.origin,
            "found_lr": self.found_lr,
            "best": asdict(self.best),
            "gain": asdict(self.gain),
            "last_report": self.last_report,
            "last_evaluated": self.last_evaluated,
            **recorder.state(),
        }
        with at_average(learner.optimizer):  # last_weights.safetensors is a file of the checkpoint
            tensors, optimizer = learner.state()  # its state without tensors
            self.saver.save(learner, tensors, {**state, "optimizer": optimizer}, recorder.sync, last=last)

    def restore(self, path: Path) -> None:
        """Resume from a checkpoint. Raises UserError if it does not fit this run."""
        learner = self.learner
        state = read_state(path)
        for line in check_resumable(state["fingerprints"], self.fingerprints, self.config.resume_allow, str(path)):
            log.warning("resume_allow accepts %s", line)
        saved = state["config"]["optim"]
        now = self.folder.config["optim"]
        is_same = all(saved.get(key) == now.get(key) for key in ("name", "opt"))
        if not is_same:
            log.warning("resume: %s starts without state: the checkpoint's optimiser is %s", now["name"], saved["name"])
        learner.load_state(read_groups(path, state), state["optimizer"] if is_same else None, str(path))
        learner.step = state["step"]
        learner.task.origin = state["origin"]
        if state["config"]["loop"].get("best") == self.config.loop.best:  # resume_allow may let another figure choose
            self.best = Best(**state["best"])
            self.gain = Best(**state.get("gain", state["best"]))
            self.recorder.best = self.best.value
        self.last_report = state["last_report"]
        self.last_evaluated = state["last_evaluated"]
        self.recorder.load_state(state)
        log.info("resumed from %s at step %d", path, self.step)
        if state["found_lr"] is not None and self.config.optim.lr is None:
            self.use_lr(state["found_lr"])
            log.info("the peak learning rate is %.3g, found by this run's range test", self.found_lr)

    # -------------------------------------------------------------------------------------------------------- the end

    def _write_result(self, advice: Sequence[str] = ()) -> None:
        """Write the best figure, and what would improve it, on rank 0."""
        task = self.learner.task
        result = {"metric": task.best_metric, **asdict(self.best), "is_lowest_best": task.best_is_lowest}
        if advice:
            result["help"] = advice
        file = self.folder.path / RESULT_FILE
        if distributed.is_main():
            with ignore_write_errors(file):
                write_json(file, result)

    def _report_end(self, seconds: float, next_commands: Sequence[str]) -> None:
        """Log the summary of a finished run. seconds: of this process."""
        folder = self.folder.path
        rows = [] if self.best.step is None else [("best", self._show_best())]
        rows += [
            ("weights", f"{folder}/weights"),
            ("curves", f"{folder}/plots/curves.png"),
            ("tables", f"{folder}/training_log.txt" + (", tables" if (folder / "tables").exists() else "")),
        ]
        unreadable = self.streams.train.unreadable_count
        if unreadable:
            rows.append(("unreadable", f"{unreadable} images, each with weight 0; see unreadable.jsonl"))
        share = self.recorder.clock.wait_share
        if share > _MUCH_WAITING:
            rows.append(("waiting", _WAITING.format(share)))
        advice = advise(self._tables, self.streams.class_images)
        if advice:
            self._write_result(advice)
        rows += [("to improve", line) for line in advice]
        rows += [("next", command) for command in next_commands]
        end = "finished" if self.step >= self.plan.total_steps else "stopped early by loop.early_stop_epochs"
        title = f"{end}: {self.step:,} steps in {show_duration(seconds)}"
        log.info("%s", Lines(show_lines(title, rows)))

    def _show_best(self) -> str:
        """Return the best figure with its interval and epoch, and the last one."""
        metric = self.learner.task.best_metric
        last = self.last_report[f"ema/{metric}" if self.learner.exports_average else metric]
        return f"{self._name_best(show_interval(self.best.interval))}; last {last:.4g}"

    def _name_best(self, interval: str = "") -> str:
        metric = show_evaluated(self.learner.task.best_metric)
        return f"{metric} {self.best.value:.4g}{interval} at epoch {self.plan.shown_epoch(self.best.step):g}"
