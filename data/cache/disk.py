"""Decoded images on a local disk: a source in front of `Images` that decodes each image once.

    source = DiskCached(Images(Files(collection), decoder), config.data.cache)
    source.read(7)["image"]        uint8 [3, H, W]

A hit, a miss and a full disk give the same pixels: with `format` raw those of the decoder; with jpeg or webp those of
the stored form, which a miss decodes as well. An image is found in two steps, so that neither a file that was edited
nor an old manifest ever gives a stale one:

    file (path, range, version) -> SHA-256 of its content      as it was read, never as a manifest states it
    SHA-256, suffix, recipe -> the image                       the recipe: all that pixels depend on beside the content

A file that was copied, moved or touched is read and hashed again, and its image is found by the second key.
"""

import hashlib
import io
import math
import os
import struct
import time
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import PIL
import torch
from PIL import Image
from torch import Tensor

from data.cache.store import COUNTED, Store, open_store
from data.config import CacheConfig
from data.images import Images
from data.source import IMAGE, Counters, OnDisk, Record
from data.tensor_store import record_key
from utils.io.memo import file_version

_VERSION = 2  # of the form of records and keys: another number decodes everything again
_YOUNG_SEC = 2  # coarsest clock of a file system: within one tick, a second change of a file leaves its times equal
_RAW, _ENCODED = 0, 1
_HEAD = struct.Struct("<4I")  # raw or encoded, height, width, channels; the pixels or the encoded file follow
_LONGEST_PX = 16_383  # side of a WebP; larger images are stored raw


class DiskCached:
    """The images of a source, kept in LMDB. Picklable: each process opens the store itself.

    counts: of this process and its loader workers: hits, misses, and COUNTED.
    Raises UserError (`data.cache.folder`) where the folder cannot be used.
    """

    def __init__(self, images: Images, config: CacheConfig) -> None:
        self.inner, self._config = images, config
        stored = "raw" if config.format == "raw" else f"{config.format} {config.quality} by pillow {PIL.__version__}"
        self._recipe = f"{images.decoder.identity()}; {stored}"
        self.blank = images.blank
        self.counts = Counters("hits", "misses", *COUNTED)
        self._store()

    def _store(self) -> Store:
        mib = math.ceil(self._config.disk_gib * 1024)
        return open_store(Path(self._config.folder), mib << 20, self.counts)

    def readings(self) -> Mapping[str, float]:
        """Return the share of reads that the cache has answered, the GiB that all its records take, how many made room
        for others, were not written because too much was waiting, and are waiting.
        """
        counts = self.counts.totals()
        return {
            "l2_hit_rate": counts["hits"] / max(1, counts["hits"] + counts["misses"]),
            "l2_gib": self._store().used_bytes() / 2**30,
            "l2_evicted": counts["evicted"],
            "l2_dropped": counts["dropped"],
            "l2_waiting": counts["queued"] - counts["settled"],
        }

    def has(self, row: int) -> bool:
        """Return whether a row's image is in the cache, and found without reading its file."""
        digest = self._find_digest(row, self._file_key(row))
        return digest is not None and self._store().has(self._image_key(row, digest))

    def read(self, row: int) -> Record:
        """Return the image of a row. Raises UnreadableImage."""
        file_key = self._file_key(row)
        digest = self._find_digest(row, file_key)
        record = None if digest is None else self._store().get(self._image_key(row, digest))
        self.counts.add("misses" if record is None else "hits")
        return {IMAGE: self._read_content(row, file_key) if record is None else self._unpack(record, row)}

    def fill(self, row: int) -> None:
        """Put the image of a row into the cache, and wait until the store takes it. Raises UnreadableImage."""
        self._read_content(row, self._file_key(row), wait=True)

    def stored_bytes(self, row: int) -> int:
        """Return the bytes that the image of a row takes in the cache. Raises UnreadableImage."""
        return len(self._pack(self.inner.read(row)[IMAGE]))

    def _file_key(self, row: int) -> str | None:
        """Return the key of the hash of the row's file, or of its part of one; None where it was changed just now."""
        if not isinstance(contents := self.inner.inner, OnDisk):
            return None
        file = contents.file_of(row)
        version = file_version(file.path)  # None for no file: whoever reads it says why
        if version is None or time.time_ns() - version[2] < _YOUNG_SEC * 10**9:
            return None
        return record_key(_VERSION, "file", os.path.abspath(file.path), file.offset, file.length, version)

    def _find_digest(self, row: int, file_key: str | None) -> bytes | None:
        """Return the SHA-256 of a row's content where it is known without reading it."""
        if file_key is not None:
            found = self._store().get(file_key)
            return None if found is None else found.tobytes()
        contents = self.inner.inner
        return None if isinstance(contents, OnDisk) else contents.digest_of(row)

    def _read_content(self, row: int, file_key: str | None, *, wait: bool = False) -> Tensor:
        """Return the image of a row by the content of its file, decoded where no file had the same content.

        file_key: of the file before it is read, so that a file that changes meanwhile is never found by it.
        """
        store, content = self._store(), self.inner.inner.read(row)
        digest = hashlib.sha256(content).digest()
        key = self._image_key(row, digest)
        if (record := store.get(key)) is not None:
            image = self._unpack(record, row)
        else:
            image = self.inner.decoder(content, self.inner.inner.name_of(row))
            packed = self._pack(image)
            store.put(key, packed, wait=wait)
            if _HEAD.unpack_from(packed)[0] == _ENCODED:
                image = self._unpack(np.frombuffer(packed, np.uint8), row)
        if file_key is not None:
            store.put(file_key, digest, wait=wait)
        return image

    def _image_key(self, row: int, digest: bytes) -> str:
        """Return the key of an image. digest: SHA-256 of its file's content. The file's name may tell its format."""
        suffix = os.path.splitext(self.inner.inner.name_of(row))[1].lower()
        return record_key(_VERSION, digest.hex(), suffix, self._recipe)

    def _pack(self, image: Tensor) -> bytes:
        """Return an image, uint8 [C, H, W], in its stored form."""
        pixels = image.permute(1, 2, 0).contiguous().numpy()
        if self._config.format == "raw" or max(pixels.shape) > _LONGEST_PX:
            return _HEAD.pack(_RAW, *pixels.shape) + pixels.tobytes()
        file = io.BytesIO()
        picture = Image.fromarray(pixels[..., 0] if pixels.shape[2] == 1 else pixels)
        picture.save(file, self._config.format, quality=self._config.quality)
        return _HEAD.pack(_ENCODED, *pixels.shape) + file.getvalue()

    def _unpack(self, record: np.ndarray, row: int) -> Tensor:
        """Return the image of a stored form, uint8 [C, H, W]."""
        kind, *shape = _HEAD.unpack(record[: _HEAD.size])
        content = record[_HEAD.size :]
        if kind == _ENCODED:
            return self.inner.decoder(content.tobytes(), self.inner.inner.name_of(row))
        return torch.from_numpy(content.reshape(shape)).permute(2, 0, 1)
