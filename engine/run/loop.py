"""A run: the training loop, saving and resuming.

Run.fit -> train_one_epoch -> Learner.update -> task(batch, progress)
"""

import time
from collections.abc import Iterator, Sequence
from contextlib import closing
from dataclasses import replace
from itertools import islice
from pathlib import Path

import torch

from engine.config import TrainingConfig
from engine.plan import Plan, plan_streams
from engine.run.checkpoint import Saver, read_groups, read_state
from engine.run.evaluation import Evaluator
from engine.run.recorder import Recorder
from engine.run.summary import report_end
from engine.task import Streams, Task, fingerprint_helpers
from engine.update.learner import Learner
from engine.update.runtime import Runtime
from optim.groups import set_peak_lr
from utils.config.recipe import check_resumable, recipe_hash
from utils.contracts import Batch
from utils.errors import UserError
from utils.ranks import distributed
from utils.ranks.signals import Stopped, is_stop_requested
from utils.record.logging import log
from utils.record.run_folder import RunFolder, git_state


class Run:
    """One run: learner, recorder, saver, evaluator and progress.

    found_lr: the peak learning rate of the range test, which is checkpointed. pace: with `loop.minutes`.
    """

    def __init__(
        self, task: Task, streams: Streams, plan: Plan, config: TrainingConfig, runtime: Runtime, folder: RunFolder
    ) -> None:
        self.streams = streams
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
        self.recorder = Recorder(config, self.learner, folder.path)
        self.saver = Saver(folder, config, {"trained_on": trained_on, **({"frozen": helpers} if helpers else {})})
        self.evaluator = Evaluator(self.learner, streams, config, self.recorder, self.saver)
        self._phase = 0
        self.found_lr = None
        self.pace = None

    @property
    def step(self) -> int:
        """Updates done."""
        return self.learner.step

    @property
    def plan(self) -> Plan:
        """The plan of the run."""
        return self.learner.plan

    @property
    def is_complete(self) -> bool:
        """Whether all steps are done or the run stops early."""
        if self.evaluator.is_owed:
            return False
        is_measured = self.plan.total_steps > 0 or bool(self.evaluator.report)
        return (self.step >= self.plan.total_steps and is_measured) or self.evaluator.has_stalled

    # ------------------------------------------------------------------------------------------------------- the loop

    def fit(self, next_commands: Sequence[str] = ()) -> None:
        """Make the remaining updates. Raises Stopped after a stop request, once the checkpoint is saved.

        next_commands: shown in the summary.
        """
        plan = self.plan
        started = time.perf_counter()
        only = self.config.lr_finder.only
        if only and self.step > 0:
            raise UserError(f"lr_finder.only: {self.folder.path} has {self.step} updates; give another run_dir")
        if self.is_complete:
            done = f"{self.step} of {plan.total_steps} steps are done"
            more = "raise loop.total_epochs" if self.config.loop.minutes is None else "begin from it (init_from=RUN)"
            log.info("the run is complete: %s; %s, or give another run_dir", done, more)
            return
        if self.step == 0 and plan.total_steps > 0 and not only:
            self.evaluator.begin()
            if self.pace is not None:
                self.pace.begin()
        if self.step == 0 and plan.range_test_steps:
            from engine.run.lr_finder import find_lr

            with closing(self.read(0, plan.total_steps)) as batches:
                rate = find_lr(self.learner, batches, plan, self.recorder)
            if rate is not None:
                self.use_lr(rate)
        if only:
            log.info("lr_finder.only: ends after the test; without it, the same command trains")
            return
        if self.plan.total_steps == 0:
            if not self.evaluator.report:
                self.evaluator.evaluate()
            self.save(last=True)
        if self.evaluator.is_owed:
            self.end_step(stops=False, saves=True)
        with closing(self._steps(self.step)) as batches, self.recorder.bar.opened(self.step):
            while self.step < self.plan.total_steps and not self.evaluator.has_stalled:
                self.train_one_epoch(batches)
        report_end(self.evaluator, time.perf_counter() - started, next_commands)

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
                self.pace.correct()

            # 1. Data.
            recorder.enters(learner.step, "loading")
            batches = next(stream)

            # 2. The update.
            recorder.enters(learner.step, "computing", batches[0])
            result = learner.update(batches)

            # 3. The record.
            step = learner.step
            recorder.add_step(step, batches, result)

            # 4. Log, evaluate and save. Figures come before the checkpoint, so that a resumed run has them.
            stops, saves = distributed.poll(step, is_stop_requested(), self.saver.is_due())
            evaluates = self.evaluator.is_owed
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
        if self.evaluator.is_owed:
            try:
                self.evaluator.evaluate()
            except Stopped:
                stops = True
        last = self.is_complete
        every = self.config.loop.keep_weights_every
        if every is not None and (last or step % every == 0):
            self.learner.sync_buffers()
            with self.learner.evaluated():
                self.saver.write_alone(self.learner, f"step_{step:06d}.safetensors")
        if not self.evaluator.is_owed and (step == self.plan.epoch_end(epoch) or last):
            self.recorder.end_epoch(step, epoch, self.evaluator.report)
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

    def plan_of(self, steps: int) -> Plan:
        """Return the plan of a run with a number of steps."""
        return plan_streams(self.config, self.streams, self.plan.world_size, steps)

    def use_length(self, steps: int) -> None:
        """Plan the run anew, with another number of steps."""
        self.learner.use_length(self.plan_of(steps))
        self.recorder.bar.advance(self.step, total=steps)
        if self.found_lr is not None:
            self.use_lr(self.found_lr)

    def use_lr(self, lr: float) -> None:
        """Replace the configured peak learning rate with the one that the range test found."""
        self.found_lr = lr
        self.learner.schedule = replace(self.learner.schedule, lr=lr)
        set_peak_lr(self.learner.optimizer, lr)

    # ----------------------------------------------------------------------------------------------- save and restore

    def save(self, *, last: bool) -> None:
        """Save a checkpoint, on all ranks; `last` and errors as in `Saver.save`."""
        learner, recorder = self.learner, self.recorder
        recorder.enters(self.step, "saving")
        learner.sync_buffers()
        recorder.skips.read(self.step)
        tensors, optimizer = learner.state()  # its state without tensors
        state = {
            "config": self.folder.config,
            "fingerprints": self.fingerprints,
            "origin": learner.task.origin,
            "found_lr": self.found_lr,
            "optimizer": optimizer,
            **self.evaluator.state(),
            **recorder.state(),
        }
        self.saver.save(learner, tensors, state, recorder.sync, last=last)

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
        # resume_allow may let another figure choose.
        is_same = state["config"]["loop"].get("best") == self.config.loop.best
        self.evaluator.load_state(state, same_metric=is_same)
        self.recorder.load_state(state)
        log.info("resumed from %s at step %d", path, self.step)
        if state["found_lr"] is not None and self.config.optim.lr is None:
            self.use_lr(state["found_lr"])
            log.info("the peak learning rate is %.3g, found by this run's range test", self.found_lr)
