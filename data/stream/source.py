"""Sources of samples: a source returns the record of a row, a dictionary of tensors.

A source has `read` and `blank`. Sources are stacked: a cache or decoder reads from its `inner` source, down to the
encoded files (data/images/). The protocols below are optional features of a layer.
"""

import os
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple, Protocol, runtime_checkable

import torch
from fsspec.utils import merge_offset_ranges
from torch import Tensor

IMAGE = "image"  # the name of the image in a record

_GAP_BYTES, _JOINED_BYTES = 2**16, 2**23  # ranges closer than this are joined, up to a size
_PROCESSES = 256  # rows of counters; processes of a run mostly have consecutive ids

Record = dict[str, Tensor]


class UnreadableImage(Exception):
    """An image that cannot be decoded: its path, the kind of fault, and details. Can be pickled."""

    def __init__(self, path: str, kind: str, detail: str) -> None:
        """Pass all arguments on, because pickling restores an exception from them."""
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
    """A file or a byte range of it; length 0: from `offset` to the end."""

    path: str
    offset: int = 0
    length: int = 0


def join_ranges(ranges: Iterable[FileRange]) -> list[FileRange]:
    """Return the ranges, sorted by file and offset, with close neighbours joined."""
    parts = [(path, offset, offset + length if length else None) for path, offset, length in ranges]
    paths, starts, ends = (list(column) for column in zip(*parts)) if parts else ([], [], [])
    joined = zip(*merge_offset_ranges(paths, starts, ends, _GAP_BYTES, _JOINED_BYTES))
    return [FileRange(path, start, 0 if end is None else end - start) for path, start, end in joined]


class Source(Protocol):
    """Return the records of rows, also in forked processes."""

    def read(self, row: int, key: int = 0) -> Record:
        """Return the record of a row. Raises UnreadableImage.

        key: the key of the draw, for sources with several records per row.
        """

    def blank(self, group: int) -> Record:
        """Return the record that replaces an unreadable one, with the shape of a group; its weight is 0."""


@runtime_checkable
class OnDisk(Protocol):
    """A layer that reads files, so they can be read ahead into the page cache."""

    def file_of(self, row: int) -> FileRange:
        """Return the file or byte range of a row."""


@runtime_checkable
class Prefetching(Protocol):
    """A layer with slow single reads, which can request many rows at once."""

    def prefetch(self, rows: Sequence[int]) -> None:
        """Start to read the rows of a batch."""


def layers(source: Source) -> list[Any]:
    """Return a source and its inner layers; the last one is the store."""
    stack: list[Any] = [source]
    while (inner := getattr(stack[-1], "inner", None)) is not None:
        stack.append(inner)
    return stack


def not_cached(source: Source, rows: Iterable[int]) -> list[int]:
    """Return the rows that no cache has."""
    caches = [layer for layer in layers(source) if isinstance(layer, Cached)]
    return [row for row in rows if not any(cache.has(row) for cache in caches)]


class Cached:
    """A source that caches records of its inner source and counts hits and misses, loader workers included."""

    def __init__(self, inner: Source, *counted: str) -> None:
        self.inner, self.blank = inner, inner.blank
        self._columns = {name: column for column, name in enumerate(("hits", "misses", *counted))}
        # Each process has its own row, so no lock is needed.
        self._counts = torch.zeros(_PROCESSES, len(self._columns), dtype=torch.int64).share_memory_()

    def count(self, name: str, amount: int = 1) -> None:
        """Add to a count."""
        self._counts.numpy()[os.getpid() % _PROCESSES, self._columns[name]] += amount

    def counts(self) -> dict[str, int]:
        """Return the counts over all processes."""
        return dict(zip(self._columns, self._counts.sum(dim=0).tolist()))

    def has(self, row: int) -> bool:
        """Return whether the record of a row is cached."""
        raise NotImplementedError

    def readings(self) -> dict[str, float]:
        """Return metrics of the cache, by name."""
        raise NotImplementedError

    def hit_rate(self) -> float:
        """Return the share of reads that were hits."""
        counts = self.counts()
        return counts["hits"] / max(1, counts["hits"] + counts["misses"])
