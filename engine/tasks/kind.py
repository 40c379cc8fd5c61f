"""What a kind of training tells the scripts: how to build its task and its data.

    data = kind.open_training_data(config, runtime, run_path)
    setup = kind.set_up(config, data.collection)
    task = kind.build(setup)
    streams = kind.streams(data, setup, config)

A kind's config, fields, task and Kind are in one file; kinds.py has an entry for each.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, Generic, Self, TypeVar

import numpy as np
from pydantic import model_validator
from torch import nn

from data.collection import Collection
from data.config import AugmentConfig, DataConfig
from data.device_augment import AUGMENT, training_views
from data.image_data import ImageData
from data.loader import Fields
from data.rows import spread, training_rows
from data.source import ImageDecoder
from data.stream import Sampler, build_sampler
from data.transforms import EvalTransform, Transform
from engine.config import TrainingConfig
from engine.runtime import Runtime
from engine.streams import Streams
from engine.task import Task
from models.config import ModelConfig
from models.image_model import Output
from models.normalise import Normalise
from utils.config.schema import Strict
from utils.contracts import Batch
from utils.errors import UserError

Config = TypeVar("Config", bound=Strict)


class ImageTrainingConfig(TrainingConfig):
    """The schema of a training script on images; the script adds `task`."""

    model: ModelConfig
    data: DataConfig
    augment: AugmentConfig

    @model_validator(mode="after")
    def _classes_are_balanced_once(self) -> Self:
        task = getattr(self, "task", None)  # of the script, and not every kind has weights of classes
        if self.loop.sampling == "balanced" and getattr(task, "class_weights", "none") == "balanced":
            raise ValueError(
                "task.class_weights: balanced, beside loop.sampling=balanced, would make up for the sizes of classes "
                "twice; set task.class_weights=none or loop.sampling=shuffled"
            )
        return self


@dataclass(frozen=True)
class Setup(Generic[Config]):
    """What a task is built from. It follows from a run's configuration, and from a weight file's metadata alone.

    preprocessing: what evaluation does to an image (AugmentConfig.preprocessing).
    facts: what the task knows of the collection it was trained on, such as class names (JSON values).
    """

    model: ModelConfig
    task: Config
    preprocessing: Mapping[str, Any]
    facts: Mapping[str, Any] = field(default_factory=dict)

    def normalise(self) -> Normalise:
        """Return the normalisation of images."""
        return Normalise(self.preprocessing["mean"], self.preprocessing["std"], self.model.in_channels)

    def metadata(self) -> dict[str, Any]:
        """Return the metadata of a weight file beside model and task."""
        return {**self.facts, "preprocessing": dict(self.preprocessing)}


class Kind(Generic[Config]):
    """One kind of training on images. Subclasses override what differs.

    config: the schema of its `task` group; model_schema: of its `model` group. scripts: the root scripts that train it.
    output: what its network makes of one image; None where it makes nothing of an image alone. fact_names: the facts
    that its task reads. later_keys: keys of `config` that older weight files do not state, with what held then.
    """

    config: ClassVar[type[Strict]]
    model_schema: ClassVar[Any] = ModelConfig
    scripts: ClassVar[tuple[str, ...]] = ("finetune",)
    output: ClassVar[Output | None] = None
    fact_names: ClassVar[tuple[str, ...]] = ()
    later_keys: ClassVar[Mapping[str, Any]] = {}

    # ----------------------------------------------------------------------------------------------------- the task

    def find_facts(self, config: ImageTrainingConfig, collection: Collection) -> dict[str, Any]:
        """Return what the task must know of the collection. Raises UserError where the collection does not suit it."""
        return {}

    def build(self, setup: Setup[Config]) -> Task:
        """Return the task with drawn weights."""
        raise NotImplementedError

    def image_network(self, task: Task) -> nn.Module:
        """Return the network from normalised images to `output`: logits [B, K], or features [B, C]."""
        return task.network

    def set_up(self, config: ImageTrainingConfig, collection: Collection) -> Setup[Config]:
        """Return what the task of a new run is built from."""
        preprocessing = config.augment.preprocessing(config.model.in_channels)
        return Setup(config.model, config.task, preprocessing, self.find_facts(config, collection))

    def prepare(
        self, task: Task, data: ImageData, setup: Setup[Config], config: ImageTrainingConfig, runtime: Runtime
    ) -> None:
        """Change the initial weights by looking at the data, on a new run only."""

    # ----------------------------------------------------------------------------------------------------- the data

    def open_data(
        self,
        config: DataConfig,
        model: ModelConfig,
        runtime: Runtime,
        *,
        seed: int,
        batch_size: int,
        run_path: Path | None,
    ) -> ImageData:
        """Open the collection; unreadable images are listed in the folder `run_path`, where it is given."""
        decoder = ImageDecoder(model.in_channels, config.max_pixels)
        return ImageData(config, runtime, seed=seed, batch_size=batch_size, decoder=decoder, run_path=run_path)

    def open_training_data(self, config: ImageTrainingConfig, runtime: Runtime, run_path: Path) -> ImageData:
        """Open the collection of a training run, whose folder is `run_path`."""
        return self.open_data(
            config.data, config.model, runtime,
            seed=config.seed, batch_size=config.loop.batch_size, run_path=run_path,
        )  # fmt: skip

    def rows(self, collection: Collection, setup: Setup[Config], rows: np.ndarray) -> np.ndarray:
        """Return those of some rows that the task can use."""
        return rows

    def fields(self, collection: Collection, setup: Setup[Config]) -> Fields:
        """Return what a sample has beside its images."""
        return no_fields

    def views(self, setup: Setup[Config], augment: AugmentConfig) -> Mapping[str, Transform]:
        """Return the named views of a training image; a kind with its own makes them in the workers."""
        return training_views(augment)

    def sampler(
        self, collection: Collection, setup: Setup[Config], config: ImageTrainingConfig, rows: np.ndarray
    ) -> Sampler:
        """Return the order of the training rows: the one that `loop.sampling` names."""
        return build_sampler(config.loop.sampling, rows, collection, config.seed)

    def streams(self, data: ImageData, setup: Setup[Config], config: ImageTrainingConfig) -> Streams:
        """Return the data of a run."""
        collection = data.collection
        rows = self.rows(collection, setup, training_rows(collection, config.loop.train_paths))
        fields, views = self.fields(collection, setup), self.views(setup, config.augment)
        if config.augment.on_device and AUGMENT not in views:
            raise UserError(
                f"augment.on_device: true is for kinds whose training view is `images` alone; task={config.task.name} "
                f"makes its own views in the workers ({', '.join(views)}), so set augment.on_device=false"
            )
        train = data.train(rows, fields, views, sampler=self.sampler(collection, setup, config, rows))
        return Streams(train, self.evaluation(data, setup, training=True), data.fingerprints)

    def evaluation(self, data: ImageData, setup: Setup[Config], *, training: bool) -> dict[str, Iterable[Batch]]:
        """Return the evaluation loaders: `val`, and what else the task's `evaluate` reads. `training`: within a run."""
        rows = self.rows(data.collection, setup, data.collection.rows("val"))
        return {"val": data.evaluation(rows, self.fields(data.collection, setup), evaluation_views(setup))}

    def calibration(self, data: ImageData, setup: Setup[Config], count: int) -> Iterable[Batch]:
        """Return training images as evaluation prepares them, at most `count` rounded up to whole batches."""
        rows = spread(self.rows(data.collection, setup, data.collection.rows("train")), count)
        return data.evaluation(rows, no_fields, evaluation_views(setup))


def no_fields(example: object) -> dict:
    """Add nothing to a sample."""
    return {}


def evaluation_views(setup: Setup) -> dict[str, Transform]:
    """Return the one view of an evaluation image."""
    return {"images": EvalTransform.of(setup.preprocessing)}
