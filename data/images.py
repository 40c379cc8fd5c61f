"""The images of a collection as a source: encoded bytes from where they are kept, and one decoder for all of them.

source = open_images(collection, config.data, channels=3, background="white")
source.read(7)["image"]          uint8 [3, H, W]
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

import torch

from data.cache.disk import DiskCached
from data.cache.memory import keep_in_memory
from data.collection import Collection
from data.config import DataConfig
from data.decode import Decoder
from data.image_formats import read_file
from data.source import IMAGE, Record, Source

_BLANK_PX = 64  # side of the image that replaces an unreadable one


class Contents(Protocol):
    """The encoded images of a collection's rows. Picklable: loader workers open the store themselves."""

    def read(self, row: int) -> bytes:
        """Return the bytes of a row's image file. Raises UnreadableImage."""

    def name_of(self, row: int) -> str:
        """Return a row's name, for messages."""

    def file_of(self, row: int) -> Path | None:
        """Return the file that holds a row and no other, None where there is no such file."""


class Files:
    """The image files of a collection."""

    def __init__(self, collection: Collection) -> None:
        self.collection = collection

    def read(self, row: int) -> bytes:
        """Return the content of the row's file."""
        return read_file(self.file_of(row))

    def name_of(self, row: int) -> str:
        """Return the row's path."""
        return self.collection.view(row).path

    def file_of(self, row: int) -> Path:
        """Return the row's file."""
        return self.collection.absolute_path(row)


class Images:
    """Decoded images, as `image`, uint8 [channels, H, W]."""

    fingerprints: Mapping[str, str] = {}

    def __init__(self, contents: Contents, decoder: Decoder) -> None:
        self.contents, self.decoder = contents, decoder
        self.name_of, self.file_of = contents.name_of, contents.file_of

    def read(self, row: int) -> Record:
        """Return the decoded image of a row."""
        return {IMAGE: self.decoder(self.contents.read(row), self.name_of(row))}

    def readings(self) -> Mapping[str, float]:
        """Return nothing: no image is kept."""
        return {}

    def blank(self, group: int) -> Record:
        """Return a black image."""
        return {IMAGE: torch.zeros(self.decoder.channels, _BLANK_PX, _BLANK_PX, dtype=torch.uint8)}


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
    images = Images(Files(collection), Decoder.of(channels, config.max_pixels, background, config.icc, shortest_px))
    source = DiskCached(images, config.cache) if config.cache.disk_gib > 0 else images
    return keep_in_memory(source, collection, config.cache, repeats=repeats)
