"""Open data: from a configuration to a collection, the source of its records, and streams of batches. Read this first.

    collection = load_collection(config.data)
    source = open_images(collection, config.data, channels=3, background="white")
    data = Data(collection, source, runtime, seed=0, batch_size=128, run_path=run)
    train = data.train(rows, fields, training_views(augment))
    val = data.prepared(collection.rows("val"), fields, preprocessing)

The way of an image, each step a call of the one before:

    position -> row        Sampler.at                                                  stream.py
    row -> pixels          MemoryCached, DiskCached, Images: bytes, then the Decoder   images.py, cache/, decode.py
    pixels -> views        TrainTransform, EvalTransform; fields add labels and tags   transforms.py, SampleReader
    samples -> batch       collate, in a loader worker                                 batch.py
    batch -> device        to_device, then the hook of DeviceAugment                loader.py, device_augment.py
"""

import copy
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np

from data.augment.on_device import DeviceAugment
from data.augment.transforms import evaluation_views
from data.collection.collection import Collection, index_collection
from data.config import DataConfig
from data.images.decode import Decoder, decoder_versions
from data.images.disk_cache import DiskCached
from data.images.image_source import Images, ListedFiles, open_contents
from data.images.memory_cache import keep_in_memory
from data.images.pixels import read_upright_size
from data.latents.buckets import assign, letterbox_groups
from data.layouts.glyphs import draw_glyphs
from data.stream.loader import EvaluationStream, Fields, Loader, SampleReader, TrainStream, UnreadableLog, no_fields
from data.stream.order import Sampler, ShuffledSampler, Views
from data.stream.source import Source, UnreadableImage
from utils.canvas import background_of
from utils.contracts import Machine
from utils.ranks import distributed
from utils.record.logging import get_logger

log = get_logger(__name__)

CACHE = Path("outputs/cache/collections")


def load_collection(config: DataConfig) -> Collection:
    """Index the collection on rank 0 (drawing the glyphs first where they are missing) and open it on every rank."""

    def index() -> str:
        if config.name == "glyphs":
            draw_glyphs(Path(config.root))
        return str(index_collection(config.root, validation_fraction=config.validation_fraction, cache=CACHE))

    collection = Collection(config.root, Path(distributed.rank_zero_call(index)))
    log.debug("collection: %s, read by %s", describe_collection(collection), decoder_versions())
    return collection


def describe_collection(collection: Collection) -> str:
    """Return a collection in a line: its root, splits and classes."""
    train, val = (f"{len(collection.rows(split)):,}" for split in ("train", "val"))
    classes = len(collection.class_names("train"))
    labels = f" of {classes} classes" if classes else ", without labels"
    return f"{collection.root}: {train} training and {val} validation images{labels}"


def load_files(
    paths: Sequence[Path], preprocessing: Mapping[str, Any], machine: Machine, *, max_pixels: int, batch_size: int
) -> tuple[EvaluationStream, Mapping[str, str]]:
    """Return the batches of image files as evaluation prepares them, and the reasons of those unreadable.

    A sample's id is its place among the paths, and its key 0 where it is padding. In order; where the preprocessing
    states buckets, one bucket after the other, and files whose size cannot be read as if they were squares.
    """
    decoder = Decoder(
        preprocessing["channels"], max_pixels, background_of(preprocessing), preprocessing.get("icc", False),
        preprocessing.get("shortest_px"),
    )  # fmt: skip
    source, groups = Images(ListedFiles(paths), decoder), None
    if (buckets_hw := preprocessing.get("buckets_hw")) is not None:
        sizes_hw = np.ones((len(paths), 2))
        for place, path in enumerate(paths):
            with suppress(UnreadableImage):
                sizes_hw[place] = read_upright_size(path)
        groups = assign(sizes_hw, np.array(buckets_hw))
    views, last = evaluation_views(preprocessing), machine.channels_last
    reader = SampleReader(None, source, views, no_fields, training=False, channels_last=last)
    reasons: dict[str, str] = {}
    loader = Loader(reader, machine, reasons.update)
    return EvaluationStream(loader, range(len(paths)), batch_size, groups), reasons


def open_images(
    collection: Collection,
    config: DataConfig,
    channels: int,
    background: Any,
    *,
    shortest_px: int | None = None,
    repeats: bool = False,
) -> Source:
    """Return the source of a collection's images, behind the caches that `data.cache` asks for; on all ranks at once.

    shortest_px: as in `Decoder`. repeats: images are read again and again, so that keeping them in memory pays.
    Raises UserError (`model.in_channels`) where images cannot be read so, and (`data.cache.folder`) as
    `DiskCached` does.
    """
    decoder = Decoder(channels, config.max_pixels, background, config.icc, shortest_px)
    images = Images(open_contents(collection), decoder)
    source = DiskCached(images, config.cache) if config.cache.disk_gib > 0 else images
    return keep_in_memory(source, collection, config.cache) if repeats else source


class Data:
    """A collection and how this process reads it: the records of a source, as streams of batches.

    batch_size: of evaluation. run_path: the folder whose unreadable.jsonl lists unreadable samples; None for none.
    fingerprints: what must not change while a run is resumed, by configuration key.
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
        self.collection, self.source = collection, source
        self.fingerprints = {"data.root": collection.fingerprint}
        self.machine, self.batch_size, self._seed = machine, batch_size, seed
        self.unreadable = UnreadableLog(None if run_path is None else run_path / "unreadable.jsonl")

    def read_from(self, source: Source, fingerprints: Mapping[str, str]) -> "Data":
        """Return the same rows read from another source, such as a cache of latents."""
        other = copy.copy(self)
        other.source, other.fingerprints = source, {**self.fingerprints, **fingerprints}
        return other

    def train(
        self, rows: Sequence[int], fields: Fields, views: Views, *, sampler: Sampler | None = None
    ) -> TrainStream:
        """Return the endless stream of training samples; without a sampler, every row once per epoch."""
        sampler = ShuffledSampler(rows, self._seed) if sampler is None else sampler
        return TrainStream(self._loader(fields, views, training=True), sampler, self.unreadable)

    def evaluation(
        self, rows: Sequence[int], fields: Fields, views: Views, *, groups: np.ndarray | None = None
    ) -> EvaluationStream:
        """Return some rows, each exactly once over all ranks; groups: as in `evaluation_batches`."""
        return EvaluationStream(self._loader(fields, views, training=False), rows, self.batch_size, groups, self._seed)

    def prepared(self, rows: np.ndarray, fields: Fields, preprocessing: Mapping[str, Any]) -> EvaluationStream:
        """Return some images as a weight file's preprocessing says: of buckets, each batch in one of them."""
        groups = letterbox_groups(self.collection, rows, preprocessing)
        return self.evaluation(rows, fields, evaluation_views(preprocessing), groups=groups)

    def _loader(self, fields: Fields, views: Views, *, training: bool) -> Loader:
        last = self.machine.channels_last
        reader = SampleReader(self.collection, self.source, views, fields, training=training, channels_last=last)
        hook = next((view.on_device for view in views.values() if isinstance(view, DeviceAugment)), None)
        return Loader(reader, self.machine, self.unreadable.add, hook)
