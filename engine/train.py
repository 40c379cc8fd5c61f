"""train: everything that a training script does after its task and its data stand.

Optimiser and schedule, wrapping for ranks and compiler, resume, epochs, final weights. The script is left with what is
its own: which collection, which task.
"""

import math
import time
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch

from engine.checkpoint import (
    ELSEWHERE,
    Checkpoint,
    find_checkpoint,
    find_checkpoint_before,
    find_continuation,
    list_checkpoints,
    load_checkpoint,
    set_aside_beyond,
)
from engine.config import TrainingConfig
from engine.meters import Meter
from engine.parallel import share_task
from engine.plan import Plan
from engine.runtime import Runtime, choose_compile
from engine.skips import SkipWatch, TooManySkipped
from engine.step import LossScale
from engine.task import Batch, Task
from engine.train_one_epoch import StopVote, train_one_epoch
from engine.training import Best, Training
from engine.writer import CheckpointWriter
from optim.build import build_optimizer, check_shardable, skips_on_device
from optim.ema import EMA
from optim.groups import build_groups, groups_table
from optim.schedules import Schedule
from optim.state import check_optimizer_state, load_optimizer_state
from utils.config.recipe import check_resumable
from utils.errors import EXIT_STOPPED, UserError, close_names, lost_worker
from utils.io.safe_text import Lines
from utils.ranks import distributed, sharded
from utils.ranks.sharded import own_parts
from utils.ranks.signals import StopRequest
from utils.ranks.watchdog import Watchdog
from utils.record.logging import get_logger
from utils.record.metrics_log import MetricsLog
from utils.record.progress import Bar
from utils.record.run_folder import RunFolder, update_saved_config
from utils.record.sample_log import SampleLog
from utils.record.trackers import check_tracker, start_tracker

log = get_logger(__name__)

MOST_ROLLBACKS = 3  # of one process: what four stretches of samples have in common is not the samples


def check_knobs(task: Task, config: TrainingConfig) -> None:
    """Raise where schedule.knobs does not give exactly the scheduled values that the task reads."""
    given, wanted = set(config.schedule.knobs), set(task.knob_names)
    for name in sorted(given - wanted):
        advice = close_names(name, wanted) if wanted else "it reads none"
        raise UserError(f"schedule.knobs.{name}: {type(task).__name__} reads no such value; {advice}")
    for name in sorted(wanted - given):
        raise UserError(
            f"schedule.knobs.{name}: {type(task).__name__} reads it; add schedule.knobs.{name}={{start: .., end: .., "
            "curve: cosine}"
        )


def describe_run(task: Task, config: TrainingConfig, plan: Plan, runtime: Runtime, depths: list[int] | None) -> None:
    """Check what can be checked before any data is read, and say what will run."""
    check_knobs(task, config)
    if config.runtime.parallel == "fsdp":
        check_shardable(config.optim)
    distributed.rank_zero_call(lambda: check_tracker(config.tracking))
    groups = build_groups(task, config.optim, depths)
    count = sum(parameter.numel() for parameter in task.network.parameters())
    compiles = choose_compile(config.runtime, runtime.device.type, plan.total_steps)
    log.info("runtime: %s compile=%s", runtime.describe(), compiles)
    log.info("plan: %s", plan.describe())
    log.info("network: %s, %s parameters", type(task.network).__name__, f"{count:,}")
    log.info("parameter groups:\n%s", Lines(groups_table(groups)))


def _choose_checkpoint(config: TrainingConfig, folder: RunFolder) -> str | None:
    """Return the checkpoint to go on from; on rank 0."""
    if config.resume == "auto":
        found = find_checkpoint(folder.checkpoints)
        return str(found) if found else None
    if config.resume != "never":
        # Given again after a kill, the same command goes on from what it has made since.
        found = find_continuation(folder.checkpoints, folder.config["resume"])
        if found is None:
            return config.resume
        log.info("resume: %s was made by this command, so it goes on from there, not from %s", found, config.resume)
        return str(found)
    existing = list_checkpoints(folder.checkpoints)
    if existing:
        raise UserError(
            f"resume: never was asked for, but {folder.path} holds {len(existing)} checkpoints (up to "
            f"{existing[-1].name}); nothing is overwritten: give another run_dir, or set resume=auto"
        )
    return None


def _leave_behind(folder: RunFolder, step: int) -> None:
    """Put the folder's checkpoints beyond the one that is resumed out of sight; on rank 0."""
    hidden = set_aside_beyond(folder.checkpoints, step)
    if hidden:
        log.warning(
            "resume: the checkpoints beyond step %d are put out of sight and removed by the next save; until then they "
            "lie in %s",
            step, ", ".join(map(str, hidden)),
        )  # fmt: skip


def _check_checkpoint(checkpoint: Checkpoint, config: TrainingConfig, training: Training) -> None:
    """Compare recipe, data, machine and tensors of a checkpoint with this run's."""
    folder, state = training.folder, checkpoint.state
    for line in check_resumable(state["config"], folder.config, config.resume_allow, checkpoint.path):
        log.warning("resume_allow lets through %s", line)
    for name, found in training.fingerprints.items():
        saved = state["fingerprints"].get(name)
        if saved == found:
            continue
        if name not in config.resume_allow:
            raise UserError(
                f"resume: {name} of {folder.path} has changed since the checkpoint ({saved} then, {found} now), so the "
                f"samples would no longer be the same; restore it, or start another run with run_dir=..."
            )
        log.warning(
            "resume_allow lets through a changed %s: its fingerprint is %s in the run, %s now", name, saved, found
        )
    saved, found = state["precision"], training.runtime.precision
    if saved != found:
        if "runtime.precision" not in config.resume_allow:
            raise UserError(
                f"runtime.precision: auto chose {found} here, the run began with {saved}; set "
                f"runtime.precision={saved} or 'resume_allow=[runtime.precision]'"
            )
        log.warning("resume_allow lets through runtime.precision: %s was chosen in the run, %s now", saved, found)
    if state["threads"] != torch.get_num_threads():
        log.warning(
            "resume: %d threads now, %d before: results agree to rounding, bit equality is not promised",
            torch.get_num_threads(),
            state["threads"],
        )
    if checkpoint.step > training.plan.total_steps:
        raise UserError(
            f"loop.total_steps: the run is already at step {checkpoint.step}, beyond the {training.plan.total_steps} "
            "asked for; ask for more, or give another run_dir"
        )
    _check_tensors(checkpoint, training)


def _check_tensors(checkpoint: Checkpoint, training: Training) -> None:
    """Compare names, shapes and dtypes of a checkpoint's tensors with those that this run has."""
    wanted: dict[str, Mapping[str, torch.Tensor]] = {"task": training.task.state_dict()}
    wanted["scale"] = training.scale.state()
    if training.ema is not None:
        wanted["ema"] = training.ema.tensors
    for group, own in wanted.items():
        saved = checkpoint.tensors.get(group, {})
        wrong = [name for name in own if name not in saved or not _are_alike(saved[name], own[name])]
        wrong += [name for name in saved if name not in own]
        if wrong:
            raise UserError(
                f"resume: the checkpoint is of another model: {len(wrong)} tensors of {group} differ, first "
                f"{wrong[0]!r}; {ELSEWHERE}"
            )
    if _has_own_state(checkpoint, training):
        check_optimizer_state(
            training.optimizer, checkpoint.tensors["optimizer"], checkpoint.state["optimizer"], checkpoint.path
        )


def _has_own_state(checkpoint: Checkpoint, training: Training) -> bool:
    """Return whether a checkpoint's optimiser is of this run's kind, so that its state is taken over."""
    made_by, now = checkpoint.state["config"]["optim"], training.folder.config["optim"]
    return (made_by["name"], made_by.get("opt")) == (now["name"], now.get("opt"))


def _are_alike(saved: torch.Tensor, own: torch.Tensor) -> bool:
    return saved.shape == own.shape and saved.dtype == own.dtype


def _restore(training: Training, checkpoint: Checkpoint) -> None:
    """Put a checkpoint's state into the run."""
    own, saved = training.task.state_dict(), checkpoint.tensors["task"]
    with torch.no_grad():
        for name, tensor in own.items():
            sharded.own_part(tensor).copy_(sharded.take_part(saved[name], tensor))
    if _has_own_state(checkpoint, training):
        load_optimizer_state(
            training.optimizer, checkpoint.tensors["optimizer"], checkpoint.state["optimizer"], checkpoint.path
        )
    else:
        made_by, now = (config["optim"]["name"] for config in (checkpoint.state["config"], training.folder.config))
        log.warning("resume: %s begins with no state: the checkpoint's is that of %s", now, made_by)
    training.scale.load(checkpoint.tensors["scale"])
    if training.ema is not None:
        training.ema.load(checkpoint.tensors["ema"])
    training.log_meter.load(checkpoint.state["meters"]["log"])
    training.epoch_meter.load(checkpoint.state["meters"]["epoch"])
    best = Best(**checkpoint.state["best"])
    # Of a run before figures that are not finite were passed over: nothing would ever be better.
    training.best = best if best.value is not None and math.isfinite(best.value) else Best()
    training.last_report = checkpoint.state["last_report"]
    training.step = checkpoint.step
    # Checkpoints made before steps were followed have none of these.
    training.passed_over = checkpoint.state.get("passed_over", 0)
    training.skips.load(checkpoint.state.get("skipped", []), checkpoint.state.get("skipped_empty", []))


def _build(
    task: Task,
    config: TrainingConfig,
    plan: Plan,
    runtime: Runtime,
    folder: RunFolder,
    evaluation: Mapping[str, Iterable[Batch]],
    fingerprints: dict[str, str],
    depths: list[int] | None,
    stop: StopRequest,
) -> Training:
    model = share_task(task, config, plan, runtime)
    task.train()
    groups = build_groups(task, config.optim, depths)
    for group in groups:
        group["params"] = own_parts(group["params"])
    optimizer = build_optimizer(config.optim, groups, plan.lr)
    if not skips_on_device(optimizer):
        log.warning("optim.opt: timm's optimisers cannot skip a step on the device; each step waits for it once")
    return Training(
        task=task,
        model=model,
        optimizer=optimizer,
        scale=LossScale(runtime),
        ema=EMA(task.network) if config.loop.ema_decay is not None else None,
        schedule=Schedule(config.schedule, plan.lr, config.optim.weight_decay, plan.total_steps, plan.warmup_steps),
        plan=plan,
        loop=config.loop,
        seed=config.seed,
        runtime=runtime,
        folder=folder,
        evaluation=evaluation,
        fingerprints=fingerprints,
        metrics=None,
        samples=None,
        watchdog=Watchdog(config.runtime.hang_timeout_sec),
        stop=stop,
        bar=Bar("training", plan.total_steps),
        log_meter=Meter(runtime.device),
        epoch_meter=Meter(runtime.device),
        writer=CheckpointWriter(
            in_background=config.loop.save_in_background, retries=config.loop.on_failed_save == "retry"
        ),
        skips=SkipWatch(config.loop.max_skipped_steps, rolls_back=config.loop.on_too_many_skipped == "rollback"),
    )


def _start_tracker(training: Training, config: TrainingConfig) -> None:
    """Start what `tracking` names, on rank 0; a run that is complete already needs none."""
    folder = training.folder
    if training.step < training.plan.total_steps:
        saved = {"script": folder.job.script, **folder.config}
        training.tracker = start_tracker(config.tracking, folder.path, saved, training.step)


def train(
    task: Task,
    loader: Any,
    evaluation: Mapping[str, Iterable[Batch]],
    config: TrainingConfig,
    plan: Plan,
    runtime: Runtime,
    folder: RunFolder,
    *,
    fingerprints: dict[str, str],
    depths: list[int] | None = None,
    rare_loaders: Mapping[str, float] | None = None,
) -> str:
    """Train the task to the end of the plan, or from where its run folder left off; returns a line with the result.

    `loader.steps(start_step, plan)` yields micro-batches, `loader.unreadable` counts what could not be read,
    `loader.path_of(sample_id)` names a sample (data/loader.py); `fingerprints` name what must not change under a run
    (the collection); `depths` are a ConvNeXt V2's, for layer decay; `rare_loaders` gives the epochs between two uses of
    an evaluation loader that not every evaluation needs: the first one at or after each multiple uses it, and the last.
    Raises UserError for what the user can mend, SystemExit(75) after a stop signal.
    """
    with StopRequest() as stop:
        training = _build(task, config, plan, runtime, folder, evaluation, fingerprints, depths, stop)
        training.rare_loaders = rare_loaders or {}
        found = distributed.rank_zero_call(lambda: _choose_checkpoint(config, folder))
        if found is not None:
            checkpoint = load_checkpoint(Path(found), lambda described: _check_checkpoint(described, config, training))
            _restore(training, checkpoint)
            log.info("resumed from %s at step %d", found, training.step)
            distributed.rank_zero_call(lambda: _leave_behind(folder, training.step))
        if distributed.is_main():
            update_saved_config(folder.path, folder.config, folder.job)
        distributed.rank_zero_call(lambda: _start_tracker(training, config))
        _open_records(training, config, loader)
        training.watchdog.start()
        try:
            finished = _run(training, config, loader)
        except BaseException as error:  # an interrupt too: the process may be a notebook's and live on
            known = not isinstance(error, Exception) or isinstance(error, UserError) or lost_worker(error) is not None
            lost = None if known else training.watchdog.name_lost_ranks()
            if lost:
                log.error("%s; the same command resumes from the last checkpoint", lost)
            training.watchdog.abandon()
            training.writer.close()
            if training.tracker is not None:
                training.tracker.close(failed=True)
            raise
        training.watchdog.stop()
        for record in (training.metrics, training.samples, training.skips, training.tracker):
            if record is not None:
                record.close()
    if not finished:
        log.warning("stopped at step %d on request; the same command goes on from there", training.step)
        raise SystemExit(EXIT_STOPPED)
    return _result(training)


def _open_records(training: Training, config: TrainingConfig, loader: Any) -> None:
    """Open what is written row by row, without the rows beyond this step; again after a roll-back."""
    path, step = training.folder.path, training.step
    for record in (training.metrics, training.samples):
        if record is not None:
            record.close()
    if distributed.is_main():
        training.metrics = MetricsLog(path, step)
    if config.tracking.samples:
        training.samples = SampleLog(path, step)
    training.skips.open(path, loader.path_of, step)


def _run(training: Training, config: TrainingConfig, loader: Any) -> bool:
    """Run to the end, rolling back where that is asked for; returns False where the run was asked to stop."""
    rollbacks = 0
    while True:
        try:
            return _run_epochs(training, loader)
        except TooManySkipped as request:
            rollbacks += 1
            if rollbacks > MOST_ROLLBACKS:
                raise UserError(
                    f"{request.message}the run has rolled back {MOST_ROLLBACKS} times, past other samples each time; "
                    "set a lower optim.lr, loop.clip_grad_norm or runtime.precision=fp32"
                ) from None
            _roll_back(training, config, loader, request)


def _roll_back(training: Training, config: TrainingConfig, loader: Any, request: TooManySkipped) -> None:
    """Go back to the newest checkpoint before the steps left out, and past the samples read since.

    The same samples would meet the same fate. The best weights stay: they were measured, whatever came after them.
    """
    reached, best = training.step, training.best
    passed_over = training.passed_over

    def find() -> str | None:
        training.writer.close()
        found = find_checkpoint_before(training.folder.checkpoints, request.first)
        return str(found) if found else None

    found = distributed.rank_zero_call(find)
    if found is None:
        raise UserError(
            f"{request.message}no checkpoint was made before them to roll back to; set a lower optim.lr or "
            "loop.checkpoint_every_steps"
        )
    _restore(training, load_checkpoint(Path(found)))
    training.best, training.passed_over = best, passed_over + reached - training.step
    _open_records(training, config, loader)
    if training.metrics is not None:
        # Of the step to come, so that a resumption from this checkpoint drops it and makes it again.
        figures = {"from_step": reached, "passed_over_steps": training.passed_over}
        training.metrics.add(training.step + 1, "rollback", figures)
    log.warning(
        "%srolled back to step %d; the samples of %d steps are passed over",
        request.message, training.step, reached - training.step,
    )  # fmt: skip


def _run_epochs(training: Training, loader: Any) -> bool:
    """Run the remaining epochs; returns False where the run was asked to stop."""
    plan = training.plan
    if training.step >= plan.total_steps:
        log.info("the run is complete: %d of %d steps are done", training.step, plan.total_steps)
        return True
    started = time.perf_counter()
    stream = loader.steps(training.step + training.passed_over, plan)
    vote = StopVote()
    training.start_clock()
    try:
        with training.bar.opened(training.step):
            while training.step < plan.total_steps:
                if not train_one_epoch(training, stream, plan.epoch_of(training.step), vote):
                    return False
    finally:
        stream.close()
    log.info("trained to step %d in %.1f s", training.step, time.perf_counter() - started)
    if loader.unreadable.count:
        log.warning("%d images could not be read and weighed 0; see unreadable.jsonl", loader.unreadable.count)
    return True


def _result(training: Training) -> str:
    """Return the run's line in a sweep's table."""
    best = training.best
    parts = [f"{name}={value:.4f}" for name, value in training.last_report.items() if math.isfinite(value)]
    if best.value is not None:
        parts.append(f"best {training.task.best_metric}={best.value:.4f} at step {best.step}")
    return "  ".join(parts)
