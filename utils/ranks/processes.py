"""Work on many items in one process per core that this one may use; some items may crash their process."""

import multiprocessing
import os
import signal
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from typing import TypeVar

Item = TypeVar("Item")
Result = TypeVar("Result")

PARALLEL_FROM = 512  # items; below, starting processes takes longer than the work
_MAX_CHUNK = 64  # items that a process gets at once


def count_cores() -> int:
    """Return the cores that this process may use: a scheduler may give it some of the machine's."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def map_items(
    function: Callable[[Item], Result], items: Sequence[Item], fatal: Callable[[Item], Result]
) -> Iterator[Result]:
    """Yield what `map_in_processes` does; in this process where items or cores are few."""
    if len(items) < PARALLEL_FROM or count_cores() == 1:
        return map(function, items)
    return map_in_processes(function, items, fatal)


def map_in_processes(
    function: Callable[[Item], Result], items: Sequence[Item], fatal: Callable[[Item], Result], count: int | None = None
) -> Iterator[Result]:
    """Yield `function` of each item, in order; `fatal` of one on which a process dies (a crash, a lack of memory).

    count: of processes, None for one per core. `function` and items must be picklable. Other items of a process that
    died are processed again.
    """
    count, done = count or count_cores(), 0
    chunk_size = 1 if count == 1 else max(1, min(_MAX_CHUNK, len(items) // (4 * count)))
    while done < len(items):
        # multiprocessing.Pool would wait forever for a process that died, and a fork does not copy our threads.
        pool = ProcessPoolExecutor(
            count, multiprocessing.get_context("spawn"), initializer=signal.signal,
            initargs=(signal.SIGINT, signal.SIG_IGN),  # Ctrl-C is for the parent
        )  # fmt: skip
        try:
            with pool:
                for result in pool.map(function, items[done:], chunksize=chunk_size):
                    yield result
                    done += 1
        except BrokenProcessPool:  # the item is in this chunk or, of several processes, in one of the next
            chunk = items[done : done + chunk_size]
            yield from [fatal(chunk[0])] if count == 1 else map_in_processes(function, chunk, fatal, 1)
            done += len(chunk)
