"""How captioned images reach task=diffusion: in buckets of shapes, with captions, from files or from caches."""

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from data.buckets import Buckets, FittedView, image_sizes, make_buckets
from data.captions import describe_captions
from data.collection import Collection
from data.config import DataConfig
from data.image_data import ImageData, describe_collection, load_collection
from data.loader import Example
from data.rows import training_rows
from data.source import ImageFiles
from data.stream import GroupedSampler
from data.transforms import Transform
from engine.config import TrainingConfig
from engine.runtime import Runtime
from engine.streams import Streams
from engine.tasks.diffusion_config import DiffusionTaskConfig
from engine.tasks.kind import Setup
from models.sdxl.tokenizer import tokenize
from utils.canvas import DEFAULT
from utils.contracts import Batch
from utils.ranks import distributed

SIZES = Path("outputs/cache/image_sizes.json")


class CaptionFields:
    """Add a sample's tokens, and its place in the step.

    parts: samples of a step, over all ranks. weights: of the rows' tags, [rows of the collection].
    """

    def __init__(self, config: DiffusionTaskConfig, parts: int, weights: np.ndarray | None) -> None:
        self.config, self.parts, self.weights = config, parts, weights

    def __call__(self, example: Example) -> dict[str, Tensor]:
        """Return the fields."""
        captions = self.config.captions
        text = captions.read(example.row)
        is_dropped = False
        if example.training:
            text, is_dropped = captions.vary(text, example.generator)
        else:
            text = captions.complete(text)
        weight = 1.0 if self.weights is None else float(self.weights[example.index])
        return {
            "token_ids": tokenize([text], self.config.caption_chunks)[0],
            "is_dropped": torch.tensor(is_dropped),
            "strata": torch.tensor([example.position % self.parts, self.parts]),
            "tag_weight": torch.tensor(weight),
        }


class DiffusionPipeline:
    """Captioned images of a collection, in buckets."""

    def complete(self, config: TrainingConfig) -> TrainingConfig:
        """Return the configuration as it is."""
        return config

    def preprocessing(self, config: TrainingConfig) -> dict[str, Any]:
        """Return nothing: the buckets are the task's."""
        return {}

    def check_metadata(self, path: Path, key: str, metadata: Mapping[str, Any]) -> None:
        """Accept a weight file: its model and task say all."""

    def open(
        self, config: DataConfig, setup: Setup[DiffusionTaskConfig], runtime: Runtime, *, seed: int, batch_size: int
    ) -> ImageData:
        """Open a collection to measure a task on it."""
        return self._open(config, runtime, seed, batch_size, None)

    def open_training(self, config: TrainingConfig, runtime: Runtime, run_path: Path) -> ImageData:
        """Open the collection of a run."""
        return self._open(config.data, runtime, config.seed, config.loop.batch_size, run_path)

    def _open(
        self, config: DataConfig, runtime: Runtime, seed: int, batch_size: int, run_path: Path | None
    ) -> ImageData:
        collection = load_collection(config)
        background = DEFAULT if config.background is None else config.background
        source = ImageFiles(collection, 3, config.max_pixels, background)
        return ImageData(collection, source, runtime, seed=seed, batch_size=batch_size, run_path=run_path)

    def _bucket(self, collection: Collection, setup: Setup[DiffusionTaskConfig], rows: np.ndarray) -> Buckets:
        sizes = distributed.rank_zero_call(lambda: image_sizes(collection, rows, SIZES).tolist())
        return make_buckets(collection, rows, np.array(sizes), setup.task.buckets)

    def streams(self, data: ImageData, setup: Setup[DiffusionTaskConfig], config: TrainingConfig) -> Streams:
        """Return the data of a run."""
        collection, task = data.collection, setup.task
        rows = training_rows(collection, config.loop.train_paths)
        buckets = self._bucket(collection, setup, rows)
        sampler = GroupedSampler(buckets.rows, buckets.groups, task.chunk, config.seed)
        fields = CaptionFields(task, config.loop.global_batch_size, None)
        train = data.train(buckets.rows, fields, self._views(task, buckets), sampler=sampler)
        described = {
            "collection": f"{describe_collection(collection)}; {describe_captions(collection, rows, task.captions)}",
            "images": buckets.describe(),
        }
        fingerprints = {**data.fingerprints, **setup.fingerprints()}
        return Streams(train, self.evaluation(data, setup, training=True), fingerprints, described=described)

    def evaluation(
        self, data: ImageData, setup: Setup[DiffusionTaskConfig], *, training: bool
    ) -> dict[str, Iterable[Batch]]:
        """Return `val`, in buckets, with centred crops and whole captions."""
        task = setup.task
        still = task.model_copy(update={"buckets": task.buckets.model_copy(update={"flip": 0.0, "crop": "centre"})})
        buckets = self._bucket(data.collection, setup, data.collection.rows("val"))
        fields = CaptionFields(still, 1, None)
        views = self._views(still, buckets)
        return {"val": data.evaluation(buckets.rows, fields, views, groups=buckets.groups)}

    def _views(self, task: DiffusionTaskConfig, buckets: Buckets) -> dict[str, Transform]:
        return {
            "images": FittedView(buckets.sizes_hw, task.buckets, conditions=False),
            "fit": FittedView(buckets.sizes_hw, task.buckets, conditions=True),
        }
