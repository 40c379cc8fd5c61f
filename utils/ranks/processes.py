"""Work on many items in one process per core, of which some may kill the process that works on them."""

import multiprocessing
import os
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from typing import TypeVar

Item = TypeVar("Item")
Result = TypeVar("Result")

_CHUNK = 64  # items that a process is handed at once


def map_in_processes(
    function: Callable[[Item], Result], items: Sequence[Item], fatal: Callable[[Item], Result]
) -> Iterator[Result]:
    """Yield `function` of each item, in order; `fatal` of one on which a process dies (a crash, a lack of memory).

    `function` and items must be picklable. What was handed out together with a fatal item is done again, one by one.
    """
    done = 0
    while done < len(items):
        try:
            with _processes(os.cpu_count() or 1) as pool:
                for result in pool.map(function, items[done:], chunksize=_CHUNK):
                    yield result
                    done += 1
        except BrokenProcessPool:
            # Which item it was is not told. After one chunk it is found, or so much nearer.
            chunk = items[done : done + _CHUNK]
            yield from _one_by_one(function, chunk, fatal)
            done += len(chunk)


def _one_by_one(
    function: Callable[[Item], Result], items: Sequence[Item], fatal: Callable[[Item], Result]
) -> Iterator[Result]:
    """Yield the same from one process at a time, which has one item at a time; a new one where it dies."""
    remaining = iter(items)
    item = next(remaining, None)
    while item is not None:
        try:
            with _processes(1) as pool:
                while item is not None:
                    yield pool.submit(function, item).result()
                    item = next(remaining, None)
        except BrokenProcessPool:
            yield fatal(item)
            item = next(remaining, None)


def _processes(count: int) -> ProcessPoolExecutor:
    """Return so many processes, spawned: by now this one may run threads, which a fork does not survive.

    An executor, since one that dies leaves multiprocessing.Pool waiting for ever.
    """
    return ProcessPoolExecutor(count, mp_context=multiprocessing.get_context("spawn"))
