"""The pipeline of images: from the files of a collection to batches of augmented images and a task's fields."""

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, Generic, Self

import numpy as np
from pydantic import model_validator

from data.cache.size import preprocessing_of
from data.collection import Collection
from data.config import AugmentConfig, DataConfig
from data.device_augment import AUGMENT, IMAGES, training_views
from data.image_data import ImageData, describe_collection, describe_transparency, load_collection
from data.images import open_images
from data.loader import Fields, no_fields
from data.rows import spread, training_rows
from data.stream import Sampler, build_sampler
from data.transforms import EvalTransform, Transform
from engine.config import TrainingConfig
from engine.runtime import Runtime
from engine.streams import Streams
from engine.tasks.kind import Config, Setup, TaskConfig
from engine.tasks.pretrained import use_pretrained
from models.config import ModelConfig
from models.predictor import check_metadata
from utils.canvas import DEFAULT, background_of
from utils.contracts import Batch
from utils.errors import UserError
from utils.record.logging import get_logger

log = get_logger(__name__)


class ImageTrainingConfig(TrainingConfig):
    """The schema of a training script on images; the script says which tasks it trains."""

    model: ModelConfig
    data: DataConfig
    augment: AugmentConfig
    task: TaskConfig

    @model_validator(mode="after")
    def _suits_the_task(self) -> Self:
        self.task.check_run(self)
        return self


class ImagePipeline(Generic[Config]):
    """Images of a collection. A kind's own pipeline overrides rows, fields, views or sampler."""

    def complete(self, config: ImageTrainingConfig) -> ImageTrainingConfig:
        """Return the configuration; where the run begins with timm's weights, with their preprocessing."""
        return use_pretrained(config)

    def preprocessing(self, config: ImageTrainingConfig) -> dict[str, Any]:
        """Return what evaluation does to an image."""
        background = DEFAULT if config.data.background is None else config.data.background
        icc = {"icc": True} if config.data.icc else {}  # files of before do not state it
        return {**preprocessing_of(config.augment, config.model.in_channels), "background": background, **icc}

    def check_metadata(self, path: Path, key: str, metadata: Mapping[str, Any]) -> None:
        """Raise UserError (`key`) that names the first wrong value of a weight file's preprocessing and names."""
        check_metadata(path, key, metadata)

    # ------------------------------------------------------------------------------------------------- collections

    def open(
        self, config: DataConfig, setup: Setup[Config], runtime: Runtime, *, seed: int, batch_size: int
    ) -> ImageData:
        """Open a collection to evaluate a task on it."""
        collection, stated = load_collection(config), setup.preprocessing
        background = background_of(stated) if config.background is None else config.background
        config = config.model_copy(update={"icc": config.icc or stated.get("icc", False)})
        source = open_images(
            collection, config, setup.model.in_channels, background, shortest_px=stated.get("shortest_px")
        )
        log.info("%s", describe_collection(collection))
        return ImageData(collection, source, runtime, seed=seed, batch_size=batch_size, run_path=None)

    def open_training(self, config: ImageTrainingConfig, runtime: Runtime, run_path: Path) -> ImageData:
        """Open the collection of a training run; unreadable images are listed in its folder, `run_path`."""
        collection, stated = load_collection(config.data), self.preprocessing(config)
        source = open_images(
            collection, config.data, config.model.in_channels, stated["background"],
            shortest_px=stated.get("shortest_px"), repeats=True,
        )  # fmt: skip
        batch_size = config.loop.first_batch_size
        return ImageData(collection, source, runtime, seed=config.seed, batch_size=batch_size, run_path=run_path)

    # ----------------------------------------------------------------------------------------------------- samples

    def rows(self, collection: Collection, setup: Setup[Config], rows: np.ndarray) -> np.ndarray:
        """Return those of some rows that the task can use."""
        return rows

    def fields(self, collection: Collection, setup: Setup[Config]) -> Fields:
        """Return what a sample has beside its images."""
        return no_fields

    def views(self, setup: Setup[Config], augment: AugmentConfig) -> Mapping[str, Transform]:
        """Return the named views of a training image; a kind with its own makes them in the workers."""
        return training_views(augment, setup.preprocessing["background"])

    def sampler(
        self, collection: Collection, setup: Setup[Config], config: ImageTrainingConfig, rows: np.ndarray
    ) -> Sampler:
        """Return the order of the training rows: the one that `loop.sampling` names."""
        return build_sampler(config.loop.sampling, rows, collection, config.seed)

    # ----------------------------------------------------------------------------------------------------- streams

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
        if config.augment.shrink and views.keys() - {IMAGES, AUGMENT}:
            raise UserError(
                f"augment.shrink: true is for kinds whose training view is `images` alone; task={config.task.name} "
                f"makes crops of its own ({', '.join(views)}), so set augment.shrink=false"
            )
        train = data.train(rows, fields, views, sampler=self.sampler(collection, setup, config, rows))
        fingerprints = {**data.fingerprints, **setup.fingerprints()}
        alpha = describe_transparency(collection, setup.preprocessing["background"])
        images = config.augment.describe(config.task.mirrors)
        described = {"collection": describe_collection(collection) + alpha, "images": images}
        return Streams(train, self.evaluation(data, setup, training=True), fingerprints, described=described)

    def evaluation(self, data: ImageData, setup: Setup[Config], *, training: bool) -> dict[str, Iterable[Batch]]:
        """Return the evaluation loaders: `val`, and what else the task's `evaluate` reads. `training`: within a run."""
        rows = self.rows(data.collection, setup, data.collection.rows("val"))
        return {"val": data.evaluation(rows, self.fields(data.collection, setup), evaluation_views(setup))}

    def calibration(self, data: ImageData, setup: Setup[Config], count: int) -> Iterable[Batch]:
        """Return training images as evaluation prepares them, at most `count` rounded up to whole batches."""
        rows = spread(self.rows(data.collection, setup, data.collection.rows("train")), count)
        return data.evaluation(rows, no_fields, evaluation_views(setup))


def evaluation_views(setup: Setup) -> dict[str, Transform]:
    """Return the one view of an evaluation image."""
    return {"images": EvalTransform.of(setup.preprocessing)}
