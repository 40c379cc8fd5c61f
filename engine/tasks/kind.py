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

import torch
from pydantic import Field, TypeAdapter, ValidationError
from torch import Tensor, nn

from data.collection import Collection
from data.config import DataConfig
from data.open import Data
from engine.config import TrainingConfig
from engine.runtime import Runtime
from engine.streams import Streams
from engine.task import Report, Task, join_exported
from models.config import ModelConfig
from models.normalise import Normalise
from models.predictor import wrong_metadata
from models.weights.fit import fit_state
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
    """What a task is built from: by a run's configuration and collection, or by a weight file's metadata alone.

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

    def metadata(self, *names: str) -> dict[str, Any]:
        """Return the metadata of a weight file beside model and task: some facts by name, and the preprocessing.

        The other facts are for training alone.
        """
        prepared = {"preprocessing": dict(self.preprocessing)} if self.preprocessing else {}
        return {**{name: self.facts[name] for name in names}, **prepared}

    def fingerprints(self) -> dict[str, str]:
        """Return a hash of each fact: a resumed run must know the same, in the same order."""
        return {f"facts.{name}": sha256_text(canonical_json(value))[:16] for name, value in self.facts.items()}


class Pipeline(Protocol[Config]):
    """How the samples of a collection reach a task."""

    def complete(self, config: TrainingConfig) -> TrainingConfig:
        """Return a run's configuration with what its initial weights state, such as their preprocessing."""
        return config

    def preprocessing(self, config: TrainingConfig) -> dict[str, Any]:
        """Return what evaluation does to a sample, for weight files; empty where there is nothing to state."""
        return {}

    def check_metadata(self, path: Path, key: str, metadata: Mapping[str, Any]) -> None:
        """Raise UserError (`key`) where a weight file does not state what the pipeline needs."""

    def open(self, config: DataConfig, setup: Setup[Config], runtime: Runtime, *, seed: int, batch_size: int) -> Data:
        """Open a collection to evaluate a task on it."""

    def open_training(self, config: TrainingConfig, runtime: Runtime, run_path: Path) -> Data:
        """Open the collection of a training run, whose folder is `run_path`."""

    def streams(self, data: Data, setup: Setup[Config], config: TrainingConfig) -> Streams:
        """Return the training and evaluation data of a run."""

    def evaluation(self, data: Data, setup: Setup[Config], *, training: bool) -> dict[str, Iterable[Batch]]:
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
    fact_names: the facts that its weight files state.
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

    def prepare(self, task: Task, data: Data, setup: Setup[Config], config: TrainingConfig, runtime: Runtime) -> None:
        """Change the initial weights by looking at the data, on a new run only."""

    def calibrate(self, task: Task, loader: Iterable[Batch], targets: Targets) -> tuple[ThresholdTable, Report]:
        """Return thresholds that are fitted on a half of the loader's samples, and a report of them on the other."""
        name = self.config.__name__.removesuffix("TaskConfig").lower()
        raise UserError(f"calibrate: true fits the thresholds of a tagger, and these weights are of task {name!r}")


# ------------------------------------------------------------------------------------------------------- weight files


def check_weights(
    path: Path, key: str, shapes: Mapping[str, Tensor], metadata: dict[str, Any], kinds: Mapping[str, Kind]
) -> tuple[Kind, Setup]:
    """Return a weight file's kind, one of `kinds`, and setup, for the price of its header.

    shapes: its tensors on the meta device. Raises UserError (`key`) where the file is not of one of the kinds, or its
    metadata and its tensors do not fit together.
    """
    kind, setup = _read_setup(path, key, metadata, kinds)
    with torch.device("meta"):
        task = kind.build(setup)
    for name, state in split_networks(task, shapes).items():
        if missing := fit_state(task.get_submodule(name), state, keep_head=True, key=key).left:
            raise UserError(f"{key}: {path} lacks {', '.join(missing)}; export or train the file again")
    return kind, setup


def split_networks(task: Task, tensors: Mapping[str, Tensor]) -> dict[str, dict[str, Tensor]]:
    """Return a weight file's tensors by exported network, under the network's own names."""
    networks, named = task.exported().networks, join_exported(task, tensors, {})
    return {
        network: {name.removeprefix(f"{network}."): named[name] for name in named if name.startswith(f"{network}.")}
        for network in networks
    }


def _read_setup(path: Path, key: str, metadata: dict[str, Any], kinds: Mapping[str, Kind]) -> tuple[Kind, Setup]:
    """Return a file's kind and setup. Raises UserError (`key`) that names the first wrong value of its metadata."""
    if "task" in metadata and metadata["task"] is None and metadata.get("output") == "features":
        raise UserError(
            f"{key}: {path} has features only, neither a head nor a task; load it with init_from={path}, or export the "
            "run without backbone_only"
        )
    if "task" not in metadata or "model" not in metadata or not isinstance(metadata["task"], dict):
        raise UserError(
            f"{key}: {path} was not written by a run of Atelier; name a run folder or such a file. Weights of others "
            f"become a run by: python finetune.py init_from={path} task.head=kept loop.total_steps=0 model=... "
            "augment=... data=... run_dir=... (docs/weights.md)"
        )
    name = metadata["task"].get("name")
    if not isinstance(name, str) or name not in kinds:
        raise UserError(f"{key}: {path}: unknown task {name!r}; {close_names(str(name), kinds)}")
    kind = kinds[name]
    if missing := [name for name in kind.fact_names if name not in metadata]:
        raise UserError(f"{key}: {path} names no {', '.join(missing)} in its metadata; make the file again")
    kind.pipeline.check_metadata(path, key, {**metadata, "output": kind.output})
    try:
        model = TypeAdapter(kind.model_schema).validate_python(metadata["model"])
        task = kind.config.model_validate(metadata["task"])
    except ValidationError as error:
        raise wrong_metadata(path, key, error) from None
    return kind, Setup(
        model, task, metadata.get("preprocessing", {}), {name: metadata[name] for name in kind.fact_names}
    )
