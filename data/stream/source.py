"""Where samples come from: a source gives the record of a row, a dictionary of tensors.

A source must have `read` and `blank`. It may stand in front of another one, its `inner`: caches, then the decoder, then
the encoded files (data/images/). What else a layer can do is a protocol below, which it has or has not.
"""

import os
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple, Protocol, runtime_checkable

import torch
from fsspec.utils import merge_offset_ranges
from torch import Tensor

IMAGE = "image"  # the tensor of a record that views are made of

_GAP_BYTES, _JOINED_BYTES = 2**16, 2**23  # ranges as near as this are one request, up to a size
_PROCESSES = 256  # processes that are alive at once have neighbouring numbers

Record = dict[str, Tensor]


class UnreadableImage(Exception):
    """One image that cannot be decoded: its path, the kind of fault, and details. Survives pickling."""

    def __init__(self, path: str, kind: str, detail: str) -> None:
        """Keep all as arguments, which is what pickling restores an exception from."""
        super().__init__(path, kind, detail)
        self.path, self.kind, self.detail = path, kind, detail

    @property
    def reason(self) -> str:
        """Return `kind (detail)`."""
        return f"{self.kind} ({self.detail})"

    def __str__(self) -> str:
        """Return `path: kind (detail)`."""
        return f"{self.path}: {self.reason}"


class FileRange(NamedTuple):
    """A file, or `length` bytes of it; 0: all from `offset` on."""

    path: str
    offset: int = 0
    length: int = 0


def join_ranges(ranges: Iterable[FileRange]) -> list[FileRange]:
    """Return the ranges in the order of files and offsets, those that are near one another as one."""
    parts = [(path, offset, offset + length if length else None) for path, offset, length in ranges]
    paths, starts, ends = (list(column) for column in zip(*parts)) if parts else ([], [], [])
    joined = zip(*merge_offset_ranges(paths, starts, ends, _GAP_BYTES, _JOINED_BYTES))
    return [FileRange(path, start, 0 if end is None else end - start) for path, start, end in joined]


class Source(Protocol):
    """Give the records of rows, in any process that was forked from the one that made it."""

    def read(self, row: int, key: int = 0) -> Record:
        """Return a row's record. Raises UnreadableImage where that is not possible.

        key: of the draw, for a source that has several records of a row.
        """

    def blank(self, group: int) -> Record:
        """Return the record that replaces an unreadable one of a shape group; its weight is 0."""


@runtime_checkable
class OnDisk(Protocol):
    """A layer that reads files, which may be read ahead into the system's page cache."""

    def file_of(self, row: int) -> FileRange:
        """Return the part of a file that a row is read from."""


@runtime_checkable
class Prefetching(Protocol):
    """A layer whose every read would wait for an answer, so that it asks for many at once."""

    def prefetch(self, rows: Sequence[int]) -> None:
        """Begin to read the rows of a batch."""


def layers(source: Source) -> list[Any]:
    """Return a source, what it reads from, and so on; the last one is the store."""
    found: list[Any] = [source]
    while (inner := getattr(found[-1], "inner", None)) is not None:
        found.append(inner)
    return found


def not_cached(source: Source, rows: Iterable[int]) -> list[int]:
    """Return the rows that no cache has, which the store will be asked for."""
    caches = [layer for layer in layers(source) if isinstance(layer, Cached)]
    return [row for row in rows if not any(cache.has(row) for cache in caches)]


class Cached:
    """A source that keeps records of the one behind it, and counts, with its loader workers, what it was asked for."""

    def __init__(self, inner: Source, *counted: str) -> None:
        self.inner, self.blank = inner, inner.blank
        self._columns = {name: column for column, name in enumerate(("hits", "misses", *counted))}
        # Each process adds in a row of its own, without a lock.
        self._counts = torch.zeros(_PROCESSES, len(self._columns), dtype=torch.int64).share_memory_()

    def count(self, name: str, amount: int = 1) -> None:
        """Add to a count."""
        self._counts.numpy()[os.getpid() % _PROCESSES, self._columns[name]] += amount

    def counts(self) -> dict[str, int]:
        """Return the counts over all processes."""
        return dict(zip(self._columns, self._counts.sum(dim=0).tolist()))

    def has(self, row: int) -> bool:
        """Return whether a row's record is kept."""
        raise NotImplementedError

    def readings(self) -> dict[str, float]:
        """Return what has been counted so far, by name."""
        raise NotImplementedError

    def hit_rate(self) -> float:
        """Return the share of reads that the cache has answered."""
        counts = self.counts()
        return counts["hits"] / max(1, counts["hits"] + counts["misses"])
