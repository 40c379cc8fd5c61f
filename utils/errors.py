"""The errors and exit statuses that a user meets.

`UserError` is for what a user can cause and fix: only its message is shown, without a traceback. Every other exception
is a defect of ours and keeps its traceback.
"""

import difflib
import re
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager

EXIT_OK = 0
EXIT_CRASH = 1
EXIT_USER_ERROR = 2
EXIT_LOST_RANK = 70  # or a loader's worker: a process of the job was ended from outside
EXIT_STOPPED = 75
EXIT_INTERRUPTED = 130  # by Ctrl-C, where there was nothing to save

_SHOWN = 20  # names in a message
_END_REPORTED_SEC = 1.0  # an ended process sends SIGCHLD milliseconds after its connections break


class UserError(ValueError):
    """Tell the user which key or file is wrong, what was found, what is allowed and what to do."""


@contextmanager
def about(key: str) -> Iterator[None]:
    """Put the key that names a file before the message of a UserError raised inside, unless it names a key itself."""
    try:
        yield
    except UserError as error:
        if not re.match(r"[a-z_][a-z_0-9.]*: ", str(error)):
            error.args = (f"{key}: {error}",)
        raise


def lost_worker(error: BaseException | None) -> str | None:
    """Return what to tell the user where torch says that a loader's worker process has ended, None for other errors.

    torch raises it in the main thread wherever that is, so no place that reads a loader could catch it, and another
    error may follow from it. A worker's connection breaks before the system reports its end: wait for that report.
    """
    if isinstance(error, ConnectionError | EOFError) and error.__cause__ is None:
        try:
            time.sleep(_END_REPORTED_SEC)
        except RuntimeError as reported:  # by torch's handler of SIGCHLD, which asks for the state of each worker
            error.__cause__ = reported
    while error is not None:
        found = re.search(r"DataLoader worker \(pid\(?s?\)? ([\d, ]+)\) (.*)", str(error), re.DOTALL)
        if found is not None and isinstance(error, RuntimeError):
            said = " ".join(found.group(2).split()).rstrip(". ")
            return (
                f"runtime.workers: loader worker {found.group(1)} of this rank has ended ({said}). Most often the "
                "machine ran out of memory (see dmesg or the scheduler's report) or out of shared memory (/dev/shm): "
                "set a lower runtime.workers (0: none), runtime.prefetch_batches or loop.batch_size. The same command "
                "resumes from the last checkpoint"
            )
        error = error.__cause__ or error.__context__
    return None


def close_names(name: str, known: Iterable[str]) -> str:
    """Return `close: a, b` for the nearest known names, or all of them (the first of many) where none is near."""
    known = sorted(known)
    near = difflib.get_close_matches(name, known, n=3, cutoff=0.5)
    if near:
        return "close: " + ", ".join(near)
    more = f", ... ({len(known)} in all)" if len(known) > _SHOWN else ""
    return "known: " + ", ".join(known[:_SHOWN]) + more
