"""The images of a collection as a source: encoded bytes from where they are kept, and one decoder for all of them.

source = Images(open_contents(collection), Decoder(3, max_pixels))
source.read(7)["image"]          uint8 [3, H, W]
"""

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Protocol

import torch

from data.collection import Collection
from data.decode import Decoder
from data.image_formats import read_file
from data.remote import is_remote
from data.shards import RemoteContents, ShardContents
from data.source import IMAGE, FileRange, Record
from data.table import is_packed

_BLANK_PX = 64  # side of the image that replaces an unreadable one


class Contents(Protocol):
    """The encoded images of rows. Picklable: loader workers open the store themselves."""

    def read(self, row: int) -> bytes:
        """Return the bytes of a row's image file. Raises UnreadableImage."""

    def name_of(self, row: int) -> str:
        """Return a row's name, for messages."""


class Files:
    """The image files of a collection."""

    def __init__(self, collection: Collection) -> None:
        self.collection, self._root = collection, os.fspath(collection.root)

    def read(self, row: int) -> bytes:
        """Return the content of the row's file."""
        return read_file(self.file_of(row).path, self.name_of(row))

    def name_of(self, row: int) -> str:
        """Return the row's path."""
        return self.collection.view(row).path

    def file_of(self, row: int) -> FileRange:
        """Return the row's file."""
        return FileRange(os.path.join(self._root, self.name_of(row)))


class ListedFiles(Files):
    """Image files that are no collection; a row is a place in the list."""

    def __init__(self, paths: Sequence[Path]) -> None:
        self._root, self._paths = "", list(map(str, paths))

    def name_of(self, row: int) -> str:
        """Return a file's path."""
        return self._paths[row]


class Images:
    """Decoded images, as `image`, uint8 [channels, H, W]."""

    def __init__(self, contents: Contents, decoder: Decoder) -> None:
        self.inner, self.decoder = contents, decoder

    def read(self, row: int, key: int = 0) -> Record:
        """Return the decoded image of a row. Raises UnreadableImage."""
        return {IMAGE: self.decoder(self.inner.read(row), self.inner.name_of(row))}

    def blank(self, group: int) -> Record:
        """Return a black image."""
        return {IMAGE: torch.zeros(self.decoder.channels, _BLANK_PX, _BLANK_PX, dtype=torch.uint8)}


def open_contents(collection: Collection) -> Contents:
    """Return the encoded images of a collection, which are files or parts of shards."""
    if is_remote(str(collection.root)):
        return RemoteContents(collection)
    return ShardContents(collection) if is_packed(collection.table.schema) else Files(collection)
