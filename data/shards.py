"""Images in shards: a row's bytes are a part of a larger file, a tar file (data/pack.py) or one of Arrow.

A collection is read so where its index has the columns of `data.table.PLACES`.
"""

import functools
import hashlib
import os
import tarfile
import time
import weakref
from collections.abc import Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

from data.collection import Collection
from data.image_formats import CUT_OFF, NOT_OPENED, UnreadableImage
from data.remote import open_store, read_ranges
from data.source import FileRange

TAR = ".tar"
HEADER_BYTES = 512  # of a member of a tar file, right before its content
MISPLACED = "the shard holds something else there"
NO_ANSWER = "the store does not give the bytes"
_OPEN_SHARDS = 64  # that a process keeps open
_ROWS_AT_ONCE, _THREADS = 32, 4  # of a remote read
_PATIENCE_SEC = 120  # for a batch, attempts included


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

    def prefetch(self, rows: Iterable[int]) -> None:
        """Do nothing: `file_of` lets the parts be read ahead."""

    def name_of(self, row: int) -> str:
        """Return the shard and the row's path."""
        view = self.collection.view(row)
        return view.path if view.path.startswith(f"{view.shard}/") else f"{view.shard}/{view.path}"

    def file_of(self, row: int) -> FileRange:
        """Return the row's part of its shard, with the header of a tar file's member."""
        shard, offset, length = self.place_of(row)
        return FileRange(os.path.join(self.collection.root, shard), offset, length)

    def digest_of(self, row: int) -> bytes | None:
        """Return None: the file may be written again."""
        return None

    def place_of(self, row: int) -> tuple[str, int, int]:
        """Return the shard, offset and length of what is read for a row."""
        view = self.collection.view(row)
        lead = HEADER_BYTES if view.shard.endswith(TAR) else 0
        return view.shard, view.offset - lead, view.length + lead


class _Answer(NamedTuple):
    """What is to come for some rows, and until when it is waited for."""

    future: Future[dict[int, bytes | Exception]]
    deadline: float


class RemoteContents(ShardContents):
    """The parts of shards behind a URL: those of a batch are asked for together, while the batch before is decoded."""

    def __init__(self, collection: Collection) -> None:
        super().__init__(collection)
        self._coming: dict[int, _Answer] = {}

    def prefetch(self, rows: Iterable[int]) -> None:
        """Begin to read rows that no call before has begun; other rows are dropped."""
        wanted = dict.fromkeys(rows)
        self._coming = {row: self._coming[row] for row in wanted if row in self._coming}
        self._ask_for([row for row in wanted if row not in self._coming])

    def _ask_for(self, rows: list[int]) -> None:
        files, folder = open_store(str(self.collection.root))
        deadline = time.monotonic() + _PATIENCE_SEC
        pool = ThreadPoolExecutor(_THREADS, thread_name_prefix="fetch")  # a new one: a fork has no threads
        for start in range(0, len(rows), _ROWS_AT_ONCE):
            places = {row: self.place_of(row) for row in rows[start : start + _ROWS_AT_ONCE]}
            future = pool.submit(read_ranges, files, folder, places)
            self._coming |= dict.fromkeys(places, _Answer(future, deadline))
        pool.shutdown(wait=False)

    def read(self, row: int) -> bytes:
        """Return a row's bytes. Raises UnreadableImage where the store does not give them, after some attempts."""
        if is_single := row not in self._coming:
            self._ask_for([row])
        future, deadline = self._coming.pop(row) if is_single else self._coming[row]
        name, (_, _, length) = self.name_of(row), self.place_of(row)
        try:
            content = future.result(max(0.0, deadline - time.monotonic()))[row]
        except TimeoutError as error:
            raise UnreadableImage(name, NO_ANSWER, f"within {_PATIENCE_SEC} s") from error
        if isinstance(content, Exception):
            raise UnreadableImage(name, NO_ANSWER, f"{type(content).__name__}: {content}") from content
        return self.check(row, name, content, length)

    def file_of(self, row: int) -> None:
        """Return None: there is no file."""

    def digest_of(self, row: int) -> bytes | None:
        """Return the SHA-256 that the index states: a store replaces whole shards, and then the index with them."""
        digest = self.collection.table["sha256"][row].as_py()
        return None if digest is None else bytes.fromhex(digest)


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
