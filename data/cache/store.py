"""Checked bytes by key in one LMDB file, which all processes of a node read and write: the cache on disk is kept in it.

    store = open_store(Path("outputs/cache/images"), limit_bytes, counts)
    store.get(key)                 the bytes, None where there are none or they are damaged
    store.put(key, content)        a thread writes them soon, or nobody where too much is waiting

Readers wait for nobody: LMDB writes new pages and leaves those that are read. Each process has a thread that writes
what is waiting, and LMDB's lock lets one of all processes write at a time; the lock of a killed process is free again,
and what it had not committed is as if it had never been. So jobs share a folder without knowing each other.

A record is a checksum of key and content, and the content. Further keys, 8 bytes counting from 0, hold the keys of
records in the order of writing, by which the oldest go where there is no room.
"""

import errno
import fcntl
import multiprocessing.util
import os
import threading
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

import lmdb
import numpy as np

from data.source import Counters
from utils.errors import UserError
from utils.io.checksums import sum_words
from utils.io.files import set_aside
from utils.io.mounts import network_file_system
from utils.record.logging import get_logger

log = get_logger(__name__)
T = TypeVar("T")

# What the counters of a store count: records that were to be written, were dealt with, were not written because too
# much was waiting, and made room for others; and how often the file could not be read or written.
COUNTED = ("queued", "settled", "dropped", "evicted", "refused")

_WAITING_BYTES = 32 << 20  # of a process, and so of a transaction
_GATHER_SEC = 0.5  # a transaction is flushed to the disk: one for many records
_CLOSE_SEC = 60.0
_FULL = 0.9  # of the file's limit; the rest is for freed pages that may still be read, and for gaps between records
_READERS = 4096  # processes that may read at once
_EVICTED_AT_ONCE = 4096  # records, so that no transaction takes long
_SPARE_BYTES = 64 << 20  # for removing records from a file that is larger than its limit
_ATTEMPTS = 3  # to write where the room is in pieces
_SUM_BYTES = 8  # of a checksum, which leaves the content where its words are aligned
_AFTER_COUNTERS = b"\x01"  # keys of records are hexadecimal digits, and greater
_ADVICE = "set data.cache.folder to a folder on a local disk that this user may write, or data.cache.disk_gib=0"

_stores: dict[Path, "Store"] = {}


def open_store(folder: Path, limit_bytes: int, counts: Counters) -> "Store":
    """Return this process's store of a folder; a damaged one is set aside, and a new one begun.

    Raises UserError (`data.cache.folder`) on a network file system, and where the folder cannot be used.
    """
    if folder not in _stores:
        if not _stores:  # in a loader's worker as well, which forgets what its parent has registered
            multiprocessing.util.Finalize(None, close_stores, exitpriority=10)
        _stores[folder] = Store(folder, limit_bytes, counts)
    return _stores[folder]


def close_stores() -> None:
    """Write what is waiting, and close all stores; they are opened again when they are next used."""
    while _stores:
        _stores.popitem()[1].close()


os.register_at_fork(before=close_stores)  # LMDB can use an open file neither after a fork nor twice in a process


class Store:
    """The records of a folder, by `open_store`. counts: of COUNTED."""

    def __init__(self, folder: Path, limit_bytes: int, counts: Counters) -> None:
        self._folder, self._counts = folder, counts
        self._full_bytes = int(_FULL * limit_bytes)
        self._waiting_limit = min(_WAITING_BYTES, limit_bytes // 32)
        self._env = _open(folder, limit_bytes)
        self._change = threading.Condition()
        self._waiting: list[tuple[bytes, bytes]] = []
        self._waiting_bytes, self._closing, self._writes = 0, False, True
        self._thread: threading.Thread | None = None

    def get(self, key: str) -> np.ndarray | None:
        """Return a record's content, uint8 [N] of its own memory; None where there is none, or a damaged one."""
        record = self._look_up(key, lambda found: np.array(found))
        return None if record is None else _unwrap(key.encode(), record)

    def has(self, key: str) -> bool:
        """Return whether there is a record, without reading it."""
        return self._look_up(key, lambda found: True) is not None

    def _look_up(self, key: str, use: Callable[[memoryview], T]) -> T | None:
        """Return what `use` makes of a record, None where there is none."""
        try:
            with self._env.begin(buffers=True) as transaction:
                found = transaction.get(key.encode())
                return None if found is None else use(found)
        except lmdb.Error as error:
            self._refuse(error)
            return None

    def put(self, key: str, content: bytes, *, wait: bool = False) -> None:
        """Have a record written, in the place of a damaged one. wait: for room among those that are waiting."""
        with self._change:
            if wait:
                self._change.wait_for(lambda: self._has_room(content))
            if not self._has_room(content):
                self._counts.add("dropped")
            elif self._writes:
                self._counts.add("queued")
                self._waiting.append((key.encode(), _wrap(key.encode(), content)))
                self._waiting_bytes += len(content)
                if self._thread is None:
                    self._thread = threading.Thread(target=self._run, name="cache-writer", daemon=True)
                    self._thread.start()
                self._change.notify_all()

    def used_bytes(self) -> int:
        """Return the bytes that all records take in the file."""
        pages = self._env.stat()
        return pages["psize"] * sum(pages[kind] for kind in ("branch_pages", "leaf_pages", "overflow_pages"))

    def close(self) -> None:
        """Write what is waiting, and close the file."""
        with self._change:
            self._closing = True
            self._change.notify_all()
        if self._thread is not None:
            self._thread.join(_CLOSE_SEC)
        self._env.close()

    def _has_room(self, content: bytes) -> bool:
        fits = self._waiting_bytes + len(content) <= self._waiting_limit
        return fits or not self._waiting or not self._writes

    def _run(self) -> None:
        """Write what is waiting, until the store is closed."""
        while True:
            with self._change:
                self._change.wait_for(lambda: self._waiting or self._closing)
                is_much = lambda: self._closing or 2 * self._waiting_bytes > self._waiting_limit  # noqa: E731
                self._change.wait_for(is_much, timeout=_GATHER_SEC)
                batch = list(self._waiting)
            if not batch:
                return
            try:
                self._write(batch)
            except lmdb.Error as error:
                self._refuse(error)
            self._counts.add("settled", len(batch))
            with self._change:
                del self._waiting[: len(batch)]
                self._waiting_bytes = sum(len(record) for _, record in self._waiting)
                self._change.notify_all()

    def _write(self, batch: list[tuple[bytes, bytes]]) -> None:
        """Write records in one transaction, after removing the oldest ones where there is no room for them."""
        size = sum(len(record) for _, record in batch)
        for attempt in range(1, _ATTEMPTS + 1):
            try:
                with self._env.begin(write=True, buffers=True) as transaction:
                    self._evict(transaction, size)
                    self._insert(transaction, batch)
                return
            except lmdb.MapFullError:
                # There is room, but in pieces, or in pages that a reader holds, perhaps one that was killed.
                self._env.reader_check()
                with self._env.begin(write=True, buffers=True) as transaction:
                    self._evict(transaction, 2 * attempt * size)
        self._counts.add("dropped", len(batch))

    def _insert(self, transaction: lmdb.Transaction, batch: list[tuple[bytes, bytes]]) -> None:
        """Insert the records that no other process has written yet, and those that are damaged."""
        cursor = transaction.cursor()
        has_any = cursor.prev() if cursor.set_range(_AFTER_COUNTERS) else cursor.last()
        counter = int.from_bytes(cursor.key(), "big") + 1 if has_any else 0
        for key, record in batch:
            there = transaction.get(key)
            if there is None or _unwrap(key, np.array(there)) is None:
                transaction.put(key, record)
                transaction.put(counter.to_bytes(8, "big"), key)
                counter += 1

    def _evict(self, transaction: lmdb.Transaction, size: int) -> None:
        """Remove the oldest records until `size` bytes more fit, or with the next ones where the limit was lowered."""
        used, cursor = self.used_bytes(), transaction.cursor()
        for _ in range(_EVICTED_AT_ONCE):
            if used + size <= self._full_bytes or not cursor.first() or bytes(cursor.key()) >= _AFTER_COUNTERS:
                return
            key = bytes(cursor.value())
            used -= len(transaction.get(key, b""))
            cursor.delete()
            self._counts.add("evicted", transaction.delete(key))

    def _refuse(self, error: lmdb.Error) -> None:
        """Write no more, and warn once for all processes."""
        self._writes = False
        warned = self._counts.totals()["refused"] > 0
        self._counts.add("refused")
        if not warned:
            log.warning(
                "data.cache.folder: %s cannot be written or read (%s); the run goes on, and decodes what is not in the "
                "cache. Make room there; jobs that share a folder need the same data.cache.disk_gib",
                self._folder, error,
            )  # fmt: skip


def _wrap(key: bytes, content: bytes) -> bytes:
    return _checksum(key, np.frombuffer(content, np.uint8)) + content


def _unwrap(key: bytes, record: np.ndarray) -> np.ndarray | None:
    """Return the content of a record, None where it is damaged."""
    content = record[_SUM_BYTES:]
    return content if _checksum(key, content) == record[:_SUM_BYTES].tobytes() else None


def _checksum(key: bytes, content: np.ndarray) -> bytes:
    return ((zlib.crc32(key) + sum_words(content)) % 2**64).to_bytes(_SUM_BYTES, "little")


def _open(folder: Path, limit_bytes: int) -> lmdb.Environment:
    """Open the file of a folder; one process at a time, because it may have to be set aside."""
    if (kind := network_file_system(folder)) is not None:
        raise UserError(
            f"data.cache.folder: {folder} is on a network file system ({kind}), where LMDB damages its file: it needs "
            f"locks and mapped memory that all processes share; {_ADVICE}"
        )
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with open(folder / "opening", "ab") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            try:
                return _open_whole(folder / "images.lmdb", limit_bytes)
            except (lmdb.InvalidError, lmdb.CorruptedError) as error:
                set_aside(folder / "images.lmdb", f"is damaged ({error})")
                return _open_whole(folder / "images.lmdb", limit_bytes)
    except (lmdb.Error, OSError) as error:
        is_foreign = os.strerror(errno.EACCES) in str(error)
        first = "let its owner share it (chmod -R a+rwX)" if is_foreign else "remove it"
        raise UserError(f"data.cache.folder: {folder} cannot be used ({error}); {first}, or {_ADVICE}") from error


def _open_whole(path: Path, limit_bytes: int) -> lmdb.Environment:
    """Open a file that has all its pages: the system ends a process that reads beyond the end of a mapped file."""
    file = path / "data.mdb"
    found = file.stat().st_size if file.is_file() else 0
    map_size = limit_bytes if found <= limit_bytes else found + _SPARE_BYTES
    opened = lmdb.open(str(path), map_size=map_size, metasync=False, max_readers=_READERS)
    counted = (opened.info()["last_pgno"] + 1) * opened.stat()["psize"]
    if (found := file.stat().st_size) < counted:
        opened.close()
        raise lmdb.CorruptedError(f"it is cut off: {found:,} of {counted:,} bytes")
    return opened
