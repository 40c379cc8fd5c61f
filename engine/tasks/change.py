"""A change of the configuration before a run, by the recipe or by a kind of training."""

from collections.abc import Callable
from typing import Any, NamedTuple, TypeVar

from data.collection.collection import Collection
from data.config import DataConfig
from data.load import load_collection
from engine.config import TrainingConfig
from engine.run.clock import Stages
from engine.update.runtime import Runtime, warming
from utils.config.command_line import Job

AnyConfig = TypeVar("AnyConfig", bound=TrainingConfig)


class Start:
    """What a change may ask: the command line, the machine and the collection.

    The plan of `loop.minutes` replaces `job` and `runtime`.
    """

    def __init__(self, job: Job, runtime: Runtime, stages: Stages) -> None:
        self.job = job
        self.runtime = runtime
        self._stages = stages
        self._opened: tuple[DataConfig, Collection] | None = None

    def collection(self, data: DataConfig) -> Collection:
        """Return the collection, which is indexed once."""
        if self._opened is None or self._opened[0] != data:
            with warming(self.runtime.device):
                self._opened = data, load_collection(data)
            self._stages.end("collection")
        return self._opened[1]


class ConfigChange(NamedTuple):
    """A change of the configuration. why: the reason, which the log shows before the keys.

    cause: the key that asks for the change. A changed key that is stated as firmly as the cause is refused. A change
    without a cause is a default: it leaves stated keys alone, or completes a stated value.
    """

    apply: Callable[[Any, Start], Any]
    why: str
    cause: str | None = None
