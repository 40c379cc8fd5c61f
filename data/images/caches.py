"""Caches of decoded images, each a source in front of another. Hits, misses and a full cache give the same pixels.

source = DiskCached(Images(collection, decoder), config.cache)    in a folder, which runs share
source = keep_in_memory(source, collection, config.cache)         one copy for all processes of a node
"""

import fcntl
import mmap
import os
import socket
import struct
import weakref
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Self

import numpy as np
import torch
from torch import Tensor

from data.collection.collection import Collection
from data.collection.rows import spread
from data.config import CacheConfig
from data.images.image_source import Files, Images
from data.images.record_store import LimitedStore, record_key
from data.stream.source import IMAGE, FileRange, Record, Source, UnreadableImage
from utils.hardware import free_memory
from utils.io.memo import file_version
from utils.ranks import distributed
from utils.record.logging import get_logger

log = get_logger(__name__)

GIB = 2**30
_COUNTED = ("hits", "misses", "refused")  # refused: images that could not be written
_PROCESSES = 256  # rows of counters; processes of a run mostly have consecutive ids
_FREE_SHARE = 0.5  # maximum share of the free memory for `auto`
_WORTH_SHARE = 0.5  # share of the images that must fit for `auto`; below it, the page cache of the files is better
_ESTIMATE_IMAGES, _ESTIMATE_SLACK = 32, 1.25
_LEFT_SHARE = 0.1  # share of the initially free memory below which no image is added
_CHECKED_BYTES = 2**28  # bytes between two checks of the free memory
_SIZES_BYTES, _ALIGNED = 24, 8
HEAD = struct.Struct("<3I")  # height, width, channels; the pixels follow


def keep_in_memory(source: Source, collection: Collection, config: CacheConfig) -> Source:
    """Return the source behind a memory cache, or the source itself if `data.cache.memory_gib` gives no cache.

    All ranks must call it.
    """
    gib = config.memory_gib
    if gib == 0:
        return source
    pool = _share_pool(len(collection), lambda: _choose_budget(source, collection, gib))
    return source if pool is None else _MemoryCached(source, pool)


class _Cached(Source):
    """A source that caches records of its inner source and counts hits and misses, loader workers included."""

    def __init__(self, inner: Source) -> None:
        self.inner, self.blank = inner, inner.blank
        # Each process has its own row, so no lock is needed.
        self._counts = torch.zeros(_PROCESSES, len(_COUNTED), dtype=torch.int64).share_memory_()

    def count(self, name: str) -> None:
        """Add 1 to a count."""
        self._counts.numpy()[os.getpid() % _PROCESSES, _COUNTED.index(name)] += 1

    def counts(self) -> dict[str, int]:
        """Return the counts over all processes."""
        return dict(zip(_COUNTED, self._counts.sum(dim=0).tolist()))

    def has(self, row: int) -> bool:
        """Return whether the record of a row is cached."""
        raise NotImplementedError

    def file_of(self, row: int) -> FileRange | None:
        """Return the file of the inner source, unless the row is cached."""
        file = self.inner.file_of(row)
        return None if file is None or self.has(row) else file

    def prefetch(self, rows: Iterable[int]) -> None:
        """Start to read the rows that are not cached. A generator: most sources do not ask which these are."""
        self.inner.prefetch(row for row in rows if not self.has(row))

    def hit_rate(self) -> float:
        """Return the share of reads that were hits."""
        counts = self.counts()
        return counts["hits"] / max(1, counts["hits"] + counts["misses"])


class _Pool:
    """Images by row in an anonymous file (memfd_create): int64 numbers, then the images.

    The numbers are the offset of the next image, the end of the space, and the offset of each row's image (0: missing).
    An image is its height, width and channels as int64, then uint8 [H, W, C].

    An anonymous file leaves nothing behind after a kill, does not count against the size of /dev/shm, and ends with its
    last process. The offset of a row is written after its image is complete, so a killed process leaves unused space
    but no broken image.

    path: lets another process open the file.
    """

    def __init__(self, descriptor: int, rows: int) -> None:
        self.path = f"/proc/{os.getpid()}/fd/{descriptor}"
        self._descriptor = descriptor
        weakref.finalize(self, os.close, descriptor)
        self._bytes = mmap.mmap(descriptor, os.fstat(descriptor).st_size)
        self._words = np.frombuffer(self._bytes, np.int64, len(self._bytes) // 8)
        self._levels = self._words.view(np.uint8)
        self._next, self._end, self._starts = self._words[0:1], self._words[1:2], self._words[2 : 2 + rows]
        self._reserve = int(_LEFT_SHARE * free_memory())

    @classmethod
    def create(cls, rows: int, budget: int) -> Self:
        """Return an empty pool for `budget` bytes of images; memory is only used when images are stored."""
        first = 8 * (2 + rows)
        descriptor = os.memfd_create("atelier-images")
        os.ftruncate(descriptor, first + budget)
        pool = cls(descriptor, rows)
        pool._next[0], pool._end[0] = first, first + budget
        return pool

    @property
    def used_bytes(self) -> int:
        """Return the bytes used by images."""
        return int(self._next[0]) - 8 * (2 + len(self._starts))

    def __contains__(self, row: int) -> bool:
        return self._starts[row] != 0

    def get(self, row: int) -> Tensor | None:
        """Return the image of a row, uint8 [C, H, W], which must not be modified; or None."""
        start = int(self._starts[row])
        return None if start == 0 else torch.from_numpy(self._pixels(start).transpose(2, 0, 1))

    def put(self, row: int, pixels: Tensor) -> None:
        """Store the image of a row, uint8 [H, W, C], if there is room and no other process has stored it."""
        bytes_taken = -(-(_SIZES_BYTES + pixels.numel()) // _ALIGNED) * _ALIGNED
        if self._next[0] + bytes_taken > self._end[0]:
            return
        with self._locked():
            start = int(self._next[0])
            end = start + bytes_taken
            if end // _CHECKED_BYTES > start // _CHECKED_BYTES and free_memory() < self._reserve:
                self._end[0] = start
            if end > self._end[0] or row in self:
                return
            self._next[0] = end
        self._words[start // 8 : start // 8 + 3] = pixels.shape
        self._pixels(start)[:] = pixels.numpy()
        with self._locked():  # a barrier for the writes before it, on any processor
            self._starts[row] = start

    def _pixels(self, start: int) -> np.ndarray:
        height, width, channels = self._words[start // 8 : start // 8 + 3].tolist()
        first = start + _SIZES_BYTES
        return self._levels[first : first + height * width * channels].reshape(height, width, channels)

    @contextmanager
    def _locked(self) -> Iterator[None]:
        """Exclude all other processes. The system releases the lock of a killed process."""
        fcntl.lockf(self._descriptor, fcntl.LOCK_EX)
        try:
            yield
        finally:
            fcntl.lockf(self._descriptor, fcntl.LOCK_UN)


class _MemoryCached(_Cached):
    """The images of a source, stored in a pool when decoded. Hits and misses have equal pixels and strides.

    Nothing is evicted: an epoch reads every image once, so eviction would not increase hits.
    """

    def __init__(self, source: Source, pool: _Pool) -> None:
        super().__init__(source)
        self.pool = pool

    def has(self, row: int) -> bool:
        """Return whether a row's image is in memory."""
        return row in self.pool

    def read(self, row: int, key: int = 0, group: int = 0) -> Record:
        """Return the image of a row, from memory or from the source."""
        image = self.pool.get(row)
        self.count("misses" if image is None else "hits")
        if image is None:
            pixels = self.inner.read(row)[IMAGE].permute(1, 2, 0).contiguous()
            self.pool.put(row, pixels)
            image = pixels.permute(2, 0, 1)
        return {IMAGE: image}

    def readings(self) -> dict[str, float]:
        """Return the hit rate and the size in GiB, and the metrics of the inner source."""
        own = {"l1_hit_rate": self.hit_rate(), "l1_gib": self.pool.used_bytes / GIB}
        return {**own, **self.inner.readings()}


def _share_pool(rows: int, choose: Callable[[], int]) -> _Pool | None:
    """Return one pool for all ranks of a node, with the size that its first rank chooses; None for 0."""
    hosts = distributed.gather_objects(socket.gethostname())
    first = hosts.index(hosts[distributed.rank()])
    pool = None
    if distributed.rank() == first and (budget := choose()):
        log.debug("data.cache.memory_gib: caching decoded images in up to %.3g GiB", budget / GIB)
        pool = _Pool.create(rows, budget)
    path = distributed.gather_objects(None if pool is None else pool.path)[first]
    if pool is None and path is not None:
        try:
            pool = _Pool(os.open(path, os.O_RDWR | os.O_CLOEXEC), rows)
        except OSError as error:
            log.warning("data.cache.memory_gib: this rank cannot share memory with rank %d (%s)", first, error.strerror)
    distributed.barrier()  # the first rank must not end before all have opened it
    return pool


def _choose_budget(source: Source, collection: Collection, gib: float | str) -> int:
    """Return the bytes for decoded images, or 0.

    A number is limited by the free memory. `auto`: half of the free memory, limited by the estimated size of all images
    (from a few decoded ones); 0 if less than half of the images would fit.
    """
    free = free_memory()
    if gib != "auto":
        if gib * GIB > free:
            log.warning("data.cache.memory_gib: %g is more than the %.1f GiB of free memory", gib, free / GIB)
        return int(min(gib * GIB, free))
    sizes = [0]
    for row in spread(np.flatnonzero(collection.weights()), _ESTIMATE_IMAGES):
        with suppress(UnreadableImage):  # the loader reports it
            sizes.append(source.read(int(row))[IMAGE].numel())
    room, whole = _FREE_SHARE * free, len(collection) * sum(sizes) / max(1, len(sizes) - 1)
    if room < _WORTH_SHARE * whole:
        log.info(
            "data.cache.memory_gib: decoded images are not cached: all need about %.1f GiB, but %.1f are free; set a "
            "number to cache a part of them", whole / GIB, free / GIB,
        )  # fmt: skip
        return 0
    return int(min(room, _ESTIMATE_SLACK * whole + _CHECKED_BYTES))


def image_key(contents: Files, row: int, inputs: str) -> str | None:
    """Return the key of a row's image for the decoder `inputs`; None if its file is missing or was changed just now."""
    if (file := contents.file_of(row)) is None:  # remote shards are only replaced together with their index
        digest = contents.collection.row(row).sha256
        return None if digest is None else record_key(inputs, digest, contents.name_of(row))
    version = file_version(file.path)
    return version and record_key(inputs, os.path.abspath(file.path), file.offset, file.length, version)


class DiskCached(_Cached):
    """Images in a folder, by the file's state (path, range, size, times, inode) and the decoder's identity.

    So an edited file or another decoder never gets old records.
    Raises UserError (`data.cache.folder`) if the folder cannot be used.
    """

    def __init__(self, images: Images, config: CacheConfig) -> None:
        super().__init__(images)
        self._inputs = images.decoder.identity()
        self._store = LimitedStore(Path(config.folder), round(config.disk_gib * GIB))
        if isinstance(collection := images.listing, Collection) and distributed.is_main():
            about = {"root": collection.root, "recipe": self._inputs, "index": collection.arrow}
            self._store.note_use(about, np.array([]))

    def readings(self) -> dict[str, float]:
        """Return the hit rate and the size in GiB."""
        return {"l2_hit_rate": self.hit_rate(), "l2_gib": self._store.used_bytes() / GIB}

    def has(self, row: int) -> bool:
        """Return whether a row's image is in the cache."""
        key = self._key(row)
        return key is not None and self._store.has(key)

    def read(self, row: int, key: int = 0, group: int = 0) -> Record:
        """Return the image of a row. Raises UnreadableImage."""
        cache_key = self._key(row)  # before reading the file, so that a change in between invalidates the record
        record = None if cache_key is None else self._store.get(cache_key)
        self.count("misses" if record is None else "hits")
        if record is not None:
            shape = HEAD.unpack(record[: HEAD.size])
            return {IMAGE: torch.from_numpy(record[HEAD.size :].reshape(shape)).permute(2, 0, 1)}
        image = self.inner.read(row)[IMAGE]
        if cache_key is not None:
            self._keep(cache_key, image)
        return {IMAGE: image}

    def _key(self, row: int) -> str | None:
        """Return the key of a row's image; None if the file is missing or was changed just now."""
        return image_key(self.inner.contents, row, self._inputs)

    def _keep(self, key: str, image: Tensor) -> None:
        """Write the record of an image, uint8 [C, H, W]. After a failed write, warn once and write no more records."""
        if self.counts()["refused"]:
            return
        pixels = image.permute(1, 2, 0).contiguous().numpy()
        try:
            self._store.add(key, HEAD.pack(*pixels.shape) + pixels.tobytes())
        except OSError as error:
            self.count("refused")
            log.warning(
                "data.cache.folder: %s cannot be written (%s); the run continues and decodes uncached images",
                self._store.folder, error.strerror,
            )  # fmt: skip
