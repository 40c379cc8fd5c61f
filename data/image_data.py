"""The data of a script: one object, made once and asked for training and evaluation streams.

collection = load_collection(config.data)
source = open_images(collection, config.data, channels=3, background="white")
data = ImageData(collection, source, runtime, seed=0, batch_size=128, run_path=run)
train = data.train(rows, fields, training_views(augment))
val = data.prepared(data.collection.rows("val"), fields, preprocessing)
"""

import copy
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from data.buckets import assign, letterbox_groups
from data.collection import Collection, index_collection, open_collection
from data.config import DataConfig, GlyphsConfig
from data.decode import Decoder, decoder_versions
from data.device_augment import DeviceAugment
from data.glyphs import draw_glyphs, glyphs_ready
from data.image_formats import UnreadableImage
from data.images import Files, Images
from data.loader import EvaluationLoader, Fields, SampleReader, TrainLoader, UnreadableLog, no_fields
from data.pixels import has_alpha, read_upright_size
from data.rows import spread
from data.source import Source
from data.stream import EvaluationBatches, Sampler, ShuffledSampler
from data.transforms import ByGroup, Transform, Views, evaluation_views, in_buckets
from utils.canvas import background_of
from utils.contracts import Batch, DeviceHook, Machine
from utils.ranks import distributed
from utils.record.logging import get_logger
from utils.record.progress import counting

log = get_logger(__name__)

CACHE = Path("outputs/cache/collections")
_LOOKED_AT = 500  # images whose headers are read at a start


def load_collection(config: DataConfig) -> Collection:
    """Index the collection on rank 0 (drawing the glyphs first where they are missing) and open it on every rank."""

    def index() -> str:
        if isinstance(config, GlyphsConfig) and not glyphs_ready(Path(config.root)):
            log.info("drawing the glyph collection into %s (once, some seconds)", config.root)
            with counting("drawing the glyphs") as progress:
                draw_glyphs(Path(config.root), progress)
        return str(index_collection(config.root, validation_fraction=config.validation_fraction, cache=CACHE))

    collection = open_collection(config.root, Path(distributed.rank_zero_call(index)))
    log.debug("collection: %s, read by %s", describe_collection(collection), decoder_versions())
    return collection


def describe_transparency(collection: Collection, background: Any) -> str:
    """Return how many images have an alpha channel: of all as the manifest states, or looked up in the headers of at
    most some files; "" for none.
    """
    rows = collection.rows("train")
    if "transparent" in collection.table.column_names:
        stated = collection.column("transparent")[rows]
        count, looked_at = int(np.nansum(stated)), np.count_nonzero(~np.isnan(stated))
    else:
        looked_up = spread(rows, _LOOKED_AT)
        count = sum(has_alpha(collection.absolute_path(int(row))) for row in looked_up) if distributed.is_main() else 0
        looked_at = len(looked_up)
    if count == 0:
        return ""
    of = f"{looked_at:,} looked at" if looked_at < len(rows) else f"{looked_at:,}"
    what = "their alpha is dropped" if background == "drop" else f"put on {background}"
    return f"; {count:,} of {of} have an alpha channel, {what} (data.background)"


def describe_collection(collection: Collection) -> str:
    """Return a collection in a line: its root, splits and classes."""
    train, val = (f"{len(collection.rows(split)):,}" for split in ("train", "val"))
    classes = len(collection.class_names("train"))
    labels = f" of {classes} classes" if classes else ", without labels"
    return f"{collection.root}: {train} training and {val} validation images{labels}"


def device_hook(views: Mapping[str, Transform], on_device: DeviceHook | None) -> DeviceHook | None:
    """Return what changes a batch on the device: the views' own part of the augmentation first, then `on_device`."""
    hooks = [view.on_device for view in views.values() if isinstance(view, DeviceAugment)]
    hooks += [] if on_device is None else [on_device]

    def apply(batch: Batch) -> Batch:
        for hook in hooks:
            batch = hook(batch)
        return batch

    return apply if hooks else None


class _FileRow(NamedTuple):
    path: str
    weight: float = 1.0


class ListedFiles:
    """Image files that are no collection, in the order of the list; as `data.images.Files` reads them."""

    root = ""

    def __init__(self, paths: Sequence[Path]) -> None:
        self.paths = list(paths)

    def view(self, row: int) -> _FileRow:
        """Return a file's path and weight."""
        return _FileRow(str(self.paths[row]))


class Reasons:
    """Why files could not be read, by path."""

    def __init__(self) -> None:
        self.of: dict[str, str] = {}

    def add(self, problems: Sequence[tuple[str, str]]) -> None:
        """Take the problems of a batch."""
        self.of.update(problems)


def split_by_bucket(
    paths: Sequence[Path], preprocessing: Mapping[str, Any]
) -> list[tuple[Mapping[str, Any], list[Path]]]:
    """Return image files by the bucket of the nearest ratio, each with the preprocessing in it; unreadable ones in one.

    All are in one where the preprocessing states no buckets.
    """
    each = in_buckets(preprocessing)
    if len(each) == 1:
        return [(each[0], list(paths))]
    groups = assign(np.array([_upright_size(path) for path in paths]), np.array(preprocessing["buckets_hw"]))
    parts = [(own, [path for path, group in zip(paths, groups) if group == n]) for n, own in enumerate(each)]
    return [(own, some) for own, some in parts if some]


def _upright_size(path: Path) -> tuple[int, int]:
    """Return the size of an image file, (height, width); of an unreadable one, that of a square."""
    try:
        return read_upright_size(path)
    except UnreadableImage:
        return 1, 1


def load_files(
    paths: Sequence[Path], preprocessing: Mapping[str, Any], machine: Machine, *, max_pixels: int, batch_size: int
) -> tuple[EvaluationLoader, Reasons]:
    """Return a loader of image files as evaluation prepares them, in order, and the reasons of those unreadable.

    It is read by the workers of the training loader. The last batch is padded with further rows of weight 0.
    """
    files, reasons = ListedFiles(paths), Reasons()
    decoder = Decoder(
        preprocessing["channels"], max_pixels, background_of(preprocessing), preprocessing.get("icc", False),
        preprocessing.get("shortest_px"),
    )  # fmt: skip
    views = evaluation_views(preprocessing)
    source = Images(Files(files), decoder)
    reader = SampleReader(files, source, views, no_fields, training=False, channels_last=machine.channels_last)
    batches = EvaluationBatches(range(len(paths)), seed=0, batch_size=batch_size, rank=0, world_size=1)
    return EvaluationLoader(reader, batches, machine, unreadable=reasons), reasons


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
        self.collection, self.source = collection, source
        self.fingerprints = {"data.root": collection.fingerprint, **source.fingerprints}
        self.machine, self.batch_size, self._seed = machine, batch_size, seed
        self.unreadable = UnreadableLog(None if run_path is None else run_path / "unreadable.jsonl")

    def read_from(self, source: Source) -> "ImageData":
        """Return the same data read from another source, such as a cache."""
        other = copy.copy(self)
        other.source, other.fingerprints = source, {**self.fingerprints, **source.fingerprints}
        return other

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
        return TrainLoader(reader, sampler, self.machine, seed=self._seed, unreadable=self.unreadable, on_device=hook)

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
            rows, seed=self._seed, batch_size=self.batch_size, rank=distributed.rank(),
            world_size=distributed.world_size(), groups=groups,
        )  # fmt: skip
        reader, hook = self._reader(fields, views, training=False), device_hook(views, on_device)
        return EvaluationLoader(reader, batches, self.machine, unreadable=self.unreadable, on_device=hook)

    def prepared(
        self,
        rows: np.ndarray,
        fields: Fields,
        preprocessing: Mapping[str, Any],
        make: Callable[[Mapping[str, Any]], Views] = evaluation_views,
    ) -> EvaluationLoader:
        """Return a loader of some rows as a weight file's preprocessing says: of buckets, each batch in one of them.

        make: from the preprocessing in one bucket to views.
        """
        views = ByGroup.views(in_buckets(preprocessing), make)
        return self.evaluation(rows, fields, views, groups=letterbox_groups(self.collection, rows, preprocessing))

    def _reader(self, fields: Fields, views: Mapping[str, Transform], *, training: bool) -> SampleReader:
        return SampleReader(
            self.collection, self.source, views, fields, training=training, channels_last=self.machine.channels_last
        )
