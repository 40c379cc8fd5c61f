"""Map a function over many items in processes, even if some items crash their process."""

import ctypes
import multiprocessing
import os
import signal
import tempfile
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import suppress
from multiprocessing import util
from pathlib import Path
from typing import TypeVar

import numpy as np

from utils.io.files import output_errors
from utils.ranks.signals import leave_to_parent
from utils.record.logging import log

Item = TypeVar("Item")
Result = TypeVar("Result")

_PR_SET_PDEATHSIG = 1  # linux/prctl.h
_LONGEST_TMPDIR = 107 - len("/pymp-12345678/listener-12345678")  # linux/un.h: 108 bytes with the zero at their end
_MAX_CHUNK = 64  # items per message to a process


def end_with_parent() -> None:
    """Have this process killed when its parent ends, even if it hangs; on Linux."""
    with suppress(AttributeError):  # macOS
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, ctypes.c_ulong(signal.SIGKILL))


def shorten_socket_folder() -> None:
    """Use /tmp for temporary files if TMPDIR is too long for multiprocessing's sockets, whose address has 107 bytes.

    Raises UserError (`runtime.workers`) if there is no room for the sockets.
    """
    if len(os.fsencode(tempfile.gettempdir())) > _LONGEST_TMPDIR:
        tempfile.tempdir = "/tmp"
        log.info("TMPDIR is too long for the sockets of loader workers; temporary files are in /tmp")
    with output_errors("runtime.workers", Path(tempfile.gettempdir()), "name another TMPDIR, or set 0"):
        util.get_temp_dir()


def count_cores() -> int:
    """Return the number of cores that this process may use."""
    if not hasattr(os, "sched_getaffinity"):  # macOS
        return os.cpu_count() or 1
    return len(os.sched_getaffinity(0))


def map_parts(function: Callable, values: np.ndarray, size: int) -> np.ndarray:
    """Apply a function to parts of `size` rows in a thread for each core; return the joined results."""
    with ThreadPoolExecutor(count_cores()) as pool:
        return np.concatenate([*pool.map(function, np.split(values, range(size, len(values), size)))])


def map_items(
    function: Callable[[Item], Result], items: Sequence[Item], fatal: Callable[[Item], Result], least: int
) -> Iterator[Result]:
    """Like `map_in_processes`, but in this process for fewer than `least` items, or on one core."""
    if len(items) < least or count_cores() == 1:
        return map(function, items)
    return map_in_processes(function, items, fatal)


def map_in_processes(
    function: Callable[[Item], Result], items: Sequence[Item], fatal: Callable[[Item], Result], count: int | None = None
) -> Iterator[Result]:
    """Yield `function(item)` in order, or `fatal(item)` for an item that kills its process (crash, out of memory).

    count: the number of processes; None: one per core. `function` and items must be picklable. Other items of a killed
    process are processed again.
    """
    count = count or count_cores()
    done = 0
    chunk_size = 1 if count == 1 else max(1, min(_MAX_CHUNK, len(items) // (4 * count)))
    while done < len(items):
        # multiprocessing.Pool would wait forever for a killed process; a fork would not copy our threads.
        pool = ProcessPoolExecutor(count, multiprocessing.get_context("spawn"), initializer=leave_to_parent)
        try:
            with suppress(BrokenProcessPool):
                for result in pool.map(function, items[done:], chunksize=chunk_size):
                    yield result
                    done += 1
        finally:  # the consumer may stop early
            workers = list((pool._processes or {}).values())
            for worker in workers:  # first: Python 3.14 waits for them under the lock that `shutdown` takes
                worker.kill()  # they ignore its SIGTERM
            pool.shutdown(wait=False, cancel_futures=True)
            for worker in workers:
                worker.join()  # frees its memory
        if chunk := items[done : done + chunk_size]:  # an item of it, or of a later chunk, has killed its process
            yield from [fatal(chunk[0])] if count == 1 else map_in_processes(function, chunk, fatal, 1)
            done += len(chunk)
