"""User errors and exit statuses.

`UserError` is for problems that a user can cause and fix: its message is shown without a traceback. Every other
exception is a defect in Atelier and keeps its traceback.
"""

from __future__ import annotations  # as in utils/start.py

import difflib
import re
import sys
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager

EXIT_OK = 0
EXIT_CRASH = 1
EXIT_USER_ERROR = 2
EXIT_LOST_RANK = 70  # a rank or a loader worker was killed
EXIT_STOPPED = 75
EXIT_INTERRUPTED = 130  # Ctrl-C without anything to save

# `make install-NAME` installs the packages of requirements-NAME.txt. The modules that a command may lack, by NAME:
_EXTRAS = {
    "diffusers": "-sdxl",
    "peft": "-sdxl",
    "open_clip": "-sdxl",
    "ftfy": "-sdxl",
    "nicegui": "-view",
    "s3fs": "-cloud",
}

_LESS = "set a smaller batch size, or a smaller model or image"
_LIMITS = {  # by a sign of them in an error, which has many classes
    "^OutOfMemoryError": _LESS,
    "^MemoryError|map segment|[Cc]an('t|not) allocate memory": f"raise the limit of this shell (ulimit -v), or {_LESS}",
    "File too large": "raise the limit of this shell (ulimit -f), or keep less (data.cache.memory_gib=0)",
    "No space left": "make room there",
}
_SHOWN = 20  # names in a message
_END_REPORTED_SEC = 1.0  # SIGCHLD follows milliseconds after the connections of an ended process break


class UserError(ValueError):
    """A mistake of the user: the message names the key or file, the value found, the values allowed and a fix."""

    status = EXIT_USER_ERROR


class DiskFull(UserError):
    """A write failed for lack of room, which is no mistake in the command."""

    status = EXIT_CRASH


@contextmanager
def about(key: str) -> Iterator[None]:
    """Prefix a UserError raised inside with a key, unless its message already begins with one."""
    try:
        yield
    except UserError as error:
        if not re.match(r"[a-z_][a-z_0-9.]*: ", str(error)):
            error.args = (f"{key}: {error}",)
        raise


def reason_of(error: BaseException) -> str:
    """Return the first line of an error, or its class if it says nothing."""
    return (str(error) or type(error).__name__).splitlines()[0]


def find_lack(error: BaseException) -> str | None:
    """Return the package, memory or room that the machine lacks, and what to do; None for other errors."""
    if isinstance(error, ModuleNotFoundError):
        target = _EXTRAS.get(str(error.name).partition(".")[0], "")
        activate = f"make install{target}, then: source .venv/bin/activate"
        return f"{error} in {sys.executable}; run: {activate} (docs/install.md)"
    text = f"{type(error).__name__}: {error}".splitlines()[0].rstrip(": ")
    return next((f"{text}; {advice}" for sign, advice in _LIMITS.items() if re.search(sign, text)), None)


def lost_worker(error: BaseException | None) -> str | None:
    """Return a message for the user if a DataLoader worker has ended, None for other errors.

    torch raises this error from a signal handler, anywhere in the main thread, and another error may follow from it. A
    worker's connection breaks before the system reports its end, so this function waits for the report.
    """
    if isinstance(error, ConnectionError | EOFError) and error.__cause__ is None:
        try:
            time.sleep(_END_REPORTED_SEC)
        except RuntimeError as reported:  # from torch's SIGCHLD handler, which checks each worker
            error.__cause__ = reported
    while error is not None:
        found = re.search(r"DataLoader worker \(pid\(?s?\)? ([\d, ]+)\) (.*)", str(error), re.DOTALL)
        if found is not None and isinstance(error, RuntimeError):
            reason = " ".join(found.group(2).split()).rstrip(". ")
            return (
                f"runtime.workers: loader worker {found.group(1)} of this rank has ended ({reason}). Most often the "
                "machine ran out of memory (see dmesg or the scheduler's report) or out of shared memory (/dev/shm): "
                "set a lower runtime.workers (0: none), runtime.prefetch_batches or loop.micro_batch_size. The same "
                "command resumes from the last checkpoint"
            )
        error = error.__cause__ or error.__context__
    return None


def close_names(name: str, known: Iterable[str]) -> str:
    """Return `close: a, b` with the nearest known names, or `known: ...` with the first names if none is near.

    Dotted keys of the same group come first.
    """
    group = name.rpartition(".")[0]
    known = sorted(set(known), key=lambda key: (key.rpartition(".")[0] != group, key))
    near = [key for key in known if key.endswith(f".{name}")]  # lr: optim.lr
    near = near[:3] or difflib.get_close_matches(name, known, n=3, cutoff=0.5)
    return f"close: {', '.join(near)}" if near else f"known: {', '.join(known[:_SHOWN])}"
