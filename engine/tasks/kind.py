"""The base class of all kinds of training: config, facts about the collection, data, task and output.

    collection = load_collection(config.data)
    setup = kind.set_up(config, collection)
    source = kind.source(collection, config.data, setup, repeats=True)
    streams = kind.streams(Data(collection, source, runtime, ...), setup, config)
    task = kind.build(setup)

A kind's task and Kind are in one file. The row in kinds.py names them, and the schema of its `task` group.
"""

import shlex
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from data.augment.config import AugmentConfig
from data.augment.steps import describe_augmentation, training_views
from data.collection.choose import training_rows
from data.collection.collection import Collection
from data.config import DataConfig
from data.load import describe_collection
from data.open import Data, open_images
from data.stream.loader import Fields, no_fields
from data.stream.order import Sampler, Views, build_sampler
from data.stream.source import Source
from engine.task import Finish, Loaders, Streams, Task
from engine.tasks.change import AnyConfig, ConfigChange, Start
from engine.tasks.config import ImageTrainingConfig
from engine.tasks.kinds import KINDS
from engine.update.runtime import Runtime
from models.build import build_network, check_image_size
from models.config import ModelConfig
from models.normalise import Normalise
from utils.contracts import Batch, InitFrom
from utils.errors import UserError
from utils.formats.background import DEFAULT
from utils.io.files import Json, Values, canonical_json, sha256_text
from utils.start import open_name


@dataclass(frozen=True)
class Setup:
    """The values that build a task: from the configuration and collection of a run, or a weight file's metadata."""

    model: Any
    task: Any
    # How evaluation prepares an image (AugmentConfig.preprocessing); empty for kinds without images.
    preprocessing: Values = field(default_factory=dict)
    # Facts about the training collection, such as class names (JSON values).
    facts: Values = field(default_factory=dict)
    any_size: bool = False  # training has images of several sizes (`loop.phases`)

    def normalise(self) -> Normalise:
        """Return the normalisation of images."""
        return Normalise(self.preprocessing["mean"], self.preprocessing["std"], self.model.in_channels)

    def fingerprints(self) -> dict[str, str]:
        """Return a hash of each fact. A resumed run must have the same facts in the same order."""
        return {f"facts.{name}": sha256_text(canonical_json(value))[:16] for name, value in self.facts.items()}


class ImageTask(Task):
    """A task with one network on images; `outputs` is the width of its head (0: no head).

    keep_head: `init_from` loads the head or decoder too; with `class_names`, the head for these classes.
    """

    may_be_recorded: bool = True
    keep_head: bool = False
    class_names: Sequence[str] | None = None

    def __init__(self, setup: Setup, outputs: int = 0) -> None:
        super().__init__()
        if isinstance(setup.model, torch.nn.Module):
            self.network = setup.model
            self.normalise = torch.nn.Identity()
            return
        check_image_size(setup.model, tuple(setup.preprocessing["image_size_hw"]))
        self.network = build_network(setup.model, num_classes=outputs, any_size=setup.any_size)
        self.normalise = setup.normalise()

    def predict(self, batch: Batch) -> Tensor:
        """Return the outputs of the network for the images of a batch, float32 [B, K]."""
        return self.network(self.normalise(batch["images"])).float()

    def initialise(self, source: InitFrom | None) -> None:
        """Load the network of a run or file, and its head or decoder if `keep_head`."""
        if source is None:
            return
        from models.weights.initialise import initialise_from

        self.origin = initialise_from(self.network, source, keep_head=self.keep_head, class_names=self.class_names)


def _refuse_memory(config: AnyConfig, start: Start) -> AnyConfig:
    if config.runtime.memory_gib is not None:
        raise UserError(
            f"runtime.memory_gib: {config.runtime.memory_gib:g}, but only task=diffusion predicts its memory; set it "
            "to null"
        )
    return config


class Kind:
    """One kind of training on the images of a collection. Subclasses override the parts that differ."""

    model: Any = ModelConfig  # the schema of the `model` group
    task: type[Task] = ImageTask
    names: tuple[str, ...] = ()  # the facts in weight files; other facts are for training only
    optional_names: tuple[str, ...] = ()  # facts in the weight files of some runs
    # The output of `network` for one image, a name in models/outputs.py, or None if single images have no output.
    output: str | None = None
    network: str = "network"
    # Commands to suggest after a run; {run} is its folder and {data} its collection.
    next_commands: tuple[str, ...] = ()
    changes: tuple[ConfigChange, ...] = (ConfigChange(_refuse_memory, "memory"),)  # of the configuration before a run
    evaluation_command: str = "python evaluate.py run_dir={run}"  # if there are validation images

    # --------------------------------------------------------------------------------------------------------- setup

    def commands(self, setup: Setup, streams: Streams, collection: Collection) -> list[str]:
        """Return the commands to suggest after a run."""
        commands = [self.evaluation_command] if streams.evaluation_samples else []
        tests = collection.rows("test")
        if len(tests) and self.samples(collection, setup)[0][tests].any():
            commands.append("python evaluate.py run_dir={run} split=test")
        elif len(tests) and self.output is not None:
            commands.append(predict_command(collection, tests, "{run}"))
        return [*commands, *self.next_commands]

    def find_facts(self, config: ImageTrainingConfig, collection: Collection) -> Json:
        """Return the task's facts about the collection. Raises UserError if the collection does not suit the task."""
        return {}

    def preprocessing(self, config: ImageTrainingConfig) -> Json:
        """Return how evaluation prepares an image."""
        background = DEFAULT if config.data.background is None else config.data.background
        return {**config.augment.preprocessing(config.model.in_channels), "background": background}

    def set_up(self, config: ImageTrainingConfig, collection: Collection, facts: Values | None = None) -> Setup:
        """Return the setup of a new run. facts: of the run, for one of its phases."""
        if facts is None:
            facts = self.find_facts(config, collection)
        return Setup(config.model, config.task, self.preprocessing(config), facts, config.loop.phases is not None)

    def build(self, setup: Setup) -> Task:
        """Return the task with random weights."""
        task = self.task(setup)
        metadata = {name: setup.facts[name] for name in self.names}
        metadata |= {name: setup.facts[name] for name in self.optional_names if name in setup.facts}
        if setup.preprocessing:
            metadata["preprocessing"] = dict(setup.preprocessing)
        task.metadata = {**metadata, **task.metadata}
        return task

    def source(self, collection: Collection, config: DataConfig, setup: Setup, *, repeats: bool) -> Source:
        """Return the images, with the background and colour handling of the network's training."""
        return open_images(collection, config, {"channels": 3, **setup.preprocessing}, repeats=repeats)

    # ----------------------------------------------------------------------------------------------------- samples

    def samples(self, collection: Collection, setup: Setup) -> tuple[np.ndarray, Fields]:
        """Return which rows the task can use, bool [N], and a function that adds a sample's fields to its images."""
        return np.ones(len(collection), dtype=bool), no_fields

    def views(self, setup: Setup, augment: AugmentConfig) -> Views:
        """Return the named views of a training image. Custom views are made in the workers."""
        return training_views(augment, setup.preprocessing["background"])

    def sampler(self, collection: Collection, setup: Setup, config: ImageTrainingConfig, rows: np.ndarray) -> Sampler:
        """Return the order of the training rows, by `loop.sampling`."""
        return build_sampler(config.loop.sampling, rows, collection, config.seed)

    # ----------------------------------------------------------------------------------------------------- streams

    def streams(self, data: Data, setup: Setup, config: ImageTrainingConfig) -> Streams:
        """Return the data of a run."""
        earlier = []
        for each in config.at_phases():
            own = self.set_up(each, data.collection, setup.facts)
            if self.model is ModelConfig:
                check_image_size(own.model, tuple(each.augment.image_size_hw), any_size=True)
            earlier.append(self.training(data, own, each).train)
        streams = self.training(data, setup, config)
        return replace(
            streams,
            evaluation=self.evaluation(data, setup, data.collection.rows("val"), training=True),
            fingerprints={**streams.fingerprints, **setup.fingerprints()},
            earlier=earlier,
        )

    def training(self, data: Data, setup: Setup, config: ImageTrainingConfig) -> Streams:
        """Return the training stream of a run or phase, with its fingerprints and descriptions."""
        collection = data.collection
        views = self.views(setup, config.augment)
        is_usable, fields = self.samples(collection, setup)
        rows = training_rows(collection, config.loop, is_usable)
        train = data.train(rows, fields, views, sampler=self.sampler(collection, setup, config, rows))
        described = {
            "collection": describe_collection(collection),
            "images": describe_augmentation(config.augment, task_mirrors="orientation" in setup.facts),
        }
        names = setup.facts.get("class_names", [])
        class_ids = collection.class_ids(names)[rows]
        counts = np.bincount(class_ids[class_ids >= 0], minlength=len(names)).tolist()
        trained_on = {"class_images": counts} if counts else {}
        return Streams(train, {}, data.fingerprints, described=described, trained_on=trained_on)

    def evaluation(self, data: Data, setup: Setup, rows: np.ndarray, *, training: bool) -> Loaders:
        """Return `val`: the images of `rows` that the task can use."""
        is_usable, fields = self.samples(data.collection, setup)
        return {"val": data.prepared(rows[is_usable[rows]], fields, setup.preprocessing)}

    def prepare(
        self,
        task: Task,
        data: Data,
        setup: Setup,
        config: ImageTrainingConfig,
        runtime: Runtime,
        is_new: bool,
    ) -> Finish | None:
        """Adapt the initial weights of a new run to the data. Return the `Finish` of the run, if it has one."""

    def write(self, folder: Path, setup: Setup) -> None:
        """Write the files of this kind into a run folder. Rank 0 calls it. It may raise OSError."""


def open_kind(name: str) -> Kind:
    """Return the kind with a name in the table."""
    return open_name(KINDS[name].kind)()


def predict_command(collection: Collection, rows: np.ndarray, weights: str | Path) -> str:
    """Return the command that predicts some images, in the form of a sample submission at the root if there is one."""
    words = [f"input={collection.folder_of(rows)}", "output=submission.csv"]
    words += [f"form={file}" for file in Path(collection.root).glob("*ubmission*.csv")][:1]
    return f"python predict.py weights={weights} {shlex.join(words)}"


def label_fields(**columns: np.ndarray) -> Fields:
    """Return a function that adds a sample's fields. columns: of all rows, [N, ...], by the name of the field."""
    return lambda example: {name: torch.tensor(column[example.draw.index]) for name, column in columns.items()}
