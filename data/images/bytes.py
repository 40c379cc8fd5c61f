"""The images of a collection as a source: encoded bytes from files, shards or a remote store, and one decoder.

source = Images(collection, Decoder(3, max_pixels))
source.read(7)["image"]          uint8 [3, H, W]
"""

import functools
import hashlib
import os
from collections.abc import Iterable
from os.path import join
from typing import TYPE_CHECKING

from data.collection.collection import Collection
from data.images.open import CUT_OFF, NOT_OPENED, read_file
from data.layouts.names import is_remote
from data.stream.source import IMAGE, FileRange, Record, Source, UnreadableImage
from utils.start import open_name

if TYPE_CHECKING:
    from data.images.decode import Decoder

TAR = ".tar"
DAMAGED_SHARD = "the shard has other bytes there"
_OPEN_SHARDS = 64  # open shards per process
_BLANK_PX = 64  # side of the image that replaces an unreadable one


class Files:
    """Encoded images of a collection, each in a file."""

    def __init__(self, collection: Collection) -> None:
        self.collection = collection
        self._root = os.fspath(collection.root)

    def name_of(self, row: int) -> str:
        """Return the path of a row, for messages too."""
        return self.collection.row(row).path

    def file_of(self, row: int) -> FileRange | None:
        """Return the local file of a row, or its range of a shard."""
        return FileRange(join(self._root, self.name_of(row)))

    def read(self, row: int) -> bytes:
        """Return the encoded image of a row. Raises UnreadableImage with the name of the file or shard."""
        return read_file(self.file_of(row).path, self.name_of(row))

    def prefetch(self, rows: Iterable[int]) -> None:
        """Start to read the rows of a batch together; only remote shards gain from it."""


class Shards(Files):
    """Encoded images in local shards."""

    def __init__(self, collection: Collection) -> None:
        super().__init__(collection)
        self._open = functools.lru_cache(_OPEN_SHARDS)(functools.partial(open, mode="rb", buffering=0))

    def name_of(self, row: int) -> str:
        """Return the path of a row, after the path of its shard."""
        view = self.collection.row(row)
        return view.path if view.path.startswith(f"{view.shard}/") else f"{view.shard}/{view.path}"

    def file_of(self, row: int) -> FileRange | None:
        """Return the range of a row in its shard."""
        view = self.collection.row(row)
        return FileRange(join(self._root, view.shard), view.offset, view.length)

    def read(self, row: int) -> bytes:
        """Return the encoded image of a row."""
        path, offset, length = self.file_of(row)
        try:
            shard = self._open(path)  # stays open while it is referenced
            content = os.pread(shard.fileno(), length, offset)
        except OSError as error:
            raise UnreadableImage(self.name_of(row), NOT_OPENED, f"{type(error).__name__}: {error.strerror}") from error
        return self.check(row, content)

    def check(self, row: int, content: bytes) -> bytes:
        """Return the content. Raises UnreadableImage if it is cut off, or its SHA-256 is not the manifest's."""
        view = self.collection.row(row)
        if len(content) < view.length:
            detail = f"the shard ends after {len(content):,} of {view.length:,} bytes"
            raise UnreadableImage(self.name_of(row), CUT_OFF, detail)
        if view.sha256 not in (None, digest := hashlib.sha256(content).hexdigest()):
            detail = f"SHA-256 {digest}, not {view.sha256} of the manifest; copy the shard again, or pack again"
            raise UnreadableImage(self.name_of(row), DAMAGED_SHARD, detail)
        return content


def member_key(path: str) -> str:
    """Return the member name (without suffix) for a path in a packed shard, which is unique."""
    return hashlib.sha256(path.encode()).hexdigest()[:20]


def open_contents(collection: Collection) -> Files:
    """Return the encoded images of a collection."""
    if is_remote(str(collection.root)):
        return open_name("data.images.remote_shards:RemoteShards")(collection)
    return Shards(collection) if collection.is_packed else Files(collection)


class Images(Source):
    """Decoded images of a collection, as `image`, uint8 [channels, H, W]."""

    def __init__(self, collection: Collection, decoder: "Decoder") -> None:
        self.contents = open_contents(collection)
        self.decoder = decoder
        self.prefetch = self.contents.prefetch

    def read(self, row: int, key: int = 0, group: int = 0) -> Record:
        """Return the decoded image of a row. Raises UnreadableImage."""
        import torch  # not above: who reads the bytes of images needs no torch

        pixels = self.decoder(self.contents.read(row), self.contents.name_of(row))
        return {IMAGE: torch.from_numpy(pixels).permute(2, 0, 1)}

    def blank(self, group: int) -> Record:
        """Return a black image."""
        import torch

        return {IMAGE: torch.zeros(self.decoder.channels, _BLANK_PX, _BLANK_PX, dtype=torch.uint8)}
