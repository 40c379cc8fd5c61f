"""Read the blocks of the next window ahead (`loop.sampling=blocks`), so that a slow disk reads shards in sequence.

    for batch in read_ahead(batches, source, sampler):

A thread reads them into the page cache while the loader draws from the window before. The samples do not change.
"""

import os
from collections.abc import Iterable, Iterator
from contextlib import suppress
from threading import Thread

from data.stream.order import BlockSampler, Draw
from data.stream.source import FileRange, Source, join_ranges

_READ_BYTES = 2**20


def read_ahead(batches: Iterable[list[Draw]], source: Source, sampler: BlockSampler) -> Iterator[list[Draw]]:
    """Yield the batches, and read each window while the one before it is drawn from."""
    reading = None
    for batch in batches:
        window = sampler.window_at(sampler.window_at(batch[0].position).stop)
        if window != reading:
            reading = window
            ranges = join_ranges(map(source.file_of, sampler.stored_rows(window)))
            Thread(target=_read, args=(ranges,), name="read-ahead", daemon=True).start()
        yield batch


def _read(ranges: Iterable[FileRange]) -> None:
    """Read byte ranges of files; errors are left to the reader."""
    for path, offset, length in ranges:
        with suppress(OSError), open(path, "rb", buffering=0) as shard:
            for start in range(offset, offset + length, _READ_BYTES):
                os.pread(shard.fileno(), _READ_BYTES, start)
