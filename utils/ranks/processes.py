"""Map a function over many items in processes, even if some items crash their process."""

import ctypes
import multiprocessing
import os
import shutil
import signal
import tempfile
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import suppress
from multiprocessing import util
from typing import TypeVar

from utils.errors import UserError
from utils.ranks.signals import leave_to_parent
from utils.record.logging import get_logger

log = get_logger(__name__)

Item = TypeVar("Item")
Result = TypeVar("Result")

PARALLEL_FROM = 512  # items; with fewer, starting processes takes longer than the work
_PR_SET_PDEATHSIG = 1  # linux/prctl.h
_MAX_ADDRESS_BYTES = 107  # linux/un.h: 108 with the zero at its end
_MAX_CHUNK = 64  # items per message to a process


def end_with_parent() -> None:
    """Have this process killed when its parent ends, even if it hangs; on Linux."""
    with suppress(AttributeError):  # macOS
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, ctypes.c_ulong(signal.SIGKILL))


def shorten_socket_folder() -> None:
    """Move multiprocessing's sockets from a long TMPDIR into a short folder, because an address has 107 bytes.

    Raises UserError (`runtime.workers`) if there is none.
    """
    folder = util.get_temp_dir()
    if len(os.fsencode(f"{folder}/listener-12345678")) <= _MAX_ADDRESS_BYTES:
        return
    short = next((place for place in ("/tmp", "/var/tmp", "/dev/shm") if os.access(place, os.W_OK | os.X_OK)), None)
    if short is None:
        raise UserError(f"runtime.workers: TMPDIR is too long for sockets ({folder}); name a short one, or set 0")
    own = tempfile.mkdtemp(prefix="pymp-", dir=short)
    log.info("TMPDIR is too long for the sockets of loader workers; they are in %s", own)
    util.Finalize(None, shutil.rmtree, args=(own, True), exitpriority=-100)  # as for the usual folder
    multiprocessing.current_process()._config["tempdir"] = own


def count_cores() -> int:
    """Return the number of cores that this process may use."""
    if not hasattr(os, "sched_getaffinity"):  # macOS
        return os.cpu_count() or 1
    return len(os.sched_getaffinity(0))


def map_items(
    function: Callable[[Item], Result], items: Sequence[Item], fatal: Callable[[Item], Result]
) -> Iterator[Result]:
    """Like `map_in_processes`, but in this process if there are few items or one core."""
    if len(items) < PARALLEL_FROM or count_cores() == 1:
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
            for result in pool.map(function, items[done:], chunksize=chunk_size):
                yield result
                done += 1
        except BrokenProcessPool:  # by an item of this chunk or, with several processes, of a later one
            for worker in list((pool._processes or {}).values()):
                worker.kill()  # Python 3.14 waits for them, and they ignore its SIGTERM
            pool.shutdown()  # its other workers free their memory before the chunk is tried again
            chunk = items[done : done + chunk_size]
            yield from [fatal(chunk[0])] if count == 1 else map_in_processes(function, chunk, fatal, 1)
            done += len(chunk)
        finally:  # without waiting for the workers, because the consumer may stop early
            workers = list((pool._processes or {}).values())
            pool.shutdown(wait=False, cancel_futures=True)
            for worker in workers:
                worker.kill()
