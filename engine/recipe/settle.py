"""What changes the configuration before a run, in order; nothing else does.

Each change is `(config, start) -> config`. The log says in a line which keys it changed, and why. What the command
states is never replaced: a default leaves it alone, and a key that asks for another value is refused.
"""

import textwrap
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

from pydantic import ValidationError

from data.collection.choose import training_rows
from data.collection.collection import Collection
from engine.config import TrainingConfig
from engine.recipe.pretrained import take_preprocessing
from engine.run.clock import Stages
from engine.run.start import start_ranks
from engine.tasks.change import AnyConfig, ConfigChange, Start
from engine.tasks.kind import Kind
from engine.update.runtime import Runtime
from utils.config.command_line import By, Job
from utils.config.messages import ConfigError, wrong_keys
from utils.config.recipe import flatten
from utils.errors import UserError
from utils.record.logging import get_logger
from utils.record.run_folder import default_run_dir
from utils.record.run_reader import run_of

log = get_logger(__name__)

_LEAST_FACTOR = 0.1  # of Prodigy; rates of AdamW are below
_LEAST_BATCH = 8  # images of an update, so that batch norms have something to average and several ranks share it
_WARMUP = "schedule.warmup_most"
_EARLIER = {"data.table", _WARMUP}  # these had another value where nothing is stated
_SHOWN = 300  # characters of what a change does


class Settled(NamedTuple):
    """A run before its first step: all that no later part of the start changes."""

    config: Any
    job: Job
    runtime: Runtime
    collection: Collection
    path: Path


def settle(config: TrainingConfig, job: Job, kind: Kind, stages: Stages) -> Settled:
    """Start the ranks and make the changes, in order."""
    start = Start(job, start_ranks(config), stages)
    for change in list_changes(kind):
        config = make(change, config, start)
    collection = start.collection(config.data)
    path = default_run_dir(config.model_dump(mode="json"), start.job)
    return Settled(config, start.job, start.runtime, collection, path)


def _plan(config: AnyConfig, start: Start, kind: Kind) -> AnyConfig:
    if config.loop.minutes is None:
        return config
    from engine.recipe.rules import plan_recipe  # the rules, and the features that they look at

    return plan_recipe(config, start, kind)


def list_changes(kind: Kind) -> tuple[ConfigChange, ...]:
    """Return the changes before a run of a kind, in order."""
    return (
        EARLIER,
        ConfigChange(_check_length, "the length"),
        ConfigChange(partial(_plan, kind=kind), "the plan of loop.minutes"),
        ConfigChange(_use_factor, "Prodigy finds the rate, of which this is a factor", "optim"),
        ConfigChange(take_preprocessing, "timm's weights were trained so", "init_from"),
        *kind.changes,
        ConfigChange(_fit_batch, "a batch has no more than the training images, at the rate of the recipe's batch"),
        ConfigChange(_keep_warmup, "the warm-up is stated"),
        EARLIER,  # again: after the changes that are younger than the run
    )


def make(change: ConfigChange, config: AnyConfig, start: Start) -> AnyConfig:
    """Return the changed configuration, and log what has changed. Raises UserError for a key that must stay."""
    values = config.model_dump()
    try:
        changed = change.apply(config, start)
    except ValidationError as error:
        raise ConfigError(*map(": ".join, wrong_keys(error, values, type(config)).items())) from None
    before = flatten(values)
    after = flatten(changed.model_dump())
    lines = []
    for key in sorted(before.keys() | after.keys()):
        old = before.get(key)
        new = after.get(key)
        if old != new and change.cause and start.job.states(key, start.job.stated(change.cause)):
            raise UserError(f"{key}: {old}, but {change.cause} asks for {new} ({change.why}); remove one of the keys")
        if old != new:
            lines.append(f"{key} {old} -> {new}")
    if lines:
        log.info("%s: %s", change.why, textwrap.shorten(", ".join(lines), _SHOWN, placeholder=" ..."))
    return changed


def _use_factor(config: AnyConfig, start: Start) -> AnyConfig:
    """Set the factor in place of the rate of a script or recipe, which is AdamW's."""
    optim = config.optim
    if optim.name != "prodigy" or (optim.lr or 0.0) >= _LEAST_FACTOR:
        return config
    return config.changed({"optim.lr": optim.base_lr})


def _fit_batch(config: AnyConfig, start: Start) -> AnyConfig:
    """Lower the batch to the training images, in powers of two: a larger batch repeats images.

    base_lr is scaled so that the rate stays that of the recipe's batch. Chunks of one shape keep their batch.
    """
    loop = config.loop
    images = len(training_rows(start.collection(config.data), loop))
    size = max(_LEAST_BATCH, 1 << images.bit_length() >> 1)
    if start.job.states("loop.batch_size") or size >= loop.batch_size or hasattr(config.task, "chunk"):
        return config
    changes = {"loop.batch_size": size}
    if not start.job.states("optim.base_lr", By.EXPERIMENT):
        changes["optim.base_lr"] = config.optim.base_lr * loop.batch_size / size
    return config.changed(changes)


def _keep_warmup(config: AnyConfig, start: Start) -> AnyConfig:
    """Allow a stated warm-up any share of the run."""
    states = partial(start.job.states, least=By.EXPERIMENT)
    is_stated = states("schedule.warmup_steps") or states("schedule.warmup_epochs")
    if not is_stated or states(_WARMUP):
        return config
    return config.changed({_WARMUP: 1.0})


def _keep_earlier(config: AnyConfig, start: Start) -> AnyConfig:
    """Keep the values of a run that goes on, which may be older than a key or a change."""
    now = config.model_dump(mode="json")
    run = run_of(default_run_dir(now, start.job))
    saved = flatten(now if run is None else run.config)
    keys = _EARLIER & saved.keys() & flatten(now).keys()
    return config.changed({key: saved[key] for key in keys if not start.job.states(key, By.EXPERIMENT)})


def _check_length(config: AnyConfig, start: Start) -> AnyConfig:
    """Raise UserError (`loop.minutes`) for a length that is stated beside the minutes."""
    loop = config.loop
    for key, value in {"loop.total_steps": loop.total_steps, "loop.total_epochs": loop.total_epochs}.items():
        is_beside = loop.minutes is not None and value not in (None, "auto")
        if is_beside and start.job.states(key, start.job.stated("loop.minutes")):
            raise UserError(
                f"loop.minutes: {loop.minutes:g} sets the length, and so does {key}={value}; give one of them"
            )
    return config


EARLIER = ConfigChange(_keep_earlier, "the run that goes on began so")
