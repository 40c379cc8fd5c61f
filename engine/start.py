"""What every training script begins and ends with: ranks and machine first, the run folder last.

The run folder is opened only when data and task stand, so a mistake leaves nothing behind.
"""

from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import nn

from engine.checkpoint import list_checkpoints
from engine.config import TrainingConfig
from engine.plan import Plan, make_plan
from engine.runtime import Runtime, choose_device, choose_runtime
from engine.task import Batch, Task
from engine.train import describe_run, train
from utils.config.entry_point import Job
from utils.config.recipe import recipe_hash
from utils.ranks import distributed
from utils.record.logging import get_logger, setup_logging
from utils.record.run_folder import default_run_dir, environment_state, open_run_folder

log = get_logger(__name__)
AnyTask = TypeVar("AnyTask", bound=Task)

# The watchdog names a hung rank; the process group's own time-out is the belt behind it.
_GROUP_PATIENCE = 4


def start_ranks(config: TrainingConfig) -> Runtime:
    """Join the ranks, decide what `auto` means on this machine, and check that all ranks mean the same run."""
    device = choose_device(config.runtime.device)
    world = distributed.init_process_group(device, _GROUP_PATIENCE * config.runtime.hang_timeout_sec)
    setup_logging(world.rank)
    runtime = choose_runtime(config.runtime)
    distributed.check_same("configuration", recipe_hash(config.model_dump(mode="json")))
    distributed.check_same("runtime.precision", runtime.precision)
    return runtime


def run_path(config: TrainingConfig, job: Job) -> Path:
    """Return where the run's folder is, or will be."""
    return Path(default_run_dir(config.model_dump(mode="json"), job))


def derive_plan(config: TrainingConfig, loader: Any) -> Plan:
    """Derive steps, micro-batch and rate from the configuration, the ranks and the loader's epoch."""
    return make_plan(
        config.loop,
        config.optim,
        config.schedule,
        world_size=distributed.world_size(),
        epoch_length=loader.sampler.epoch_length,
        chunk=loader.sampler.chunk,
    )


def build_task(make: Callable[[], AnyTask], config: TrainingConfig) -> AnyTask:
    """Build the task from the seed, alike on all ranks; on the meta device for a dry run."""
    torch.manual_seed(config.seed)
    with torch.device("meta" if config.dry_run else "cpu"):
        return make()


def _resumes(config: TrainingConfig, job: Job) -> bool:
    """Return whether the run goes on from a checkpoint, so that the weights it once began with are not asked for."""
    if config.resume == "auto":
        return bool(list_checkpoints(run_path(config, job) / "checkpoints"))
    return config.resume != "never"


def run_training(
    task: Task,
    loader: Any,
    evaluation: Mapping[str, Iterable[Batch]],
    config: TrainingConfig,
    job: Job,
    runtime: Runtime,
    *,
    fingerprints: dict[str, str],
    depths: list[int] | None = None,
    initialise: Callable[[nn.Module], None] | None = None,
    rare_loaders: Mapping[str, float] | None = None,
) -> str:
    """Open the run folder and train, or describe the run and stop where dry_run is set.

    `initialise` gives the task's network weights of another run (`init_from`) where this one begins. Other arguments
    as in `train`.
    """
    plan = derive_plan(config, loader)
    describe_run(task, config, plan, runtime, depths)  # refuses what it can before a folder is made
    if config.dry_run:
        log.info("dry run: the run folder would be %s", run_path(config, job))
        return f"dry run: {plan.total_steps} steps"
    if initialise is not None and not distributed.rank_zero_call(lambda: _resumes(config, job)):
        initialise(task.network)
    values = config.model_dump(mode="json")
    with open_run_folder(values, job, environment_state(runtime=runtime.describe())) as folder:
        return train(
            task, loader, evaluation, config, plan, runtime, folder, fingerprints=fingerprints, depths=depths,
            rare_loaders=rare_loaders,
        )  # fmt: skip
