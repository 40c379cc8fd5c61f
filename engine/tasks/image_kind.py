"""The base of kinds on images: from the files of a collection to batches of augmented images and a task's fields."""

from collections.abc import Iterable
from typing import Any, Self

import numpy as np
import torch
from pydantic import model_validator

from data.buckets import letterbox_groups, letterbox_sizes
from data.collection import Collection
from data.config import AugmentConfig, DataConfig
from data.device_augment import IMAGES, training_views
from data.loader import Fields, no_fields
from data.open import Data, describe_collection, open_images
from data.rows import training_rows
from data.source import Source
from data.stream import GroupedSampler, Sampler, build_sampler
from data.transforms import ByGroup, TrainTransform, Views
from engine.config import TrainingConfig
from engine.task import Streams, Task
from engine.tasks.kind import Kind, Setup, TaskConfig
from models.build import build_network, check_image_size
from models.config import ModelConfig
from models.weights.initialise import initialise_from
from utils.canvas import DEFAULT, background_of
from utils.contracts import Batch
from utils.errors import UserError
from utils.io.weights import InitFrom
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
    def _fits_together(self) -> Self:
        if self.augment.pad == "buckets" and (self.augment.on_device or self.loop.sampling != "shuffled"):
            raise ValueError(
                f"augment.pad: buckets needs augment.on_device=false (it is {str(self.augment.on_device).lower()}) and "
                f"loop.sampling=shuffled (it is {self.loop.sampling}); set them, or augment.pad=square"
            )
        self.task.check_run(self)
        return self


class ImageTask(Task):
    """A task with one network on images, whose head has so many outputs (0: no head)."""

    def __init__(self, setup: Setup, outputs: int = 0) -> None:
        super().__init__()
        check_image_size(setup.model, tuple(setup.preprocessing["image_size_hw"]))
        self.network = build_network(setup.model, num_classes=outputs)
        self.normalise = setup.normalise()

    def initialise(self, source: InitFrom | None) -> None:
        """Load the network of a run or file; the head stays as it was drawn."""
        self.origin = initialise_from(self.network, source, keep_head=False)


def label_fields(class_ids: np.ndarray) -> Fields:
    """Return what adds a sample's class index, int64 []. class_ids: [N] of the collection's rows, -1 for none."""
    ids = torch.as_tensor(class_ids, dtype=torch.int64)
    return lambda example: {"labels": ids[example.draw.index]}


class ImageKind(Kind):
    """Images of a collection. A kind of its own overrides samples, views or sampler."""

    task = ImageTask

    def preprocessing(self, config: ImageTrainingConfig) -> dict[str, Any]:
        """Return what evaluation does to an image; of buckets, to one in a square, and their sizes (`buckets_hw`)."""
        augment, background = config.augment, config.data.background
        stated = augment.preprocessing(config.model.in_channels)
        stated["background"] = DEFAULT if background is None else background
        if config.data.icc:
            stated["icc"] = True
        if augment.pad == "buckets":
            unit_px = getattr(config.task, "patch_px", None) or getattr(config.model, "total_stride", _STRIDE_PX)
            stated["buckets_hw"] = letterbox_sizes(augment.image_size_hw, unit_px).tolist()
        return stated

    def source(self, collection: Collection, config: DataConfig, setup: Setup, *, repeats: bool) -> Source:
        """Return the images on the background and in the colours that the network was trained on."""
        stated = setup.preprocessing
        background = background_of(stated) if config.background is None else config.background
        config = config.model_copy(update={"icc": config.icc or stated.get("icc", False)})
        return open_images(
            collection, config, stated["channels"], background, shortest_px=stated.get("shortest_px"), repeats=repeats
        )

    # ----------------------------------------------------------------------------------------------------- samples

    def samples(self, collection: Collection, setup: Setup) -> tuple[np.ndarray, Fields]:
        """Return which rows the task can use, bool [N], and what a sample has beside its images."""
        return np.ones(len(collection), dtype=bool), no_fields

    def views(self, setup: Setup, augment: AugmentConfig) -> Views:
        """Return the named views of a training image; a kind with its own makes them in the workers."""
        background, sizes_hw = setup.preprocessing["background"], setup.preprocessing.get("buckets_hw")
        if sizes_hw is None:
            return training_views(augment, background)
        each = [augment.model_copy(update={"image_size_hw": size_hw}) for size_hw in sizes_hw]
        return {IMAGES: ByGroup([TrainTransform(own, background) for own in each])}

    def sampler(self, collection: Collection, setup: Setup, config: ImageTrainingConfig, rows: np.ndarray) -> Sampler:
        """Return the order of the training rows: the one that `loop.sampling` names.

        Of buckets, in chunks that divide the global batch. Raises UserError (`augment.pad`) where the network does not
        take images of all their sizes.
        """
        groups, model = letterbox_groups(collection, rows, setup.preprocessing), setup.model
        if groups is None:
            return build_sampler(config.loop.sampling, rows, collection, config.seed)
        sizes_hw, batch = setup.preprocessing["buckets_hw"], config.loop.global_batch_size
        counted = zip(np.bincount(groups).tolist(), sizes_hw)
        found = [f"{count:,} of {height} x {width}" for count, (height, width) in counted if count]
        log.info("augment.pad=buckets: %s px", ", ".join(found))
        try:
            for height, width in sizes_hw:
                check_image_size(model, (height, width))
        except UserError as error:
            raise UserError(
                f"augment.pad: buckets trains on images of {height} x {width} px too, which {model.name} does not take;"
                f" set augment.pad=square, or choose another network ({error})"
            ) from None
        return GroupedSampler(rows, groups, max(n for n in range(1, _CHUNK + 1) if batch % n == 0), config.seed)

    # ----------------------------------------------------------------------------------------------------- streams

    def streams(self, data: Data, setup: Setup, config: ImageTrainingConfig) -> Streams:
        """Return the data of a run."""
        collection, augment, views = data.collection, config.augment, self.views(setup, config.augment)
        is_usable, fields = self.samples(collection, setup)
        rows = training_rows(collection, config.loop.train_paths)
        rows = rows[is_usable[rows]]
        for key in ("on_device", "shrink"):
            if getattr(augment, key) and type(self).views is not ImageKind.views:
                raise UserError(
                    f"augment.{key}: true is for kinds whose training view is `images` alone; task={config.task.name} "
                    f"makes views of its own ({', '.join(views)}), so set augment.{key}=false"
                )
        train = data.train(rows, fields, views, sampler=self.sampler(collection, setup, config, rows))
        described = {
            "collection": describe_collection(collection),
            "images": augment.describe("orientation" in setup.facts),
        }
        fingerprints = {**data.fingerprints, **setup.fingerprints()}
        return Streams(train, self.evaluation(data, setup, training=True), fingerprints, described=described)

    def evaluation(self, data: Data, setup: Setup, *, training: bool) -> dict[str, Iterable[Batch]]:
        """Return the images of `val` that the task can use."""
        (is_usable, fields), rows = self.samples(data.collection, setup), data.collection.rows("val")
        return {"val": data.prepared(rows[is_usable[rows]], fields, setup.preprocessing)}
