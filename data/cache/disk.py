"""Decoded images on a local disk: a source in front of `Images` that decodes each image once.

    source = DiskCached(Images(Files(collection), decoder), config.data.cache)
    source.read(7)["image"]        uint8 [3, H, W]

A hit, a miss and a full disk give the same pixels: with `format` raw those of the decoder; with jpeg or webp those of
the stored form, which a miss decodes as well. data/cache/key.py says what a record is found by.
"""

import hashlib
import io
import math
import struct
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Protocol

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from data.cache.key import image_key, link_key, recipe_of
from data.cache.monitor import Counters
from data.cache.store import COUNTED, Store, open_store
from data.config import CacheConfig
from data.decode import Decoder
from data.source import IMAGE, Contents, FileRange, Record, Source

_RAW, _ENCODED = 0, 1
_HEAD = struct.Struct("<4I")  # raw or encoded, height, width, channels; the pixels or the encoded file follow
_LONGEST_PX = 16_383  # side of a WebP; larger images are stored raw


class FileSource(Source, Protocol):
    """A source that decodes files: `data.images.Images`."""

    contents: Contents
    decoder: Decoder


class DiskCached:
    """The images of a source, kept in LMDB. Picklable: each process opens the store itself.

    counts: of this process and its loader workers: hits, misses, and COUNTED.
    Raises UserError (`data.cache.folder`) where the folder cannot be used.
    """

    fingerprints: Mapping[str, str] = {}

    def __init__(self, images: FileSource, config: CacheConfig) -> None:
        self.images, self._config = images, config
        self.decoder = images.decoder
        self._recipe, self._folder = recipe_of(images.decoder, config), Path(config.folder)
        self.name_of, self.blank = images.name_of, images.blank
        self.counts = Counters("hits", "misses", *COUNTED)
        self._store()

    def _store(self) -> Store:
        mib = math.ceil(self._config.disk_gib * 1024)
        return open_store(self._folder, mib << 20, self.counts)

    def prefetch(self, rows: Iterable[int]) -> None:
        """Prefetch the rows whose images are not in the cache."""
        self.images.prefetch(row for row in rows if not self.has(row))

    def file_of(self, row: int) -> FileRange | None:
        """Return the file to read ahead: None where the row's image is in the cache."""
        return None if self.has(row) else self.images.file_of(row)

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
        digest = self._find_digest(row, link_key(self.images.file_of(row)))
        return digest is not None and self._store().has(self._key(row, digest))

    def read(self, row: int) -> Record:
        """Return the image of a row. Raises UnreadableImage."""
        store, link = self._store(), link_key(self.images.file_of(row))
        digest = self._find_digest(row, link)
        record = None if digest is None else store.get(self._key(row, digest))
        self.counts.add("misses" if record is None else "hits")
        return {IMAGE: self._read_content(row, link) if record is None else self._unpack(record, row)}

    def fill(self, row: int) -> None:
        """Put the image of a row into the cache, and wait until the store takes it. Raises UnreadableImage."""
        self._read_content(row, link_key(self.images.file_of(row)), wait=True)

    def stored_bytes(self, row: int) -> int:
        """Return the bytes that the image of a row takes in the cache. Raises UnreadableImage."""
        return len(self._pack(self.images.read(row)[IMAGE]))

    def _find_digest(self, row: int, link: str | None) -> bytes | None:
        """Return the SHA-256 of a row's content where it is known without reading it."""
        found = None if link is None else self._store().get(link)
        return self.images.contents.digest_of(row) if found is None else found.tobytes()

    def _read_content(self, row: int, link: str | None, *, wait: bool = False) -> Tensor:
        """Return the image of a row by the content of its file, decoded where no file had the same content.

        link: of the file before it is read, so that a file that changes meanwhile is never found by it.
        """
        store, content = self._store(), self.images.contents.read(row)
        digest = hashlib.sha256(content).digest()
        key = self._key(row, digest)
        record = store.get(key)
        if record is None:
            image = self.images.decoder(content, self.name_of(row))
            packed = self._pack(image)
            store.put(key, packed, wait=wait)
        if link is not None:
            store.put(link, digest, wait=wait)
        if record is None and _HEAD.unpack_from(packed)[0] == _RAW:
            return image
        return self._unpack(np.frombuffer(packed, np.uint8) if record is None else record, row)

    def _key(self, row: int, digest: bytes) -> str:
        return image_key(digest, self.name_of(row), self._recipe)

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
            return self.images.decoder(content.tobytes(), self.name_of(row))
        return torch.from_numpy(content.reshape(shape)).permute(2, 0, 1)
