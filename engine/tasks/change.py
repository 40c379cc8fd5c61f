"""A change of the configuration before a run, by the recipe or by a kind of training."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple, TypeVar

from data.collection.collection import Collection
from data.config import DataConfig
from data.load import load_collection
from engine.config import TrainingConfig
from engine.run.clock import Stages
from engine.update.runtime import Runtime, warming
from utils.config.command_line import Job

AnyConfig = TypeVar("AnyConfig", bound=TrainingConfig)


@dataclass
class Start:
    """The command line, the machine and the collection, which changes read.

    The plan of `loop.minutes` replaces `job` and `runtime`.
    """

    job: Job
    runtime: Runtime
    stages: Stages
    opened: tuple[DataConfig, Collection] | None = None

    def collection(self, data: DataConfig) -> Collection:
        """Return the collection, which is indexed once."""
        if self.opened is None or self.opened[0] != data:
            with warming(self.runtime.device):
                self.opened = data, load_collection(data)
            self.stages.end("collection")
        return self.opened[1]


class ConfigChange(NamedTuple):
    """A change of the configuration. why: the reason, which the log shows before the keys.

    cause: the key that asks for the change. A changed key that is stated as firmly as the cause is refused. A change
    without a cause is a default: it leaves stated keys alone, or completes a stated value.
    """

    apply: Callable[[Any, Start], Any]
    why: str
    cause: str | None = None
