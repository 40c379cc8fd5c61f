"""A disk cache of decoded images: a source in front of `Images` that decodes each image once.

    source = keep_on_disk(Images(collection, decoder), config.data.cache)
    source.read(7)["image"]        uint8 [3, H, W]

Hits, misses and a full disk give the same pixels. A key is made of the file's state (path, range, size, times, inode)
and the decoder's identity, so an edited file or another decoder never gets old records.
"""

import os
import struct
import time
from pathlib import Path

import torch
from torch import Tensor

from data.config import CacheConfig
from data.images.image_source import Images
from data.images.record_store import LimitedStore, record_key
from data.stream.source import IMAGE, Cached, Record, Source
from utils.io.memo import file_version
from utils.record.logging import get_logger

log = get_logger(__name__)

_YOUNG_SEC = 2  # coarsest file system clock: a second change within one tick leaves the times equal
_HEAD = struct.Struct("<3I")  # height, width, channels; the pixels follow


def keep_on_disk(images: Images, config: CacheConfig) -> Source:
    """Return the images behind a disk cache, or the images themselves if `data.cache.disk_gib` is 0.

    Raises UserError (`data.cache.folder`) if the folder cannot be used.
    """
    return _DiskCached(images, config) if config.disk_gib > 0 else images


class _DiskCached(Cached):
    """The images of a source, cached in a folder."""

    def __init__(self, images: Images, config: CacheConfig) -> None:
        super().__init__(images, "evicted", "refused")
        self._config = config
        self._inputs = images.decoder.identity()
        self._store = LimitedStore(Path(config.folder), round(config.disk_gib * 2**30))

    def readings(self) -> dict[str, float]:
        """Return the hit rate, the size in GiB, and the number of evicted records."""
        gib, evicted = self._store.used_bytes() / 2**30, self.counts()["evicted"]
        return {"l2_hit_rate": self.hit_rate(), "l2_gib": gib, "l2_evicted": evicted}

    def has(self, row: int) -> bool:
        """Return whether a row's image is in the cache."""
        key = self._key(row)
        return key is not None and self._store.has(key)

    def read(self, row: int, key: int = 0) -> Record:
        """Return the image of a row. Raises UnreadableImage."""
        cache_key = self._key(row)  # before reading the file, so that a change in between invalidates the record
        record = None if cache_key is None else self._store.get(cache_key)
        self.count("misses" if record is None else "hits")
        if record is not None:
            shape = _HEAD.unpack(record[: _HEAD.size])
            return {IMAGE: torch.from_numpy(record[_HEAD.size :].reshape(shape)).permute(2, 0, 1)}
        image = self.inner.read(row)[IMAGE]
        if cache_key is not None:
            self._keep(cache_key, image)
        return {IMAGE: image}

    def _key(self, row: int) -> str | None:
        """Return the key of a row's image; None if the file is missing or was changed just now."""
        contents = self.inner.contents
        if (file := contents.file_of(row)) is None:  # remote shards are only replaced together with their index
            digest = contents.collection.row(row).sha256
            return None if digest is None else record_key(self._inputs, digest, contents.name_of(row))
        version = file_version(file.path)
        if version is None or time.time_ns() - version[2] < _YOUNG_SEC * 10**9:
            return None
        return record_key(self._inputs, os.path.abspath(file.path), file.offset, file.length, version)

    def _keep(self, key: str, image: Tensor) -> None:
        """Write the record of an image, uint8 [C, H, W]. After a failed write, warn once and write no more records."""
        if self.counts()["refused"]:
            return
        pixels = image.permute(1, 2, 0).contiguous().numpy()
        try:
            self.count("evicted", self._store.add(key, _HEAD.pack(*pixels.shape) + pixels.tobytes()))
        except OSError as error:
            self.count("refused")
            log.warning(
                "data.cache.folder: %s cannot be written (%s); the run continues and decodes uncached images",
                self._config.folder, error.strerror,
            )  # fmt: skip
