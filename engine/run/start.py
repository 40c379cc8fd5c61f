"""The steps of every training script before `Run.fit`: start the ranks, build the task, check, open the run folder.

    runtime = start_ranks(config)
    task = build_task(make, config)
    plan = describe_run(task, streams, config, job, path, runtime)
    with open_run(task, streams, plan, config, job, path, runtime) as run:
        run.fit()

The run folder is opened last, so a configuration error creates no folder.
"""

import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import replace
from functools import partial
from logging import DEBUG, INFO
from pathlib import Path
from typing import NoReturn, TypeVar

import torch
from torch import nn

from engine.config import TrainingConfig
from engine.plan import Plan, count_stated, plan_streams
from engine.run.checkpoint import check_copy, choose_checkpoint
from engine.run.loop import Run
from engine.task import Streams, Task, networks_of
from engine.update.batch_size import out_of_memory
from engine.update.runtime import Runtime, choose_compile, chooses_threads, start_machine
from optim.build import check_optimizer
from optim.config import OneCycleConfig
from optim.groups import build_groups, groups_table
from utils.config.command_line import By, Job
from utils.config.recipe import recipe_hash
from utils.errors import EXIT_LOST_RANK, EXIT_STOPPED, UserError, lost_worker
from utils.io.files import read_json
from utils.io.safe_text import Lines
from utils.ranks import distributed
from utils.ranks.processes import count_cores
from utils.ranks.signals import Stopped, StopRequest
from utils.record.figures import show_lines
from utils.record.logging import log
from utils.record.run_folder import ENVIRONMENT_FILE, environment_state, open_run_folder, write_config

_SHOWN = 6  # findings; result.json has all
AnyTask = TypeVar("AnyTask", bound=Task)


def start_ranks(config: TrainingConfig) -> Runtime:
    """Start the machine for training. Check the configuration, and that all ranks have the same one.

    Fetch the run folder from `loop.checkpoint_mirror` before anything reads it.
    """
    runtime = start_machine(config.runtime)
    world_size = distributed.planned_world_size()
    config.loop.micro_batches(world_size, None)
    check_optimizer(config.optim, config.schedule)
    config.check_fused(runtime.precision, world_size)
    if not config.optim.keeps_layout:  # averages would miss replaced memory
        runtime = replace(runtime, channels_last=False)
    distributed.check_same("configuration", recipe_hash(config.model_dump(mode="json")))
    distributed.check_same("runtime.precision", runtime.precision)
    if config.loop.checkpoint_mirror and not config.dry_run:
        from engine.run.remote_copy import RemoteCopy

        copy = RemoteCopy(config.loop.checkpoint_mirror, Path(config.run_dir))
        distributed.rank_zero_call(lambda: copy.fetch(partial(check_copy, config)))
    return runtime


def build_task(make: Callable[[], AnyTask], config: TrainingConfig) -> AnyTask:
    """Build the task from the seed, equal on all ranks; on the meta device for a dry run.

    Raises UserError (`optim.rules`, `loop.best`).
    """
    torch.manual_seed(config.seed)
    with torch.device("meta" if config.dry_run else "cpu"):
        task = make()
    groups = build_groups(task, networks_of(task, task.trained), config.optim)
    log.log(INFO if config.dry_run else DEBUG, "parameter groups:\n%s", Lines(groups_table(groups)))
    task.choose_best(config.loop.best)
    if not config.dry_run:
        task.load_helpers("training")
    return task.train()


def describe_run(task: Task, streams: Streams, config: TrainingConfig, job: Job, path: Path, runtime: Runtime) -> Plan:
    """Return the run's plan, and log the start screen. path: its folder."""
    known = None
    if config.loop.minutes is not None:
        from engine.run.pace import read_minutes

        known = read_minutes(path, config.loop.minutes)
    if config.loop.early_stop_epochs is not None and streams.evaluation_samples == 0:
        raise UserError(
            f"loop.early_stop_epochs: {config.loop.early_stop_epochs:g}, but there are no validation images; set "
            "data.validation_fraction=0.1, or early_stop_epochs=null"
        )
    steps = known and known.steps_before(math.inf)
    plan = plan_streams(config, streams, distributed.planned_world_size(), steps)
    is_open = config.loop.minutes is not None and known is None
    _check_warmup(config, plan, job)
    compiles = choose_compile(config, runtime.device.type, plan.total_steps)
    log.debug("runtime: %s compile=%s\nplan: %s", runtime.describe(), compiles, plan)
    screen = _start_screen(config, plan, runtime, networks_of(task, task.trained), streams, is_open)
    if 0 < streams.evaluation_samples < task.best_needs:
        log.warning(
            "%d validation images are too few to choose the best weights: the last are exported; loop.best=loss lets "
            "their loss choose", streams.evaluation_samples,
        )  # fmt: skip
    log.info("%s", Lines(f"{job.script}.py: {screen}\n  run folder  {path}"))
    if config.dry_run:
        choose_checkpoint(config, path, plan.total_steps)
    return plan


def _check_warmup(config: TrainingConfig, plan: Plan, job: Job) -> None:
    """Raise UserError for a typed warm-up that is longer than the run. The start screen names one of a recipe."""
    if isinstance(config.schedule, OneCycleConfig) or config.loop.minutes is not None:  # the clock decides
        return
    key = "schedule.warmup_epochs" if config.schedule.warmup_steps is None else "schedule.warmup_steps"
    stated = count_stated(config, plan.epoch_length / plan.batch_size, plan.total_steps)
    if stated > plan.total_steps and job.states(key, By.WORD):
        raise UserError(f"{key}: {stated:,} steps, but the run has {plan.total_steps:,}; lower it, or train longer")


def _start_screen(
    config: TrainingConfig,
    plan: Plan,
    runtime: Runtime,
    networks: Mapping[str, nn.Module],
    streams: Streams,
    is_open: bool,
) -> str:
    """Return the start screen. networks: the trained networks. is_open: the number of steps is not known yet."""
    count = sum(parameter.numel() for network in networks.values() for parameter in network.parameters())
    source = "" if config.init_from is None else f", begins with {config.init_from}"
    rows = [*streams.described.items(), ("training", _show_length(config, plan, streams, is_open))]
    rate = "found by a range test before the first update" if plan.range_test_steps else f"{plan.lr:.3g}"
    rows += [
        ("rate", f"{rate}, {config.optim.name}, schedule {config.schedule.name}{_show_warmup(config, plan, is_open)}"),
        ("machine", _show_machine(plan, runtime)),
    ]
    rows += [("validity", f"{finding['line']} ({finding['key']})") for finding in streams.findings[:_SHOWN]]
    return show_lines(f"{config.task.name}, {config.model.name}, {count:,} parameters{source}", rows)


def _show_length(config: TrainingConfig, plan: Plan, streams: Streams, is_open: bool) -> str:
    epoch = f"{plan.epoch_length / plan.batch_size:.4g} steps"
    if is_open:
        return f"as many steps as fit into {config.loop.minutes:g} minutes; an epoch has {epoch}"
    steps = f"{epoch}, {plan.total_steps:,} in all, of {plan.batch_size} images each"
    samples = f"{plan.total_steps * plan.batch_size:,} samples"
    if config.loop.total_steps is None and config.loop.total_epochs == "auto":
        samples += " (loop.total_epochs=auto)"
    evaluation = f"evaluated every {plan.evaluate_every_epochs:.3g} epochs on {streams.evaluation_samples:,} images"
    if streams.evaluation_samples == 0:
        evaluation = "no validation images: no evaluation loss and no best weights; the last are exported"
    return f"{samples}: {plan.shown_epoch(plan.total_steps):g} epochs of {steps}; {evaluation}"


def _show_warmup(config: TrainingConfig, plan: Plan, is_open: bool) -> str:
    """Return the warm-up, and the one that the run is too short for."""
    schedule = config.schedule
    if isinstance(schedule, OneCycleConfig):
        return ""
    stated = count_stated(config, plan.epoch_length / plan.batch_size, plan.total_steps)
    if is_open:
        return f", warm-up of at most {schedule.warmup_most:.0%} of the run"
    cut = f", not {stated:,}: schedule.warmup_most={schedule.warmup_most:g}" if stated > plan.warmup_steps else ""
    return f", warm-up {plan.warmup_steps:,} steps{cut}"


def _show_machine(plan: Plan, runtime: Runtime) -> str:
    ranks = "" if plan.world_size == 1 else f"{plan.world_size} ranks, each "
    batches = ""
    if plan.accum_steps > 1:
        batches = f", {plan.accum_steps} micro-batches of {plan.micro_batch_size} an update"
    threads = f"{torch.get_num_threads()} threads, {runtime.workers} loader workers"
    return f"{ranks}{runtime.device_name}, {runtime.precision}, {threads}{batches}"


@contextmanager
def open_run(
    task: Task, streams: Streams, plan: Plan, config: TrainingConfig, job: Job, path: Path, runtime: Runtime
) -> Iterator[Run]:
    """Open the run folder, resume from its checkpoint if it has one, and close everything at the end.

    Raises SystemExit(75) after a stop signal.
    """
    values = config.model_dump(mode="json")
    with open_run_folder(path, values, job) as folder, StopRequest():
        if chooses_threads(config.runtime):
            keep_threads(folder.path / ENVIRONMENT_FILE)
        run = Run(task, streams, plan, config, runtime, folder)
        recorder = run.recorder
        checkpoint = distributed.rank_zero_call(lambda: choose_checkpoint(config, folder.path, plan.total_steps))
        if checkpoint is not None:
            run.restore(checkpoint)
        distributed.rank_zero_call(lambda: write_config(folder, environment_state(runtime=runtime.describe())))
        finished = True
        try:
            values = None if run.is_complete else folder.saved_config
            recorder.open(run.step, streams.train, values, checkpoint is None or run.evaluator.is_owed)
            recorder.watchdog.start()
            try:
                yield run
            except Stopped:
                finished = False
            recorder.watchdog.stop()
        except BaseException as error:  # KeyboardInterrupt too: in a notebook the process lives on
            _fail(run, error)
        recorder.close(completed_step=run.step if finished and run.is_complete else None)
        if config.loop.checkpoint_mirror:
            # All ranks wait, because torchrun ends the others after the first.
            distributed.rank_zero_call(lambda: run.saver.remote_copy.copy(last=True))
    if not finished:
        saved = (
            f"saved in {folder.path}; the same command continues from there" if run.step else "nothing is trained yet"
        )
        log.warning("stopped at step %d; %s", run.step, saved)
        raise SystemExit(EXIT_STOPPED)


def keep_threads(file: Path) -> None:
    """Set as many threads as the run's first start had, at most one a core: the bits of a run depend on them."""
    with suppress(OSError, ValueError, KeyError):
        torch.set_num_threads(min(int(read_json(file)["threads"]), count_cores()))


def _fail(run: Run, error: BaseException) -> NoReturn:
    """Close a failed run and raise its error; log the rank that was lost, if any."""
    recorder = run.recorder
    if isinstance(error, torch.OutOfMemoryError):
        error = out_of_memory(recorder.stage, recorder.samples)
    known = not isinstance(error, Exception) or isinstance(error, UserError) or lost_worker(error) is not None
    lost = None if known else recorder.watchdog.name_lost_ranks()
    recorder.watchdog.abandon()
    run.saver.wait()
    recorder.close(failed=True)
    if lost:
        log.error("%s; the same command resumes from the last checkpoint", lost)
        raise SystemExit(EXIT_LOST_RANK) from error
    raise error
