"""Caches of decoded images, sources in front of another one. Hits, misses and a full cache give the same pixels.

source = keep_in_memory(source, collection, config.cache)    one copy for all processes of a node
"""

import fcntl
import io
import mmap
import os
import socket
import struct
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from typing import Any, Self

import numpy as np
import torch
from numpy import ndarray

from data.collection.choose import spread
from data.collection.collection import Collection
from data.config import CacheConfig
from data.stream.source import IMAGE, Record, Source, UnreadableImage
from utils.errors import UserError
from utils.hardware import free_memory
from utils.ranks import distributed
from utils.record.logging import log

GIB = 2**30
_COUNTED = ("hits", "misses", "refused")  # refused: images that could not be written
_PROCESSES = 256  # rows of counters; processes of a run mostly have consecutive ids
_FREE_SHARE = 0.5  # maximum share of the free memory for `auto`
_WORTH_SHARE = 0.5  # share of the images that must fit for `auto`; below it, the page cache of the files is better
_ESTIMATE_IMAGES = 32
_LEFT_SHARE = 0.1  # share of the initially free memory below which no image is added
_CHECKED_BYTES = 2**28  # bytes between two checks of the free memory
BEHIND = 2**13  # bytes after the last record, because every row of a window is read as the longest
_WORD_BYTES = 8
HEAD = struct.Struct("<3I")  # the beginning of a record: height, width, channels; the pixels follow


class Cached(Source):
    """The images of a source, kept as records when they are decoded.

    records: a LimitedStore or a Pool. key_of: from a row to the key of its record, or None if it cannot be kept.
    name: begins the names of the metrics.
    """

    def __init__(self, inner: Source, records: Any, key_of: Callable[[int], Any], name: str) -> None:
        self.inner = inner
        self.blank = inner.blank
        self.records = records
        self.key_of = key_of
        self._name = name
        # Each process, loader workers included, has its own row, so no lock is needed.
        self._counts = torch.zeros(_PROCESSES, len(_COUNTED), dtype=torch.int64).share_memory_().numpy()

    def read(self, row: int, key: int = 0, group: int = 0) -> Record:
        """Return the image of a row; hits and misses have equal pixels and strides. Raises UnreadableImage."""
        place = self.key_of(row)  # before reading the file, so that a change in between invalidates the record
        record = None if place is None else self.records.get(place)
        self._count("misses" if record is None else "hits")
        if record is not None:
            pixels = torch.from_numpy(record[HEAD.size :].reshape(HEAD.unpack(record[: HEAD.size])))
        else:
            pixels = self.inner.read(row)[IMAGE].permute(1, 2, 0).contiguous()
            if place is not None and not self.counts()["refused"]:  # after a failed write, warn once and write no more
                try:
                    self.records.add(place, HEAD.pack(*pixels.shape) + pixels.numpy().tobytes())
                except UserError as error:
                    self._count("refused")
                    log.warning("%s. The run continues and decodes uncached images", error)
        return {IMAGE: pixels.permute(2, 0, 1)}

    def has(self, row: int) -> bool:
        """Return whether a row has a record."""
        place = self.key_of(row)
        return place is not None and self.records.has(place)

    def prefetch(self, rows: Iterable[int]) -> None:
        """Start to read the rows that are not cached. Lazily, because most sources ignore it."""
        self.inner.prefetch(row for row in rows if not self.has(row))

    def _count(self, name: str) -> None:
        self._counts[os.getpid() % _PROCESSES, _COUNTED.index(name)] += 1

    def counts(self) -> dict[str, int]:
        """Return the counts over all processes."""
        return dict(zip(_COUNTED, self._counts.sum(axis=0).tolist()))

    def readings(self) -> dict[str, float]:
        """Return the hit rate and the size in GiB, and the metrics of the inner source."""
        counts = self.counts()
        rate = counts["hits"] / max(1, counts["hits"] + counts["misses"])
        size = self.records.used_bytes() / GIB
        return {f"{self._name}_hit_rate": rate, f"{self._name}_gib": size, **self.inner.readings()}


# ----------------------------------------------------------------------------------------------------------- in memory


def can_cut(device: torch.device) -> bool:
    """Return whether a device is a GPU, in a run that need not repeat to the bit."""
    return device.type == "cuda" and not torch.are_deterministic_algorithms_enabled()


class Pool:
    """Records by row in an anonymous file (memfd_create): int64 numbers, then the records.

    The numbers are the bytes in use and those allowed, and the length (0: missing) and first byte of each row's record.
    Nothing is evicted: an epoch reads every image once, so eviction would not increase hits.

    An anonymous file leaves nothing behind after a kill, does not count against the size of /dev/shm, and ends with its
    last process. The length of a row is written after its record is complete, so a killed process leaves unused space
    but no broken record.

    path: lets another process open the file. content: uint8 [N], the records and some bytes behind them.
    """

    def __init__(self, file: io.FileIO, rows: int) -> None:
        self.path = f"/proc/{os.getpid()}/fd/{file.fileno()}"
        self._file = file
        content = np.frombuffer(mmap.mmap(file.fileno(), 0), np.uint8)
        numbers, self.content = np.split(content, [_WORD_BYTES * (2 + 2 * rows)])
        self._room, self._lengths, self._starts = np.split(numbers.view(np.int64), (2, 2 + rows))
        self._reserve = int(_LEFT_SHARE * free_memory())

    @classmethod
    def create(cls, rows: int, budget: int) -> Self:
        """Return an empty pool for `budget` bytes of records; memory is only used when records are added."""
        file = io.FileIO(os.memfd_create("atelier-images"), "r+")
        file.truncate(_WORD_BYTES * (2 + 2 * rows) + budget + BEHIND)
        pool = cls(file, rows)
        pool._room[1] = budget
        return pool

    def used_bytes(self) -> int:
        """Return the bytes used by records."""
        return int(self._room[0])

    def has(self, row: int | ndarray) -> bool | ndarray:
        """Return whether a row, or each of several, has a record."""
        return self._lengths[row] != 0

    def heads(self, rows: ndarray | list[int]) -> tuple[ndarray, ndarray]:
        """Return where the pixels of rows begin in `content` [N], and their height, width and channels [N, 3]."""
        starts = self._starts[rows]
        return starts + HEAD.size, self.content[starts[:, None] + np.arange(HEAD.size)].view(np.uint32)

    def get(self, row: int) -> ndarray | None:
        """Return the record of a row, uint8 [N], which must not be modified; or None."""
        length = self._lengths[row]
        return self.content[self._starts[row] :][:length] if length else None

    def add(self, row: int, content: bytes) -> None:
        """Store the record of a row if there is room and no other process has stored it."""
        if self._room[0] + len(content) > self._room[1]:
            return  # a full pool takes no lock
        with self._locked():
            start = self.used_bytes()
            end = start + len(content)
            if end // _CHECKED_BYTES > start // _CHECKED_BYTES and free_memory() < self._reserve:
                self._room[1] = start
            if end > self._room[1] or self.has(row):
                return
            self._room[0] = end
        self.content[start:end] = np.frombuffer(content, np.uint8)
        self._starts[row] = start
        with self._locked():  # a barrier for the writes before it, on any processor
            self._lengths[row] = len(content)

    @contextmanager
    def _locked(self) -> Iterator[None]:
        """Exclude all other processes. The system releases the lock of a killed process."""
        fcntl.lockf(self._file, fcntl.LOCK_EX)
        try:
            yield
        finally:
            fcntl.lockf(self._file, fcntl.LOCK_UN)


def keep_in_memory(source: Source, collection: Collection, config: CacheConfig) -> Source:
    """Return the source behind a memory cache, or the source itself if `data.cache.memory_gib` gives no cache.

    All ranks must call it.
    """
    if not hasattr(os, "memfd_create"):  # macOS
        return source
    pool = _share_pool(len(collection), lambda: _choose_budget(source, collection, config.memory_gib))
    return Cached(source, pool, lambda row: row, "l1") if pool else source


def _share_pool(rows: int, choose: Callable[[], int]) -> Pool | None:
    """Return one pool for all ranks of a node, with the size that its first rank chooses; None for 0."""
    hosts = distributed.gather_objects(socket.gethostname())
    first = hosts.index(hosts[distributed.rank()])
    pool = None
    if distributed.rank() == first and (budget := choose()):
        log.debug("data.cache.memory_gib: caching decoded images in up to %.3g GiB", budget / GIB)
        pool = Pool.create(rows, budget)
    path = distributed.gather_objects(pool.path if pool else None)[first]
    if not pool and path:
        try:
            pool = Pool(io.FileIO(path, "r+"), rows)
        except OSError as error:
            log.warning("data.cache.memory_gib: this rank cannot share memory with rank %d (%s)", first, error.strerror)
    distributed.barrier()  # the first rank must not end before all have opened it
    return pool


def _choose_budget(source: Source, collection: Collection, gib: float | str) -> int:
    """Return the bytes for decoded images, or 0.

    A number is limited by the free memory. `auto`: half of the free memory, of which only records take any; 0 if less
    than half of the images would fit, by a few decoded ones.
    """
    free = free_memory()
    if gib != "auto":
        if gib * GIB > free:
            log.warning("data.cache.memory_gib: %g is more than the %.1f GiB of free memory", gib, free / GIB)
        return int(min(gib * GIB, free))
    sizes = [0]
    rows = np.concatenate([collection.rows("train"), collection.rows("val")])
    for row in spread(rows, _ESTIMATE_IMAGES):
        with suppress(UnreadableImage):  # the loader reports it
            sizes.append(source.read(int(row))[IMAGE].numel())
    room = _FREE_SHARE * free
    whole = len(rows) * sum(sizes) / max(1, len(sizes) - 1)
    if room < _WORTH_SHARE * whole:
        log.info(
            "data.cache.memory_gib: decoded images are not cached: all need about %.1f GiB, but %.1f are free; set a "
            "number to cache a part of them", whole / GIB, free / GIB,
        )  # fmt: skip
        return 0
    return int(room)
