"""Prefetch the files of coming batches, or the parts of shards, into the system's page cache.

    for batch in ReadAhead(batches, lambda draw: FileRange(files[draw.index])):

A reader opens one file after another. A slow disk or file server answers many requests in nearly the time of one:
threads make the requests, and the reader finds the files in the page cache. The samples and their order do not change.
Source: posix_fadvise(2), POSIX_FADV_WILLNEED.
"""

import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor

from data.source import FileRange
from data.stream import Draw

_FILES = 512  # requested ahead, at least
_THREADS = 16


class ReadAhead:
    """Yield batches of draws, and request what they read some batches before; `file_of` returns a draw's file or part.

    Systems without posix_fadvise (macOS, Windows) get the batches only.
    """

    def __init__(self, batches: Iterable[list[Draw]], file_of: Callable[[Draw], FileRange | None]) -> None:
        self._batches, self._file_of = batches, file_of

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
                files = [file for file in map(self._file_of, batch) if file is not None]
                for first in range(min(_THREADS, len(files))):
                    pool.submit(_ask_for, files[first::_THREADS])
                waiting.append(batch)
                if (len(waiting) - 1) * len(batch) >= _FILES:
                    yield waiting.popleft()
            yield from waiting
        finally:
            pool.shutdown(wait=False, cancel_futures=True)


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
    """Ask the system to read it in the background; its reader reports a file that cannot be opened."""
    try:
        descriptor = os.open(file.path, os.O_RDONLY | os.O_NONBLOCK)  # a pipe without a writer must not block
    except OSError:
        return
    try:
        os.posix_fadvise(descriptor, file.offset, file.length, os.POSIX_FADV_WILLNEED)
    except OSError:  # of a pipe, or of an offset that is none: there is nothing to read ahead
        pass
    finally:
        os.close(descriptor)
