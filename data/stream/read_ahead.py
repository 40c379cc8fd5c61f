"""Prefetch the files or shard ranges of the next batches into the page cache.

    for batch in read_ahead(batches, source):

A reader opens one file after another, but a slow disk or file server can answer many requests in nearly the time of
one. Threads send the requests early, and the reader finds the files in the page cache. The samples and their order do
not change. Close ranges of a shard are joined into one request.
Source: posix_fadvise(2), POSIX_FADV_WILLNEED.
"""

import os
from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor

from data.stream.order import Draw, Sampler
from data.stream.source import FileRange, Source, join_ranges

_FILES = 512  # minimum number of files requested ahead
_THREADS = 16
_ASKED_BYTES = 2**17  # the kernel may read no more per request (mm/readahead.c: force_page_cache_ra)
_READ_BYTES = 2**20


def read_ahead(batches: Iterable[list[Draw]], source: Source, sampler: Sampler | None = None) -> Iterator[list[Draw]]:
    """Yield the batches, and request their files, and the rows that the sampler adds, some batches earlier."""
    waiting: deque[list[Draw]] = deque()
    pool = ThreadPoolExecutor(_THREADS, thread_name_prefix="read-ahead")
    try:
        for number, batch in enumerate(batches):
            # Computed here, because threads that only make system calls are safe with forks.
            rows = [draw.index for draw in batch]
            further = [] if sampler is None else sampler.rows_ahead(batch[0].position, len(batch), number == 0)
            files = [file for some in (rows, further) for file in join_ranges(map(source.file_of, some))]
            for first in range(min(_THREADS, len(files))):
                pool.submit(list, map(will_need, files[first::_THREADS]))
            waiting.append(batch)
            if (len(waiting) - 1) * len(batch) >= _FILES:
                yield waiting.popleft()
        yield from waiting
    finally:
        pool.shutdown(wait=False, cancel_futures=True)


def will_need(file: FileRange) -> None:
    """Ask the system to read a small range in the background, or read a large one; errors are left to the reader."""
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
    except OSError:  # a pipe, or an invalid offset: nothing to read ahead
        pass
    finally:
        os.close(descriptor)
