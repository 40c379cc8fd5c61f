"""The images of a collection as a source: encoded bytes from files, shards or a store, and one decoder for all of them.

source = Images(open_contents(collection), Decoder(3, max_pixels))
source.read(7)["image"]          uint8 [3, H, W]
"""

import functools
import hashlib
import os
import time
from bisect import bisect_right
from collections.abc import Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Protocol

import torch
from fsspec.spec import AbstractFileSystem

from data.collection.collection import Collection, Row
from data.images.decode import Decoder
from data.images.image_formats import CUT_OFF, NOT_OPENED, read_file
from data.layouts.remote import is_remote, open_store
from data.stream.source import IMAGE, FileRange, Record, UnreadableImage, join_ranges

TAR = ".tar"
HEADER_BYTES = 512  # of a member of a tar file, right before its content
MISPLACED = "the shard holds something else there"
NO_ANSWER = "the store does not give the bytes"
_OPEN_SHARDS = 64  # that a process keeps open
_PATIENCE_SEC = 120  # for a batch, the store's own attempts included
_BLANK_PX = 64  # side of the image that replaces an unreadable one


class Contents(Protocol):
    """The encoded images of rows."""

    def read(self, row: int) -> bytes:
        """Return the bytes of a row's image file. Raises UnreadableImage."""

    def name_of(self, row: int) -> str:
        """Return a row's name, for messages."""


class ListedFiles:
    """Image files that are no collection; a row is a place in the list."""

    def __init__(self, paths: Sequence[Path]) -> None:
        self._paths = list(map(str, paths))

    def read(self, row: int) -> bytes:
        """Return the content of a file."""
        return read_file(self._paths[row])

    def name_of(self, row: int) -> str:
        """Return a file's path."""
        return self._paths[row]

    def file_of(self, row: int) -> FileRange:
        """Return a file."""
        return FileRange(self._paths[row])


class _Rows:
    """Where the images of a collection are, and whether what was read is the row's."""

    def __init__(self, collection: Collection) -> None:
        self.collection = collection

    def name_of(self, row: int) -> str:
        """Return a row's path, behind that of its shard."""
        view = self.collection.row(row)
        if not self.collection.is_packed or view.path.startswith(f"{view.shard}/"):
            return view.path
        return f"{view.shard}/{view.path}"

    def place_of(self, row: int, folder: str) -> FileRange:
        """Return what is read for a row below a folder, with the header of what job=pack made."""
        view = self.collection.row(row)
        if not self.collection.is_packed:
            return FileRange(os.path.join(folder, view.path))
        lead = HEADER_BYTES if _has_header(view) else 0
        return FileRange(os.path.join(folder, view.shard), view.offset - lead, view.length + lead)

    def check(self, row: int, content: bytes, length: int) -> bytes:
        """Return what was read without its header. Raises UnreadableImage where it is cut off, or another image's."""
        if len(content) < length:
            detail = f"the shard ends after {len(content):,} of {length:,} bytes"
            raise UnreadableImage(self.name_of(row), CUT_OFF, detail)
        view = self.collection.row(row)
        if not _has_header(view):
            return content
        key = member_key(view.path)
        if not content.startswith(key.encode()):
            raise UnreadableImage(self.name_of(row), MISPLACED, f"not {key}; pack the collection again")
        return content[HEADER_BYTES:]


def _has_header(view: Row) -> bool:
    """Return whether a row is of a shard that job=pack made, where a header with its key is before the image."""
    return view.shard.endswith(TAR) and not view.path.startswith(f"{view.shard}/")


class Files(_Rows):
    """Images in files of a collection, or in parts of them."""

    def __init__(self, collection: Collection) -> None:
        super().__init__(collection)
        self._root = os.fspath(collection.root)
        self._open = functools.lru_cache(_OPEN_SHARDS)(functools.partial(open, mode="rb", buffering=0))

    def read(self, row: int) -> bytes:
        """Return a row's bytes. Raises UnreadableImage, which names the shard."""
        path, offset, length = self.file_of(row)
        if not self.collection.is_packed:
            return read_file(path, self.name_of(row))
        try:
            shard = self._open(path)  # which stays open while there is a name for it
            content = os.pread(shard.fileno(), length, offset)
        except OSError as error:
            raise UnreadableImage(self.name_of(row), NOT_OPENED, f"{type(error).__name__}: {error.strerror}") from error
        return self.check(row, content, length)

    def file_of(self, row: int) -> FileRange:
        """Return the row's file, or its part of a shard."""
        return self.place_of(row, self._root)


class RemoteFiles(_Rows):
    """Parts of shards behind a URL: those of a batch are asked for together."""

    def __init__(self, collection: Collection) -> None:
        super().__init__(collection)
        self._coming: dict[int, tuple[Future[dict[int, bytes | Exception]], float]] = {}  # answers and their deadlines

    def prefetch(self, rows: Sequence[int]) -> None:
        """Begin to read the rows of a batch; those of the batch before are dropped."""
        self._coming = dict.fromkeys(rows, self._ask(rows)) if len(rows) else {}

    def read(self, row: int) -> bytes:
        """Return a row's bytes. Raises UnreadableImage where the store does not give them."""
        answer, deadline = self._coming.get(row) or self._ask([row])
        try:
            content = answer.result(max(0.0, deadline - time.monotonic()))[row]
        except TimeoutError as error:
            raise UnreadableImage(self.name_of(row), NO_ANSWER, f"within {_PATIENCE_SEC} s") from error
        if isinstance(content, Exception):
            raise UnreadableImage(self.name_of(row), NO_ANSWER, f"{type(content).__name__}: {content}") from content
        return self.check(row, content, self.place_of(row, "").length)

    def _ask(self, rows: Sequence[int]) -> tuple[Future[dict[int, bytes | Exception]], float]:
        files, folder = open_store(str(self.collection.root))
        pool = ThreadPoolExecutor(1, thread_name_prefix="fetch")  # a new one: a fork has no threads
        answer = pool.submit(_read_ranges, files, {row: self.place_of(row, folder) for row in rows})
        pool.shutdown(wait=False)
        return answer, time.monotonic() + _PATIENCE_SEC


def _read_ranges(files: AbstractFileSystem, places: Mapping[int, FileRange]) -> dict[int, bytes | Exception]:
    """Return the bytes of some parts of files, or the error that the store gave; near parts in one request."""
    joined = join_ranges(places.values())
    paths, starts, lengths = zip(*joined)
    ends = [start + length for start, length in zip(starts, lengths)]
    try:
        contents = files.cat_ranges(list(paths), list(starts), ends, on_error="return")
    except Exception as error:  # each store has errors of its own
        return dict.fromkeys(places, error)
    found: dict[int, bytes | Exception] = {}
    for key, (path, offset, length) in places.items():
        number = bisect_right(joined, (path, offset, float("inf"))) - 1
        content, at = contents[number], offset - starts[number]
        found[key] = content[at : at + length] if isinstance(content, bytes) else content
    return found


def member_key(path: str) -> str:
    """Return the name in a shard, without suffix, of what is packed for a path: the index can be checked against it."""
    return hashlib.sha256(path.encode()).hexdigest()[:20]


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
    """Return the encoded images of a collection."""
    return RemoteFiles(collection) if is_remote(str(collection.root)) else Files(collection)
