"""The data of a script: one object, made once and asked for training and evaluation streams.

collection = load_collection(config.data)
data = ImageData(collection, ImageFiles(collection, 3, max_pixels), runtime, seed=0, batch_size=128, run_path=run)
train = data.train(rows, fields, training_views(augment))
val = data.evaluation(data.collection.rows("val"), fields, {"images": EvalTransform.of(preprocessing)})
"""

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from data.collection import Collection, index_collection, open_collection
from data.config import DataConfig, GlyphsConfig
from data.decode import pillow_version
from data.device_augment import DeviceAugment
from data.glyphs import draw_glyphs, glyphs_ready
from data.loader import EvaluationLoader, Fields, SampleReader, TrainLoader, UnreadableLog
from data.source import Source
from data.stream import EvaluationBatches, Sampler, ShuffledSampler
from data.transforms import Transform
from utils.contracts import Batch, DeviceHook, Machine
from utils.ranks import distributed
from utils.record.logging import get_logger
from utils.record.progress import counting

log = get_logger(__name__)

CACHE = Path("outputs/cache/collections")


def load_collection(config: DataConfig) -> Collection:
    """Index the collection on rank 0 (drawing the glyphs first where they are missing) and open it on every rank."""

    def index() -> str:
        if isinstance(config, GlyphsConfig) and not glyphs_ready(Path(config.root)):
            log.info("drawing the glyph collection into %s (once, some seconds)", config.root)
            with counting("drawing the glyphs") as progress:
                draw_glyphs(Path(config.root), progress)
        return str(index_collection(config.root, validation_fraction=config.validation_fraction, cache=CACHE))

    collection = open_collection(config.root, Path(distributed.rank_zero_call(index)))
    log.info(
        "collection: %s, %s training and %s validation images, read by %s",
        config.root,
        f"{len(collection.rows('train')):,}",
        f"{len(collection.rows('val')):,}",
        pillow_version(),
    )
    return collection


def device_hook(views: Mapping[str, Transform], on_device: DeviceHook | None) -> DeviceHook | None:
    """Return what changes a batch on the device: the views' own part of the augmentation first, then `on_device`."""
    hooks = [view.on_device for view in views.values() if isinstance(view, DeviceAugment)]
    hooks += [] if on_device is None else [on_device]

    def apply(batch: Batch) -> Batch:
        for hook in hooks:
            batch = hook(batch)
        return batch

    return apply if hooks else None


class ImageData:
    """A collection and how this process reads it: the records of a source.

    batch_size: of evaluation. run_path: the folder whose unreadable.jsonl lists unreadable images; None for none.
    """

    def __init__(
        self,
        collection: Collection,
        source: Source,
        machine: Machine,
        *,
        seed: int,
        batch_size: int,
        run_path: Path | None,
    ) -> None:
        self.collection, self._source = collection, source
        self.fingerprints = {"data.root": collection.fingerprint, **source.fingerprints}
        self._machine, self._seed, self._batch_size = machine, seed, batch_size
        self._unreadable = UnreadableLog(None if run_path is None else run_path / "unreadable.jsonl")

    def train(
        self,
        rows: Sequence[int],
        fields: Fields,
        views: Mapping[str, Transform],
        *,
        sampler: Sampler | None = None,
        on_device: DeviceHook | None = None,
    ) -> TrainLoader:
        """Return the endless stream of training samples; without a sampler, every row once per epoch."""
        sampler = ShuffledSampler(rows, self._seed) if sampler is None else sampler
        reader, hook = self._reader(fields, views, training=True), device_hook(views, on_device)
        return TrainLoader(reader, sampler, self._machine, seed=self._seed, unreadable=self._unreadable, on_device=hook)

    def evaluation(
        self,
        rows: Sequence[int],
        fields: Fields,
        views: Mapping[str, Transform],
        *,
        groups: np.ndarray | None = None,
        on_device: DeviceHook | None = None,
    ) -> EvaluationLoader:
        """Return a loader of some rows, each exactly once over all ranks; groups: as in `EvaluationBatches`."""
        batches = EvaluationBatches(
            rows, seed=self._seed, batch_size=self._batch_size, rank=distributed.rank(),
            world_size=distributed.world_size(), groups=groups,
        )  # fmt: skip
        reader, hook = self._reader(fields, views, training=False), device_hook(views, on_device)
        return EvaluationLoader(reader, batches, self._machine, unreadable=self._unreadable, on_device=hook)

    def _reader(self, fields: Fields, views: Mapping[str, Transform], *, training: bool) -> SampleReader:
        return SampleReader(self.collection, self._source, views, fields, training=training)
