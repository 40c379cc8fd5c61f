"""The images of a collection as a source: encoded bytes from where they are kept, and one decoder for all of them.

source = open_images(collection, config.data, channels=3, background="white")
source.read(7)["image"]          uint8 [3, H, W]
"""

import os
from collections.abc import Iterable, Mapping
from typing import Any

import torch

from data.cache.disk import DiskCached
from data.cache.memory import keep_in_memory
from data.collection import Collection
from data.config import DataConfig
from data.decode import Decoder
from data.image_formats import read_file
from data.remote import is_remote
from data.shards import RemoteContents, ShardContents
from data.source import IMAGE, Contents, FileRange, Record, Source
from data.table import is_packed

_BLANK_PX = 64  # side of the image that replaces an unreadable one


class Files:
    """The image files of a collection."""

    def __init__(self, collection: Collection) -> None:
        self.collection, self._root = collection, os.fspath(collection.root)

    def read(self, row: int) -> bytes:
        """Return the content of the row's file."""
        return read_file(self.file_of(row).path)

    def prefetch(self, rows: Iterable[int]) -> None:
        """Do nothing: `file_of` lets files be read ahead."""

    def name_of(self, row: int) -> str:
        """Return the row's path."""
        return self.collection.view(row).path

    def file_of(self, row: int) -> FileRange:
        """Return the row's file."""
        return FileRange(os.path.join(self._root, self.collection.view(row).path))

    def digest_of(self, row: int) -> None:
        """Return None: a file may be edited."""


class Images:
    """Decoded images, as `image`, uint8 [channels, H, W]."""

    fingerprints: Mapping[str, str] = {}

    def __init__(self, contents: Contents, decoder: Decoder) -> None:
        self.contents, self.decoder = contents, decoder
        self.name_of, self.file_of, self.prefetch = contents.name_of, contents.file_of, contents.prefetch

    def read(self, row: int) -> Record:
        """Return the decoded image of a row."""
        return {IMAGE: self.decoder(self.contents.read(row), self.name_of(row))}

    def readings(self) -> Mapping[str, float]:
        """Return nothing: no image is kept."""
        return {}

    def blank(self, group: int) -> Record:
        """Return a black image."""
        return {IMAGE: torch.zeros(self.decoder.channels, _BLANK_PX, _BLANK_PX, dtype=torch.uint8)}


def open_contents(collection: Collection) -> Contents:
    """Return the encoded images of a collection, which are files or parts of shards."""
    if is_remote(str(collection.root)):
        return RemoteContents(collection)
    return ShardContents(collection) if is_packed(collection.table.schema) else Files(collection)


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
    return keep_in_memory(source, collection, config.cache, repeats=repeats)
