"""Prefetch the files of coming batches, or the parts of shards, into the system's page cache.

    for batch in ReadAhead(batches, lambda row: FileRange(files[row])):

A reader opens one file after another. A slow disk or file server answers many requests in nearly the time of one:
threads make the requests, and the reader finds the files in the page cache. The samples and their order do not change.
Parts of a shard that are near one another are one request.
Source: posix_fadvise(2), POSIX_FADV_WILLNEED.
"""

import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor

from data.source import FileRange, join_ranges
from data.stream import Draw

_FILES = 512  # requested ahead, at least
_THREADS = 16
_ASKED_BYTES = 2**17  # the kernel may read no more when it is asked (mm/readahead.c: force_page_cache_ra)
_READ_BYTES = 2**20


class ReadAhead:
    """Yield batches of draws, and request what they read some batches before; `file_of` returns a row's file or part.

    blocks_ahead: further rows to request with a batch, after its own.
    Systems without posix_fadvise (macOS, Windows) get the batches only.
    """

    def __init__(
        self,
        batches: Iterable[list[Draw]],
        file_of: Callable[[int], FileRange | None],
        blocks_ahead: Callable[[list[Draw]], list[int]] = lambda batch: [],
    ) -> None:
        self._batches, self._file_of, self._blocks_ahead = batches, file_of, blocks_ahead

    def __iter__(self) -> Iterator[list[Draw]]:
        """Yield the batches in their order."""
        if not hasattr(os, "posix_fadvise"):
            yield from self._batches
            return
        waiting: deque[list[Draw]] = deque()
        pool = ThreadPoolExecutor(_THREADS, thread_name_prefix="read-ahead")
        try:
            for batch in self._batches:
                # Here, not in the threads: they only make system calls, so a fork is safe.
                files = self._joined([draw.index for draw in batch]) + self._joined(self._blocks_ahead(batch))
                for first in range(min(_THREADS, len(files))):
                    pool.submit(_ask_for, files[first::_THREADS])
                waiting.append(batch)
                if (len(waiting) - 1) * len(batch) >= _FILES:
                    yield waiting.popleft()
            yield from waiting
        finally:
            pool.shutdown(wait=False, cancel_futures=True)

    def _joined(self, rows: list[int]) -> list[FileRange]:
        """Return what rows are read from, near parts of a file as one."""
        files = {row: file for row in rows if (file := self._file_of(row)) is not None}
        found = []
        for group in join_ranges(files):
            (path, start, _), end = files[group[0]], max(sum(files[row][1:]) for row in group)
            found.append(FileRange(path, start, end - start))
        return found


class DrawBatch(list[Draw]):
    """The draws of a batch. coming: those of the batch that the same worker reads next."""

    coming: Sequence[Draw] = ()


def with_coming(batches: Iterable[list[Draw]], workers: int) -> Iterator[DrawBatch]:
    """Yield batches that know the next one of their worker; a DataLoader deals them to its workers in turn."""
    waiting: deque[DrawBatch] = deque()
    for batch in map(DrawBatch, batches):
        if len(waiting) == max(workers, 1):
            waiting[0].coming = list(batch)
            yield waiting.popleft()
        waiting.append(batch)
    yield from waiting


def _ask_for(files: list[FileRange]) -> None:
    for file in files:
        will_need(file)


def will_need(file: FileRange) -> None:
    """Ask the system to read it in the background, or read it where it is large; its reader reports what is wrong."""
    try:
        descriptor = os.open(file.path, os.O_RDONLY | os.O_NONBLOCK)  # a pipe without a writer must not block
    except OSError:
        return
    try:
        if file.length <= _ASKED_BYTES:
            os.posix_fadvise(descriptor, file.offset, file.length, os.POSIX_FADV_WILLNEED)
            return
        for done in range(0, file.length, _READ_BYTES):
            os.pread(descriptor, min(_READ_BYTES, file.length - done), file.offset + done)
    except OSError:  # of a pipe, or of an offset that is none: there is nothing to read ahead
        pass
    finally:
        os.close(descriptor)
