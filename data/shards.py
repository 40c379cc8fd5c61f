"""Images in shards: a row's bytes are a part of a larger file, a tar file (data/pack.py) or one of Arrow.

A collection is read so where its index has the columns of `data.table.PLACES`.
"""

import functools
import hashlib
import os
import tarfile
import time
import weakref
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

from data.collection import Collection
from data.image_formats import CUT_OFF, NOT_OPENED, UnreadableImage
from data.remote import open_store, read_ranges
from data.source import FileRange

TAR = ".tar"
HEADER_BYTES = 512  # of a member of a tar file, right before its content
MISPLACED = "the shard holds something else there"
NO_ANSWER = "the store does not give the bytes"
_OPEN_SHARDS = 64  # that a process keeps open
_PATIENCE_SEC = 120  # for a batch, the store's own attempts included


def member_key(path: str) -> str:
    """Return the name in a shard, without suffix, of what is packed for a path: the index can be checked against it."""
    return hashlib.sha256(path.encode()).hexdigest()[:20]


class ShardContents:
    """The parts of shards that the index of a collection names, read at random."""

    def __init__(self, collection: Collection) -> None:
        self.collection = collection
        self._open = functools.lru_cache(_OPEN_SHARDS)(_Shard)

    def __reduce__(self) -> tuple[type["ShardContents"], tuple[Collection]]:
        """Leave the open files out: each process has its own."""
        return type(self), (self.collection,)

    def read(self, row: int) -> bytes:
        """Return a row's bytes.

        Raises UnreadableImage, which names the shard, where it cannot be read, ends before, or holds something else.
        """
        path, offset, length = self.file_of(row)
        try:
            content = self._open(path).read(offset, length)
        except OSError as error:
            raise UnreadableImage(self.name_of(row), NOT_OPENED, f"{type(error).__name__}: {error.strerror}") from error
        return check_content(self.collection, row, content)

    def name_of(self, row: int) -> str:
        """Return the shard and the row's path."""
        return name_in_shard(self.collection, row)

    def file_of(self, row: int) -> FileRange:
        """Return the row's part of its shard, with the header of a tar file's member."""
        return place_of(self.collection, row)


class RemoteContents:
    """The parts of shards behind a URL: those of a batch are asked for together."""

    def __init__(self, collection: Collection) -> None:
        self.collection = collection
        self._coming: dict[int, tuple[Future[dict[int, bytes | Exception]], float]] = {}  # answers and their deadlines

    def __reduce__(self) -> tuple[type["RemoteContents"], tuple[Collection]]:
        """Leave out what is on its way."""
        return type(self), (self.collection,)

    def prefetch(self, rows: Sequence[int]) -> None:
        """Begin to read rows that no call before has begun; other rows are dropped."""
        self._coming = {row: self._coming[row] for row in rows if row in self._coming}
        if not (new := [row for row in dict.fromkeys(rows) if row not in self._coming]):
            return
        files, folder = open_store(str(self.collection.root))
        pool = ThreadPoolExecutor(1, thread_name_prefix="fetch")  # a new one: a fork has no threads
        answer = pool.submit(read_ranges, files, {row: place_of(self.collection, row, folder) for row in new})
        pool.shutdown(wait=False)
        self._coming |= dict.fromkeys(new, (answer, time.monotonic() + _PATIENCE_SEC))

    def read(self, row: int) -> bytes:
        """Return a row's bytes. Raises UnreadableImage where the store does not give them."""
        if row not in self._coming:
            self.prefetch([row])
        answer, deadline = self._coming[row]
        try:
            content = answer.result(max(0.0, deadline - time.monotonic()))[row]
        except TimeoutError as error:
            raise UnreadableImage(self.name_of(row), NO_ANSWER, f"within {_PATIENCE_SEC} s") from error
        if isinstance(content, Exception):
            raise UnreadableImage(self.name_of(row), NO_ANSWER, f"{type(content).__name__}: {content}") from content
        return check_content(self.collection, row, content)

    def name_of(self, row: int) -> str:
        """Return the shard and the row's path."""
        return name_in_shard(self.collection, row)

    def digest_of(self, row: int) -> bytes | None:
        """Return the SHA-256 that the index states: a store replaces whole shards, and then the index with them."""
        digest = self.collection.table["sha256"][row].as_py()
        return None if digest is None else bytes.fromhex(digest)


def name_in_shard(collection: Collection, row: int) -> str:
    """Return the shard and a row's path."""
    view = collection.view(row)
    return view.path if view.path.startswith(f"{view.shard}/") else f"{view.shard}/{view.path}"


def place_of(collection: Collection, row: int, folder: str | None = None) -> FileRange:
    """Return what is read for a row, with the header of a tar file's member; folder: of the shards."""
    view = collection.view(row)
    lead = HEADER_BYTES if view.shard.endswith(TAR) else 0
    path = os.path.join(collection.root if folder is None else folder, view.shard)
    return FileRange(path, view.offset - lead, view.length + lead)


def check_content(collection: Collection, row: int, content: bytes) -> bytes:
    """Return what was read for a row without its header. Raises UnreadableImage where it is not the row's."""
    name, length = name_in_shard(collection, row), place_of(collection, row).length
    if len(content) < length:
        raise UnreadableImage(name, CUT_OFF, f"the shard ends after {len(content):,} of {length:,} bytes")
    view = collection.view(row)
    if not view.shard.endswith(TAR):
        return content
    # In a tar file of others, members have any name.
    key = "" if view.path.startswith(f"{view.shard}/") else member_key(view.path)
    if fault := _fault_of_header(content[:HEADER_BYTES], length - HEADER_BYTES, key):
        raise UnreadableImage(name, MISPLACED, f"{fault}; pack the collection again")
    return content[HEADER_BYTES:]


class _Shard:
    """An open shard; it is closed with the last reference."""

    def __init__(self, path: Path) -> None:
        self._descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        weakref.finalize(self, os.close, self._descriptor)
        self._size = os.fstat(self._descriptor).st_size

    def read(self, offset: int, length: int) -> bytes:
        """Return the bytes of a range, fewer where the file ends before."""
        if not 0 <= offset < self._size:
            return b""
        return os.pread(self._descriptor, min(length, self._size - offset), offset)  # a length may be a lie


def _fault_of_header(header: bytes, length: int, key: str) -> str | None:
    """Return what is wrong with a member's header: it is none, or that of another file; None where it fits."""
    try:
        member = tarfile.TarInfo.frombuf(header, "utf-8", "surrogateescape")
    except tarfile.HeaderError:
        return "there is no header of a tar file"
    if not member.name.startswith(key) or member.size != length:
        return f"it is {member.name!r} of {member.size:,} bytes, not {key or 'a file'} of {length:,}"
    return None
