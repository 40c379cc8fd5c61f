"""Read the blocks of the next window ahead (`loop.sampling=blocks`), so that a slow disk reads shards in sequence.

    for batch in read_ahead(batches, source, sampler):

A thread reads the blocks into the page cache while the loader draws from the previous window. Samples do not change.
"""

import os
from collections.abc import Iterable, Iterator
from contextlib import suppress
from threading import Thread

from fsspec.utils import merge_offset_ranges

from data.stream.order import BlockSampler, Draw
from data.stream.source import FileRange, Source

_READ_BYTES = 2**20
_GAP_BYTES = 2**16  # closer ranges are joined
_JOINED_BYTES = 2**23  # up to this size


def read_ahead(batches: Iterable[list[Draw]], source: Source, sampler: BlockSampler) -> Iterator[list[Draw]]:
    """Yield the batches, and read each window while the loader draws from the previous window."""
    reading = None
    for batch in batches:
        window = sampler.window_at(sampler.window_at(batch[0].position).stop)
        if window != reading:
            reading = window
            ranges = join_ranges(map(source.file_of, sampler.stored_rows(window)))
            Thread(target=_read, args=(ranges,), name="read-ahead", daemon=True).start()
        yield batch


def join_ranges(ranges: Iterable[FileRange | None]) -> list[FileRange]:
    """Return the ranges without None, sorted by file and offset, with close neighbours joined."""
    parts = [(part.path, part.offset, part.offset + part.length if part.length else None) for part in ranges if part]
    paths, starts, ends = (list(column) for column in zip(*parts)) if parts else ([], [], [])
    joined = zip(*merge_offset_ranges(paths, starts, ends, _GAP_BYTES, _JOINED_BYTES))
    return [FileRange(path, start, 0 if end is None else end - start) for path, start, end in joined]


def _read(ranges: Iterable[FileRange]) -> None:
    """Read byte ranges of files; errors are left to the reader."""
    for path, offset, length in ranges:
        with suppress(OSError), open(path, "rb", buffering=0) as shard:
            for start in range(offset, offset + length, _READ_BYTES):
                os.pread(shard.fileno(), _READ_BYTES, start)
