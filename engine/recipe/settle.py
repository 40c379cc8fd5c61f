"""What changes the configuration before a run, in order; nothing else does.

Each change is `(config, start) -> config`. The log says in a line which keys it changed, and why. What the command
states is never replaced: a default leaves it alone, and a key that asks for another value is refused.
"""

import textwrap
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

from pydantic import ValidationError

from data.collection.choose import training_rows
from data.collection.collection import Collection
from engine.config import TrainingConfig
from engine.run.clock import Stages
from engine.run.start import start_ranks
from engine.tasks.change import AnyConfig, ConfigChange, Start
from engine.tasks.kind import Kind
from engine.update.runtime import Runtime
from utils.config.command_line import By, Job
from utils.config.messages import ConfigError, wrong_keys
from utils.config.recipe import flatten
from utils.errors import UserError
from utils.record.logging import log
from utils.record.run_folder import default_run_dir
from utils.record.run_reader import run_of
from utils.start import open_name

_LEAST_FACTOR = 0.1  # of Prodigy; rates of AdamW are lower
_LEAST_BATCH = 8  # images of an update, so that batch norms have something to average and several ranks share it
# Earlier releases had other values where nothing is stated.
_EARLIER = {"data.table", "data.group", "schedule.warmup_most"}
_SHOWN = 300  # characters of a change in the log


class Settled(NamedTuple):
    """The start of a run after all changes; nothing changes these values later."""

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
    if config.loop.minutes is None or start.job.script != "train" or kind.output not in ("classes", "tags", "number"):
        return config
    from engine.recipe.rules import plan_recipe  # the rules, and the features that they look at

    return plan_recipe(config, start, kind)


def _take_stated(config: AnyConfig, start: Start) -> AnyConfig:
    if config.init_from is None:
        return config
    return open_name("engine.recipe.pretrained:take_stated")(config, start)


def list_changes(kind: Kind) -> tuple[ConfigChange, ...]:
    """Return the changes before a run of a kind, in order."""
    return (
        EARLIER,
        ConfigChange(_check_length, "the length"),
        ConfigChange(partial(_plan, kind=kind), "the plan of loop.minutes"),
        ConfigChange(_use_factor, "Prodigy finds the rate, of which this is a factor", "optim"),
        ConfigChange(_take_stated, "the weights of init_from were trained so"),
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
    for key in sorted({**before, **after}):
        old = before.get(key)
        new = after.get(key)
        if old == new:
            continue
        if change.cause and start.job.states(key, start.job.stated(change.cause)):
            raise UserError(f"{key}: {old}, but {change.cause} asks for {new} ({change.why}); remove one of the keys")
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
    names = ("warmup_most", "warmup_steps", "warmup_epochs")
    most, *warmups = (start.job.states(f"schedule.{name}", By.EXPERIMENT) for name in names)
    return config.changed({"schedule.warmup_most": 1.0}) if any(warmups) and not most else config


def _keep_earlier(config: AnyConfig, start: Start) -> AnyConfig:
    """Keep the values of the run in the run folder, which may be older than a key or a change."""
    run = run_of(default_run_dir(config.model_dump(mode="json"), start.job))
    saved = {}
    with suppress(UserError):  # a damaged config.json; the newest checkpoint has the recipe, too
        saved = flatten(run.config) if run else {}
    keys = _EARLIER & saved.keys() & flatten(config.model_dump()).keys()
    return config.changed({key: saved[key] for key in keys if not start.job.states(key, By.EXPERIMENT)})


def _check_length(config: AnyConfig, start: Start) -> AnyConfig:
    """Raise UserError (`loop.minutes`) for a length that is stated beside the minutes."""
    minutes = config.loop.minutes
    least = start.job.stated("loop.minutes")
    for key in ("total_steps", "total_epochs") if minutes else ():
        value = getattr(config.loop, key)
        if value not in (None, "auto") and start.job.states(f"loop.{key}", least):
            raise UserError(f"loop.minutes: {minutes:g} sets the length, and so does loop.{key}={value}; give one")
    return config


EARLIER = ConfigChange(_keep_earlier, "the run that goes on began so")
