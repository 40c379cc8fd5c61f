"""The pipeline of images: from the files of a collection to batches of augmented images and a task's fields."""

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Generic, Self

import numpy as np
from pydantic import model_validator

from data.buckets import letterbox_groups, letterbox_sizes
from data.collection import Collection
from data.config import AugmentConfig, DataConfig
from data.device_augment import AUGMENT, IMAGES, training_views
from data.loader import Fields, no_fields
from data.open import Data, describe_collection, describe_transparency, load_collection, open_images
from data.rows import training_rows
from data.stream import GroupedSampler, Sampler, build_sampler
from data.transforms import FOOTPRINT, ByGroup, Views
from engine.config import TrainingConfig
from engine.runtime import Runtime
from engine.streams import Streams
from engine.tasks.kind import Config, Setup, TaskConfig
from engine.tasks.pretrained import use_pretrained
from models.build import check_image_size
from models.config import ModelConfig
from models.predictor import check_metadata
from utils.canvas import DEFAULT, background_of
from utils.contracts import Batch
from utils.errors import UserError
from utils.record.logging import get_logger

log = get_logger(__name__)

_CHUNK = 128  # neighbouring samples of one bucket at most, and so the largest micro-batch
_STRIDE_PX = 32  # total, of nearly all of timm's networks


class ImageTrainingConfig(TrainingConfig):
    """The schema of a training script on images; the script says which tasks it trains."""

    model: ModelConfig
    data: DataConfig
    augment: AugmentConfig
    task: TaskConfig

    @model_validator(mode="after")
    def _buckets_can_be_grouped(self) -> Self:
        if self.augment.pad == "buckets" and (self.augment.on_device or self.loop.sampling != "shuffled"):
            raise ValueError(
                f"augment.pad: buckets needs augment.on_device=false (it is {str(self.augment.on_device).lower()}) and "
                f"loop.sampling=shuffled (it is {self.loop.sampling}); set them, or augment.pad=square"
            )
        return self

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
        """Return what evaluation does to an image; of buckets, to one in a square, and their sizes (`buckets_hw`)."""
        augment, stated = config.augment, {}  # files of before do not state all
        if config.data.icc:
            stated["icc"] = True
        if augment.pad == "buckets":
            stated["buckets_hw"] = letterbox_sizes(augment.image_size_hw, self.unit_px(config)).tolist()
        background = DEFAULT if config.data.background is None else config.data.background
        return {**augment.preprocessing(config.model.in_channels), "background": background, **stated}

    def unit_px(self, config: ImageTrainingConfig) -> int:
        """Return what divides the sides of buckets."""
        return getattr(config.model, "total_stride", _STRIDE_PX)

    def check_metadata(self, path: Path, key: str, metadata: Mapping[str, Any]) -> None:
        """Raise UserError (`key`) that names the first wrong value of a weight file's preprocessing and names."""
        check_metadata(path, key, metadata)

    # ------------------------------------------------------------------------------------------------- collections

    def open(self, config: DataConfig, setup: Setup[Config], runtime: Runtime, *, seed: int, batch_size: int) -> Data:
        """Open a collection to evaluate a task on it."""
        collection, stated = load_collection(config), setup.preprocessing
        background = background_of(stated) if config.background is None else config.background
        config = config.model_copy(update={"icc": config.icc or stated.get("icc", False)})
        source = open_images(
            collection, config, setup.model.in_channels, background, shortest_px=stated.get("shortest_px")
        )
        log.info("%s", describe_collection(collection))
        return Data(collection, source, runtime, seed=seed, batch_size=batch_size, run_path=None)

    def open_training(self, config: ImageTrainingConfig, runtime: Runtime, run_path: Path) -> Data:
        """Open the collection of a training run; unreadable images are listed in its folder, `run_path`."""
        collection, stated = load_collection(config.data), self.preprocessing(config)
        source = open_images(
            collection, config.data, config.model.in_channels, stated["background"],
            shortest_px=stated.get("shortest_px"), repeats=True,
        )  # fmt: skip
        batch_size = config.loop.first_batch_size
        return Data(collection, source, runtime, seed=config.seed, batch_size=batch_size, run_path=run_path)

    # ----------------------------------------------------------------------------------------------------- samples

    def rows(self, collection: Collection, setup: Setup[Config], rows: np.ndarray) -> np.ndarray:
        """Return those of some rows that the task can use."""
        return rows

    def fields(self, collection: Collection, setup: Setup[Config]) -> Fields:
        """Return what a sample has beside its images."""
        return no_fields

    def views(self, setup: Setup[Config], augment: AugmentConfig) -> Views:
        """Return the named views of a training image; a kind with its own makes them in the workers."""
        background = setup.preprocessing["background"]
        return ByGroup.views(augments(augment, setup), lambda own: training_views(own, background))

    def sampler(
        self, collection: Collection, setup: Setup[Config], config: ImageTrainingConfig, rows: np.ndarray
    ) -> Sampler:
        """Return the order of the training rows: the one that `loop.sampling` names.

        Of buckets, in chunks that divide the global batch. Raises UserError (`augment.pad`) where the network does not
        take images of all their sizes.
        """
        groups = letterbox_groups(collection, rows, setup.preprocessing)
        if groups is None:
            return build_sampler(config.loop.sampling, rows, collection, config.seed)
        found = []
        for size_hw, count in zip(setup.preprocessing["buckets_hw"], np.bincount(groups).tolist()):
            _check_bucket(setup.model, size_hw)
            found += ["{:,} of {} x {}".format(count, *size_hw)] if count else []
        log.info("augment.pad=buckets: %s px", ", ".join(found))
        batch = config.loop.global_batch_size
        return GroupedSampler(rows, groups, max(n for n in range(1, _CHUNK + 1) if batch % n == 0), config.seed)

    # ----------------------------------------------------------------------------------------------------- streams

    def streams(self, data: Data, setup: Setup[Config], config: ImageTrainingConfig) -> Streams:
        """Return the data of a run."""
        collection = data.collection
        rows = self.rows(collection, setup, training_rows(collection, config.loop.train_paths))
        fields, views = self.fields(collection, setup), self.views(setup, config.augment)
        if config.augment.on_device and AUGMENT not in views:
            raise UserError(
                f"augment.on_device: true is for kinds whose training view is `images` alone; task={config.task.name} "
                f"makes its own views in the workers ({', '.join(views)}), so set augment.on_device=false"
            )
        if config.augment.shrink and views.keys() - {IMAGES, AUGMENT, FOOTPRINT}:
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

    def evaluation(self, data: Data, setup: Setup[Config], *, training: bool) -> dict[str, Iterable[Batch]]:
        """Return the evaluation loaders: `val`, and what else the task's `evaluate` reads. `training`: within a run."""
        rows = self.rows(data.collection, setup, data.collection.rows("val"))
        return {"val": data.prepared(rows, self.fields(data.collection, setup), setup.preprocessing)}


def augments(augment: AugmentConfig, setup: Setup) -> list[AugmentConfig]:
    """Return the augmentation of each bucket; where images have one size, the one given."""
    sizes_hw = setup.preprocessing.get("buckets_hw") or [augment.image_size_hw]
    return [augment.model_copy(update={"image_size_hw": size_hw}) for size_hw in sizes_hw]


def _check_bucket(model: ModelConfig, size_hw: Sequence[int]) -> None:
    """Raise UserError (`augment.pad`) where the network does not take images of a bucket's size."""
    try:
        check_image_size(model, tuple(size_hw))
    except UserError as error:
        raise UserError(
            f"augment.pad: buckets trains on images of {size_hw[0]} x {size_hw[1]} px too, which {model.name} does not "
            f"take; set augment.pad=square, or choose another network ({error})"
        ) from None
