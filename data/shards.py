"""Images in shards: a row's bytes are a part of a larger file, a tar file (data/pack.py) or one of Arrow.

A collection is read so where its index has the columns of `data.table.PLACES`.
"""

import functools
import hashlib
import os
import tarfile
import weakref
from pathlib import Path

from data.collection import Collection
from data.decode import CUT_OFF, NOT_OPENED, UnreadableImage
from data.source import FileRange

TAR = ".tar"
HEADER_BYTES = 512  # of a member of a tar file, right before its content
MISPLACED = "the shard holds something else there"
_OPEN_SHARDS = 64  # that a process keeps open


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
        return ShardContents, (self.collection,)

    def read(self, row: int) -> bytes:
        """Return a row's bytes.

        Raises UnreadableImage, which names the shard, where it cannot be read, ends before, or holds something else.
        """
        name, (path, offset, length) = self.name_of(row), self.file_of(row)
        try:
            content = self._open(path).read(offset, length)
        except OSError as error:
            raise UnreadableImage(name, NOT_OPENED, f"{type(error).__name__}: {error.strerror}") from error
        return self.check(row, name, content, length)

    def check(self, row: int, name: str, content: bytes, length: int) -> bytes:
        """Return what was read for a row without its header. Raises UnreadableImage as `read` does."""
        if len(content) < length:
            raise UnreadableImage(name, CUT_OFF, f"the shard ends after {len(content):,} of {length:,} bytes")
        view = self.collection.view(row)
        if not view.shard.endswith(TAR):
            return content
        # In a tar file of others, members have any name.
        key = "" if view.path.startswith(f"{view.shard}/") else member_key(view.path)
        if fault := _fault_of_header(content[:HEADER_BYTES], length - HEADER_BYTES, key):
            raise UnreadableImage(name, MISPLACED, f"{fault}; pack the collection again")
        return content[HEADER_BYTES:]

    def name_of(self, row: int) -> str:
        """Return the shard and the row's path."""
        view = self.collection.view(row)
        return view.path if view.path.startswith(f"{view.shard}/") else f"{view.shard}/{view.path}"

    def file_of(self, row: int) -> FileRange:
        """Return the row's part of its shard, with the header of a tar file's member."""
        view = self.collection.view(row)
        lead = HEADER_BYTES if view.shard.endswith(TAR) else 0
        return FileRange(self.collection.root / view.shard, view.offset - lead, view.length + lead)


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
