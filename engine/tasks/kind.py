"""What a kind of training is: its config, what it knows of the collection, how its task is built and what comes of it.

    data = kind.pipeline.open_training(config, runtime, run_path)
    setup = kind.set_up(config, data.collection)
    task = kind.build(setup)
    streams = kind.pipeline.streams(data, setup, config)

A kind's config, task and Kind are in one file; kinds.py has an entry for each. The data reach it by a pipeline
(image_pipeline.py), which a kind on other data replaces.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, ClassVar, Generic, Protocol, TypeVar

from pydantic import Field
from torch import nn

from data.collection import Collection
from data.config import DataConfig
from data.image_data import ImageData
from engine.config import TrainingConfig
from engine.runtime import Runtime
from engine.streams import Streams
from engine.task import Report, Task
from models.config import ModelConfig
from models.normalise import Normalise
from utils.config.schema import Strict
from utils.contracts import Batch
from utils.errors import UserError, close_names
from utils.io.files import canonical_json, sha256_text
from utils.thresholds import ThresholdTable

Config = TypeVar("Config", bound="TaskConfig")


class TaskConfig(Strict):
    """The base of all `task` groups; `name` is the kind's name in the table."""

    name: str

    @property
    def mirrors(self) -> bool:
        """Whether the task mirrors training images itself."""
        return False

    def check_run(self, config: TrainingConfig) -> None:
        """Raise ValueError where other keys of the run do not suit the task; the message begins with the key."""


@dataclass(frozen=True)
class Setup(Generic[Config]):
    """What a task is built from. It follows from a run's configuration, and from a weight file's metadata alone.

    preprocessing: what evaluation does to an image (AugmentConfig.preprocessing); empty for kinds without images.
    facts: what the task knows of the collection it was trained on, such as class names (JSON values).
    """

    model: ModelConfig
    task: Config
    preprocessing: Mapping[str, Any] = field(default_factory=dict)
    facts: Mapping[str, Any] = field(default_factory=dict)

    def normalise(self) -> Normalise:
        """Return the normalisation of images."""
        return Normalise(self.preprocessing["mean"], self.preprocessing["std"], self.model.in_channels)

    def metadata(self) -> dict[str, Any]:
        """Return the metadata of a weight file beside model and task."""
        prepared = {"preprocessing": dict(self.preprocessing)} if self.preprocessing else {}
        return {**self.facts, **prepared}

    def fingerprints(self) -> dict[str, str]:
        """Return a hash of each fact: a resumed run must know the same, in the same order."""
        return {f"facts.{name}": sha256_text(canonical_json(value))[:16] for name, value in self.facts.items()}


class Pipeline(Protocol[Config]):
    """How the samples of a collection reach a task."""

    def complete(self, config: TrainingConfig) -> TrainingConfig:
        """Return a run's configuration with what its initial weights state, such as their preprocessing."""

    def preprocessing(self, config: TrainingConfig) -> dict[str, Any]:
        """Return what evaluation does to a sample, for weight files; empty where there is nothing to state."""

    def check_metadata(self, path: Path, key: str, metadata: Mapping[str, Any]) -> None:
        """Raise UserError (`key`) where a weight file does not state what the pipeline needs."""

    def open(
        self, config: DataConfig, setup: Setup[Config], runtime: Runtime, *, seed: int, batch_size: int
    ) -> ImageData:
        """Open a collection to evaluate a task on it."""

    def open_training(self, config: TrainingConfig, runtime: Runtime, run_path: Path) -> ImageData:
        """Open the collection of a training run, whose folder is `run_path`."""

    def streams(self, data: ImageData, setup: Setup[Config], config: TrainingConfig) -> Streams:
        """Return the training and evaluation data of a run."""

    def evaluation(self, data: ImageData, setup: Setup[Config], *, training: bool) -> dict[str, Iterable[Batch]]:
        """Return the evaluation loaders: `val`, and what else the task's `evaluate` reads. `training`: within a run."""


class Targets(Strict):
    """What the profiles high_precision and high_recall are to reach."""

    precision: Annotated[float, Field(gt=0, lt=1)]
    recall: Annotated[float, Field(gt=0, lt=1)]


class Kind(Generic[Config]):
    """One kind of training. Subclasses state what differs.

    config: the schema of its `task` group; model_schema: of its `model` group. scripts: the root scripts that train it.
    output: what its network makes of one image, a name in models/outputs.py; None where it makes nothing of an image
    alone. next_commands: what can be typed after a run, with {run} for its folder and {data} for its collection.
    fact_names: the facts that its task reads.
    """

    config: ClassVar[type[TaskConfig]]
    model_schema: ClassVar[Any] = ModelConfig
    pipeline: ClassVar[Pipeline]
    scripts: ClassVar[tuple[str, ...]] = ("finetune",)
    output: ClassVar[str | None] = None
    fact_names: ClassVar[tuple[str, ...]] = ()
    next_commands: ClassVar[tuple[str, ...]] = ("python evaluate.py run_dir={run}",)

    def find_facts(self, config: TrainingConfig, collection: Collection) -> dict[str, Any]:
        """Return what the task must know of the collection. Raises UserError where the collection does not suit it."""
        return {}

    def set_up(self, config: TrainingConfig, collection: Collection) -> Setup[Config]:
        """Return what the task of a new run is built from."""
        facts = self.find_facts(config, collection)
        return Setup(config.model, config.task, self.pipeline.preprocessing(config), facts)

    def build(self, setup: Setup[Config]) -> Task:
        """Return the task with drawn weights."""
        raise NotImplementedError

    def image_network(self, task: Task) -> nn.Module:
        """Return the network from normalised images to `output`: logits [B, K], or features [B, C]."""
        return task.network

    def prepare(
        self, task: Task, data: ImageData, setup: Setup[Config], config: TrainingConfig, runtime: Runtime
    ) -> None:
        """Change the initial weights by looking at the data, on a new run only."""

    def calibrate(self, task: Task, loader: Iterable[Batch], targets: Targets) -> tuple[ThresholdTable, Report]:
        """Return thresholds that are fitted on a half of the loader's samples, and a report of them on the other."""
        name = self.config.__name__.removesuffix("TaskConfig").lower()
        raise UserError(f"calibrate: true fits the thresholds of a tagger, and these weights are of task {name!r}")


def find_kind(name: Any, key: str, kinds: Mapping[str, Kind]) -> Kind:
    """Return the kind of a task name in a table. Raises UserError (`key`) where the table has none."""
    if not isinstance(name, str) or name not in kinds:
        raise UserError(f"{key}: unknown task {name!r}; {close_names(str(name), kinds)}")
    return kinds[name]
