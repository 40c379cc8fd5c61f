"""What every training script calls: `start_ranks` first, `build_task`, and `run_training` last.

The run folder is opened only after data and task are built, so a mistake leaves nothing behind.
"""

import math
import os
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing, contextmanager
from dataclasses import replace
from logging import DEBUG, INFO
from pathlib import Path
from typing import TypeVar

import torch

from engine.batch_size import out_of_memory
from engine.config import MachineConfig, RuntimeConfig, TrainingConfig
from engine.lr_finder import find_lr
from engine.plan import Plan, make_plan
from engine.recorder import MUCH_WAITING
from engine.resume import check_resume, resume, save, will_resume
from engine.run_parts import Run, build_run
from engine.runtime import Runtime, choose_compile, choose_device, choose_runtime
from engine.screen import advise, end_screen, start_screen
from engine.streams import Streams
from engine.task import Task, freeze, trained_networks
from engine.train_one_epoch import Vote, train_one_epoch
from optim.build import check_optimizer, check_shardable
from optim.groups import build_groups, groups_table
from utils.config.entry_point import Job
from utils.config.recipe import recipe_hash
from utils.config.sweep import SWEEP_VARIABLE
from utils.errors import EXIT_LOST_RANK, EXIT_STOPPED, UserError, lost_worker
from utils.io.safe_text import Lines
from utils.io.weights import InitFrom
from utils.ranks import distributed
from utils.ranks.signals import StopRequest
from utils.record.figures import show_figures
from utils.record.logging import get_logger, setup_logging
from utils.record.run_folder import (
    RunFolder,
    default_run_dir,
    environment_state,
    open_run_folder,
    write_config,
    write_result,
)
from utils.record.trackers import check_tracker, logged_weights

log = get_logger(__name__)
AnyTask = TypeVar("AnyTask", bound=Task)

# The watchdog names a rank that hangs; the time-out of the process group is a second line of defence.
_GROUP_PATIENCE = 4


# ------------------------------------------------------------------------------------------------------------ starting


def start_machine(config: MachineConfig) -> Runtime:
    """Join the ranks and decide what `auto` means on this machine."""
    device = choose_device(config.device)
    world = distributed.init_process_group(device, _GROUP_PATIENCE * config.hang_timeout_sec)
    setup_logging(world.rank, explain=isinstance(config, RuntimeConfig) and config.explain)
    return choose_runtime(config)


def start_ranks(config: TrainingConfig) -> Runtime:
    """Start the machine for training, and check that all ranks have the same configuration."""
    runtime = start_machine(config.runtime)
    shares_layers = config.runtime.parallel == "fsdp" or config.runtime.sync_batchnorm
    if config.loop.batch_size == "auto" and shares_layers and distributed.is_distributed():
        raise UserError(
            "loop.batch_size: auto lets each rank try alone, which runtime.parallel=fsdp and "
            "runtime.sync_batchnorm=true rule out; set a number"
        )
    if config.optim.name == "adamw8bit":  # it moves other weights into memory that averages do not see
        runtime = replace(runtime, channels_last=False)
    distributed.check_same("configuration", recipe_hash(config.model_dump(mode="json")))
    distributed.check_same("runtime.precision", runtime.precision)
    return runtime


def run_path(config: TrainingConfig, job: Job) -> Path:
    """Return where the run's folder is, or will be."""
    return Path(default_run_dir(config.model_dump(mode="json"), job))


def build_task(make: Callable[[], AnyTask], config: TrainingConfig) -> AnyTask:
    """Build the task from the seed, equal on all ranks; on the meta device for a dry run."""
    torch.manual_seed(config.seed)
    with torch.device("meta" if config.dry_run else "cpu"):
        task = make()
    if not config.dry_run:
        task.load_frozen()
    freeze(task)
    return task


def derive_plan(config: TrainingConfig, streams: Streams) -> Plan:
    """Derive steps, micro-batch and learning rate from the configuration, the ranks and the length of an epoch."""
    return make_plan(
        config,
        world_size=distributed.planned_world_size() if config.dry_run else distributed.world_size(),
        epoch_length=streams.train.epoch_length,
        chunk=streams.train.chunk,
        evaluation_samples=streams.evaluation_samples,
    )


# -------------------------------------------------------------------------------------------------- checks and dry run


def describe_run(task: Task, streams: Streams, config: TrainingConfig, plan: Plan, runtime: Runtime, job: Job) -> None:
    """Check what can be checked before any image is read, and log what will run."""
    check_optimizer(config.optim, config.schedule)
    if config.runtime.parallel == "fsdp":
        check_shardable(config.optim)
    distributed.rank_zero_call(lambda: check_tracker(config.tracking))
    networks = trained_networks(task)
    groups = build_groups(task, networks, config.optim)
    compiles = choose_compile(config.runtime, runtime.device.type, plan.total_steps)
    log.debug("runtime: %s compile=%s", runtime.describe(), compiles)
    log.debug("plan: %s", plan.describe())
    for name, network in networks.items():
        count = sum(parameter.numel() for parameter in network.parameters())
        log.debug("%s: %s, %s parameters", name, type(network).__name__, f"{count:,}")
    folder = str(run_path(config, job))
    log.info("%s", Lines(start_screen(job.script, config, plan, runtime, networks, streams.described, folder)))
    log.log(INFO if config.dry_run else DEBUG, "parameter groups:\n%s", Lines(groups_table(groups)))


# ------------------------------------------------------------------------------------------------------------ training


def run_training(
    task: Task,
    streams: Streams,
    config: TrainingConfig,
    job: Job,
    runtime: Runtime,
    *,
    prepare: Callable[[], None] | None = None,
    next_commands: Sequence[str] = (),
) -> str:
    """Train to the end of the plan, or from where the run folder left off; returns a line with the result.

    `prepare`: called on a new run after the task has loaded `init_from`, such as to fit a head. `next_commands`: what
    can be typed next; shown at the end. With dry_run set, everything is checked and logged and nothing is made. Raises
    UserError for what the user can fix, SystemExit(75) after a stop signal.
    """
    plan = derive_plan(config, streams)
    describe_run(task, streams, config, plan, runtime, job)  # refuses what it can before a folder is made
    values = config.model_dump(mode="json")
    resumes = distributed.rank_zero_call(lambda: will_resume(config, run_path(config, job)))
    if not resumes:
        task.initialise(None if config.init_from is None else InitFrom(config.init_from, config.init_weights))
    if config.dry_run:
        check_resume(config, RunFolder(run_path(config, job), values, job), plan.total_steps)
        log.info("dry run: nothing was written")
        return f"dry run: {plan.total_steps} steps"
    if not resumes and prepare is not None:
        prepare()
    with (
        open_run_folder(values, job) as folder,
        StopRequest() as stop,
    ):
        run = build_run(task, streams, config, plan, runtime, folder, stop)
        run.learner.micro_batches.open(folder.path, runtime.device)
        if config.loop.batch_size == "auto" and distributed.is_distributed():
            run.rehearse()
        resume(run, config)
        distributed.rank_zero_call(lambda: write_config(folder, environment_state(runtime=runtime.describe())))
        started, first, finished = time.perf_counter(), run.step, True
        with _records(run):
            if run.is_complete:
                log.info(
                    "the run is complete: %d of %d steps are done; for more, raise loop.total_epochs, or give another "
                    "run_dir", run.step, plan.total_steps,
                )  # fmt: skip
            elif finished := fit(run, config):
                _report_end(run, config, first, time.perf_counter() - started, next_commands)
        _close_records(run, finished=finished)
    if not finished:
        log.warning("stopped at step %d; saved in %s; the same command continues from there", run.step, folder.path)
        raise SystemExit(EXIT_STOPPED)
    return _summarise(run)


@contextmanager
def _records(run: Run) -> Iterator[None]:
    """Keep the run's records open; where the run fails, close what must be, and name a rank that was lost."""
    recorder, folder = run.recorder, run.saver.folder
    try:
        if not run.is_complete:  # a complete run needs no tracker
            sweep = os.environ.get(SWEEP_VARIABLE)
            distributed.rank_zero_call(lambda: recorder.start_tracker(folder.saved_config, run.step, sweep))
        run.open_records()
        recorder.watchdog.start()
        yield
    except BaseException as error:  # an interrupt too: in a notebook the process lives on
        if isinstance(error, torch.OutOfMemoryError):
            error = out_of_memory(recorder.stage, *recorder.batch)
        known = not isinstance(error, Exception) or isinstance(error, UserError) or lost_worker(error) is not None
        lost = None if known else recorder.watchdog.name_lost_ranks()
        recorder.abandon()
        run.saver.writer.wait()
        if lost:
            log.error("%s; the same command resumes from the last checkpoint", lost)
            raise SystemExit(EXIT_LOST_RANK) from error
        raise error
    recorder.watchdog.stop()


def fit(run: Run, config: TrainingConfig) -> bool:
    """Make the updates that are left; returns False where the run was asked to stop (and has saved)."""
    if config.lr_finder.enabled and run.step == 0 and not find_lr(run, config):
        return False
    if run.plan.total_steps == 0:
        run.evaluator.evaluate(run.learner)
        save(run, last=True)
    vote = Vote()
    with closing(run.streams.train.steps(run.step, run.plan)) as batches, run.recorder.bar.opened(run.step):
        while not run.is_complete:
            if not train_one_epoch(run, batches, config.loop, run.plan.epoch_of(run.step), vote):
                return False
    return True


def _close_records(run: Run, *, finished: bool) -> None:
    """Write the run's result for its sweep, send the tracker the best weights of a complete run, and close."""
    task, folder, best = run.learner.task, run.saver.folder, run.evaluator.best
    if distributed.is_main():
        write_result(folder.path, task.best_metric, best, is_lowest_best=task.best_is_lowest)
    if distributed.is_main() and finished:
        weights = logged_weights(folder.weights)  # the last ones where this folder has no best ones
        figures = {task.best_metric: best.value, "best_step": best.step} if weights.alias == "best" else {}
        metadata = {"step": run.step, "script": folder.job.script, "model": folder.config["model"], **figures}
        run.recorder.add_model(*weights, metadata)
    run.recorder.close(completed_step=run.step if finished else None)


def _report_end(run: Run, config: TrainingConfig, first: int, seconds: float, next_commands: Sequence[str]) -> None:
    """Log how a run ended that has trained from step `first` on."""
    plan, train = run.plan, run.streams.train
    if run.step < plan.total_steps:
        best, name = run.evaluator.best, run.learner.task.best_metric
        log.info(
            "stopped early: %s is best at step %d (%.4f), loop.early_stop_epochs=%g epochs ago or more; "
            "weights/best_weights.safetensors has those weights",
            name, best.step, best.value, config.loop.early_stop_epochs,
        )  # fmt: skip
    if train.unreadable_count:
        log.warning(
            "unreadable images: %d, each with weight 0, in this start or an earlier one; see unreadable.jsonl",
            train.unreadable_count,
        )
    if run.recorder.wait_share > MUCH_WAITING:
        advice = advise(run.learner.runtime, plan.epoch_at(run.step - first), train.readings())
        log.warning("%.0f %% of the training time was a wait for data; %s", 100 * run.recorder.wait_share, advice)
    log.info("%s", Lines(end_screen(run, seconds, next_commands)))


def _summarise(run: Run) -> str:
    """Return the run's line in a sweep's table."""
    best, report = run.evaluator.best, run.evaluator.last_report
    parts = [show_figures({name: value for name, value in report.items() if math.isfinite(value)})]
    if best.value is not None:
        parts.append(f"best {run.learner.task.best_metric}={best.value:.4f} at step {best.step}")
    return "  ".join(parts)
