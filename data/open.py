"""Open data: from a configuration to a collection, the source of its records, and streams of batches. Read this first.

collection = load_collection(config.data)
source = open_images(collection, config.data, channels=3, background="white")
data = Data(collection, source, runtime, seed=0, batch_size=128, run_path=run)
train = data.train(rows, fields, training_views(augment))
val = data.prepared(collection.rows("val"), fields, preprocessing)

    collection -> sampler -> draws -> source -> views -> fields -> collate -> device -> hook
                  (stream.py)         (source.py)       (loader.py)
"""

import copy
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from data.buckets import assign, letterbox_groups
from data.cache.disk import DiskCached
from data.cache.memory import keep_in_memory
from data.collection import Collection, index_collection, open_collection
from data.config import DataConfig, GlyphsConfig
from data.decode import Decoder, decoder_versions
from data.device_augment import DeviceAugment
from data.glyphs import draw_glyphs, glyphs_ready
from data.image_formats import UnreadableImage
from data.images import Images, ListedFiles, open_contents
from data.loader import EvaluationStream, Fields, Loader, SampleReader, TrainStream, UnreadableLog, no_fields
from data.pixels import has_alpha, read_upright_size
from data.rows import spread
from data.source import Source
from data.stream import Policy, Sampler, ShuffledSampler
from data.transforms import ByGroup, Views, evaluation_views, in_buckets
from utils.canvas import background_of
from utils.contracts import Machine
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


def split_by_bucket(
    paths: Sequence[Path], preprocessing: Mapping[str, Any]
) -> list[tuple[Mapping[str, Any], list[Path]]]:
    """Return image files by the bucket of the nearest ratio, each with the preprocessing in it; unreadable ones in a
    square's. All are in one where the preprocessing states no buckets.
    """
    each = in_buckets(preprocessing)
    if len(each) == 1:
        return [(each[0], list(paths))]
    sizes_hw = []
    for path in paths:
        try:
            sizes_hw.append(read_upright_size(path))
        except UnreadableImage:
            sizes_hw.append((1, 1))
    groups = assign(np.array(sizes_hw), np.array(preprocessing["buckets_hw"]))
    parts = [(own, [path for path, group in zip(paths, groups) if group == n]) for n, own in enumerate(each)]
    return [(own, some) for own, some in parts if some]


def load_files(
    paths: Sequence[Path], preprocessing: Mapping[str, Any], machine: Machine, *, max_pixels: int, batch_size: int
) -> tuple[EvaluationStream, Mapping[str, str]]:
    """Return the batches of image files as evaluation prepares them, in order, and the reasons of those unreadable.

    They are read by the workers of the training loader. The last batch is padded with further rows of weight 0.
    """
    decoder = Decoder(
        preprocessing["channels"], max_pixels, background_of(preprocessing), preprocessing.get("icc", False),
        preprocessing.get("shortest_px"),
    )  # fmt: skip
    source, views = Images(ListedFiles(paths), decoder), evaluation_views(preprocessing)
    reader = SampleReader(None, source, views, no_fields, training=False, channels_last=machine.channels_last)
    reasons: dict[str, str] = {}
    loader = Loader(reader, machine, reasons.update)
    return EvaluationStream(loader, range(len(paths)), Policy(0, batch_size, batch_size)), reasons


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
    Raises UserError (`model.in_channels`, `data.icc`) where images cannot be read so, and (`data.cache.folder`) as
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
        return TrainStream(self._loader(fields, views, training=True), sampler, self._seed, self.unreadable)

    def evaluation(
        self, rows: Sequence[int], fields: Fields, views: Views, *, groups: np.ndarray | None = None
    ) -> EvaluationStream:
        """Return some rows, each exactly once over all ranks; groups: as in `evaluation_batches`."""
        world = distributed.world_size()
        policy = Policy(self._seed, world * self.batch_size, self.batch_size, distributed.rank(), world)
        return EvaluationStream(self._loader(fields, views, training=False), rows, policy, groups)

    def prepared(
        self,
        rows: np.ndarray,
        fields: Fields,
        preprocessing: Mapping[str, Any],
        make: Callable[[Mapping[str, Any]], Views] = evaluation_views,
    ) -> EvaluationStream:
        """Return some images as a weight file's preprocessing says: of buckets, each batch in one of them.

        make: from the preprocessing in one bucket to views.
        """
        views = ByGroup.views(in_buckets(preprocessing), make)
        return self.evaluation(rows, fields, views, groups=letterbox_groups(self.collection, rows, preprocessing))

    def _loader(self, fields: Fields, views: Views, *, training: bool) -> Loader:
        channels_last = self.machine.channels_last
        reader = SampleReader(
            self.collection, self.source, views, fields, training=training, channels_last=channels_last
        )
        hook = next((view.on_device for view in views.values() if isinstance(view, DeviceAugment)), None)
        return Loader(reader, self.machine, self.unreadable.add, hook)
