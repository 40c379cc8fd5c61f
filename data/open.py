"""Open data: from a configuration to a collection, a source of its images, and streams of batches. Read this first.

    collection = load_collection(config.data)         # data/load.py
    source = open_images(collection, config.data, preprocessing)
    data = Data(collection, source, runtime, seed=0, batch_size=128, run_path=run)
    train = data.train(rows, fields, training_views(augment))
    val = data.prepared(collection.rows("val"), fields, preprocessing)

The path of an image:

    position -> draw    Sampler.draw: a row of the collection, and a random key    stream/order.py
    draw -> record      Source.read: the caches, then Images: bytes, the Decoder   stream/source.py, images/
    record -> views     named transforms of the image                              augment/steps.py
    views -> sample     Loader.read, in a worker; fields add labels and tags       stream/loader.py
    samples -> batch    collate                                                    stream/batch.py
    batch -> device     TrainStream, EvaluationStream; `prepare`: hooks of views   stream/loader.py
"""

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from numpy import ndarray

from data.augment.steps import IMAGES, evaluation_views
from data.collection.collection import Collection
from data.config import DataConfig
from data.images.bytes import Images
from data.images.caches import Pool, can_cut, keep_in_memory
from data.images.prepare import decoder_of
from data.stream.loader import EvaluationStream, Fields, Loader, TrainStream, UnreadableLog
from data.stream.order import Sampler, Views, build_sampler
from data.stream.source import Source
from utils.contracts import LoaderMachine
from utils.io.files import Values
from utils.start import open_name


def open_images(collection: Collection, config: DataConfig, preprocessing: Values, *, repeats: bool = False) -> Source:
    """Return the source of a collection's images, behind the caches of `data.cache`. All ranks must call it together.

    preprocessing: of a weight file. repeats: images are read several times, so a memory cache pays.
    Raises UserError: `model.in_channels` if it is not 1 or 3; `data.cache.folder` as `keep_on_disk` does.
    """
    decoder = decoder_of(preprocessing, config.max_pixels, config.background)
    source = Images(collection, decoder)
    if config.cache.disk_gib > 0:
        source = open_name("data.images.disk_cache:keep_on_disk")(source, config.cache)
    return keep_in_memory(source, collection, config.cache) if repeats else source


@dataclass(eq=False)
class Data:
    """A collection as streams of batches, read from a source.

    batch_size: for evaluation. run_path: the folder for unreadable.jsonl, the list of unreadable samples; or None.
    dry_run: samples are images and captions, even where a run reads cached latents and embeddings.
    fingerprints: values by configuration key that must not change when a run is resumed.
    """

    collection: Collection
    source: Source
    machine: LoaderMachine
    seed: int
    batch_size: int
    run_path: Path | None
    dry_run: bool = False

    def __post_init__(self) -> None:
        self.fingerprints = {"data.root": self.collection.seen}
        unwritten = self.dry_run or self.run_path is None
        self.unreadable = UnreadableLog(None if unwritten else self.run_path / "unreadable.jsonl")

    def read_from(self, source: Source, fingerprints: Mapping[str, str]) -> "Data":
        """Return a copy that reads from another source, such as a cache of latents."""
        other = copy.copy(self)
        other.source = source
        other.fingerprints = {**self.fingerprints, **fingerprints}
        return other

    def train(
        self, rows: Sequence[int], fields: Fields, views: Views, *, sampler: Sampler | None = None
    ) -> TrainStream:
        """Return the endless stream of training samples; without a sampler, every row once per epoch."""
        sampler = build_sampler("shuffled", rows, self.collection, self.seed) if sampler is None else sampler
        loader = self._loader(fields, views, training=True)
        pool = getattr(self.source, "records", None)
        device = self.machine.device
        if isinstance(pool, Pool) and getattr(views.get(IMAGES), "only_cuts", False) and can_cut(device):
            open_windows = open_name("data.augment.windows:Windows")
            loader = replace(loader, windows=open_windows(pool, views, device, np.asarray(rows)))
        return TrainStream(loader, sampler, self.unreadable)

    def evaluation(
        self, rows: Sequence[int], fields: Fields, views: Views, *, groups: ndarray | None = None
    ) -> EvaluationStream:
        """Return a stream of `rows`, each exactly once over all ranks; groups: as in `evaluation_batches`."""
        return EvaluationStream(self._loader(fields, views, training=False), rows, self.batch_size, groups, self.seed)

    def prepared(self, rows: ndarray, fields: Fields, preprocessing: Values) -> EvaluationStream:
        """Return a stream of `rows` with the preprocessing of a weight file."""
        return self.evaluation(rows, fields, evaluation_views(preprocessing))

    def _loader(self, fields: Fields, views: Views, *, training: bool) -> Loader:
        return Loader(self.collection, self.source, views, fields, self.machine, self.unreadable.add, training=training)
