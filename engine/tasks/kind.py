"""What a kind of training is: its config, what it knows of the collection, how data reach its task, what comes of it.

    collection = load_collection(config.data)
    setup = kind.set_up(config, collection)
    source = kind.source(collection, config.data, setup, repeats=True)
    streams = kind.streams(Data(collection, source, runtime, ...), setup, config)
    task = kind.build(setup)

A kind's config, task and Kind are in one file; kinds.py has an entry for each. Kinds on images begin with ImageKind.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

import torch
from pydantic import TypeAdapter, ValidationError
from torch import Tensor

from data.collection import Collection
from data.config import DataConfig
from data.open import Data
from data.source import Source
from engine.config import TrainingConfig
from engine.runtime import Runtime
from engine.task import Streams, Task, split_exported
from models.config import ModelConfig
from models.normalise import Normalise
from models.predictor import check_metadata, wrong_metadata
from models.weights.fit import refuse_misfits
from utils.config.schema import Strict
from utils.contracts import Batch
from utils.errors import UserError, close_names
from utils.io.files import canonical_json, sha256_text
from utils.vocabulary import FACTS, read_facts


class TaskConfig(Strict):
    """The base of all `task` groups; `name` is the kind's name in the table."""

    name: str

    def check_run(self, config: TrainingConfig) -> None:
        """Raise ValueError where other keys of the run do not suit the task; the message begins with the key."""


@dataclass(frozen=True)
class Setup:
    """What a task is built from: by a run's configuration and collection, or by a weight file's metadata alone.

    preprocessing: what evaluation does to an image (AugmentConfig.preprocessing); empty for kinds without images.
    facts: what the task knows of the collection it was trained on, such as class names (JSON values).
    """

    model: Any
    task: Any
    preprocessing: Mapping[str, Any] = field(default_factory=dict)
    facts: Mapping[str, Any] = field(default_factory=dict)

    def normalise(self) -> Normalise:
        """Return the normalisation of images."""
        return Normalise(self.preprocessing["mean"], self.preprocessing["std"], self.model.in_channels)

    def fingerprints(self) -> dict[str, str]:
        """Return a hash of each fact: a resumed run must know the same, in the same order."""
        return {f"facts.{name}": sha256_text(canonical_json(value))[:16] for name, value in self.facts.items()}


class Kind:
    """One kind of training. Subclasses state what differs.

    config: the schema of its `task` group; model: of its `model` group. task: is built from a Setup. scripts: the root
    scripts that train it. names: the facts that its weight files state; the others are for training alone.
    output: what the network named `network` makes of one image, a name in models/outputs.py; None where it makes
    nothing of an image alone. next_commands: what can be typed after a run, with {run} for its folder and {data} for
    its collection.
    """

    config: ClassVar[type[TaskConfig]]
    model: ClassVar[Any] = ModelConfig
    task: ClassVar[type[Task]]
    scripts: ClassVar[tuple[str, ...]] = ("train", "finetune")
    names: ClassVar[tuple[str, ...]] = ()
    output: ClassVar[str | None] = None
    network: ClassVar[str] = "network"
    next_commands: ClassVar[tuple[str, ...]] = ("python evaluate.py run_dir={run}",)

    def find_facts(self, config: TrainingConfig, collection: Collection) -> dict[str, Any]:
        """Return what the task must know of the collection. Raises UserError where the collection does not suit it."""
        return {}

    def preprocessing(self, config: TrainingConfig) -> dict[str, Any]:
        """Return what evaluation does to a sample, for weight files; empty where there is nothing to state."""
        return {}

    def set_up(self, config: TrainingConfig, collection: Collection) -> Setup:
        """Return what the task of a new run is built from."""
        facts = self.find_facts(config, collection)
        return Setup(config.model, config.task, self.preprocessing(config), facts)

    def build(self, setup: Setup) -> Task:
        """Return the task with drawn weights."""
        task = self.task(setup)
        stated = {name: setup.facts[name] for name in self.names}
        if setup.preprocessing:
            stated["preprocessing"] = dict(setup.preprocessing)
        task.metadata = {**stated, **task.metadata}
        return task

    def source(self, collection: Collection, config: DataConfig, setup: Setup, *, repeats: bool) -> Source:
        """Return the source of a collection's images; repeats: they are read again and again."""
        raise NotImplementedError

    def streams(self, data: Data, setup: Setup, config: TrainingConfig) -> Streams:
        """Return the training and evaluation data of a run."""
        raise NotImplementedError

    def evaluation(self, data: Data, setup: Setup, *, training: bool) -> dict[str, Iterable[Batch]]:
        """Return the evaluation loaders: `val`, and what else the task's `evaluate` reads. `training`: within a run."""
        raise NotImplementedError

    def prepare(self, task: Task, data: Data, setup: Setup, config: TrainingConfig, runtime: Runtime) -> None:
        """Change the initial weights by looking at the data, on a new run only."""


def check_weights(
    path: Path, shapes: Mapping[str, Tensor], metadata: dict[str, Any], kinds: Mapping[str, Kind]
) -> tuple[Kind, Setup]:
    """Return a weight file's kind, one of `kinds`, and setup, for the price of its header.

    shapes: its tensors on the meta device. Raises UserError that names the first wrong value of the metadata,
    which may be a stranger's, and where metadata and tensors do not fit together.
    """
    if "model" not in metadata or not isinstance(metadata.get("task"), dict):
        raise UserError(
            f"{path} is no file of a run of Atelier, or of a backbone, which is for init_from. Other weights "
            f"become a run by: python finetune.py init_from={path} task.head=kept loop.total_steps=0 model=... "
            "augment=... data=... run_dir=... (docs/weights.md)"
        )
    name = metadata["task"].get("name")
    if not isinstance(name, str) or name not in kinds:
        raise UserError(f"{path} is of an unknown task {name!r}; {close_names(str(name), kinds)}")
    kind = kinds[name]
    if missing := [name for name in kind.names if name not in metadata]:
        raise UserError(f"{path} names no {', '.join(missing)} in its metadata; make the file again")
    if kind.output is not None:
        check_metadata(path, {**metadata, "output": kind.output})
    if kind.names == FACTS:
        read_facts(path, metadata)
    try:
        model = TypeAdapter(kind.model).validate_python(metadata["model"])
        task = kind.config.model_validate(metadata["task"])
    except ValidationError as error:
        raise wrong_metadata(path, error) from None
    setup = Setup(model, task, metadata.get("preprocessing", {}), {name: metadata[name] for name in kind.names})
    with torch.device("meta"):
        built = kind.build(setup)
    wanted, _ = split_exported(built, built.state_dict())
    refuse_misfits(shapes, wanted, str(path), "Export or train the file again.")
    return kind, setup
