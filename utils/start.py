"""The start of a root script: what it needs, `--help` before the slow imports, and the settings of its process.

from utils.start import begin

begin(__doc__)
"""

from __future__ import annotations  # any Python must read this file, to be told which one is needed

import ctypes
import os
import sys
import time
from contextlib import suppress
from pathlib import Path
from types import TracebackType

from utils.errors import EXIT_USER_ERROR

STARTED = time.monotonic()  # of the script
_BUSY = (1, 3, 6, 7)  # fields of a line of /proc/stat: user, system, and both kinds of interrupts; without nice
_M_TRIM_THRESHOLD = -1  # malloc.h
_M_MMAP_MAX = -4
_MOST = 2**31 - 1  # mallopt takes an int


_NEEDS = (
    "Atelier needs Python 3.11 or later on Linux, or on macOS for small runs; on Windows use WSL 2 (docs/install.md)"
)
_INSTALL = "run: make install, then: source .venv/bin/activate (docs/install.md)"
_MAC = "macOS: the CPU alone, in one process; GPUs, loader workers, the memory cache and SLURM need Linux"

_busy_before: float | None = None


def begin(documentation: str) -> None:
    """Answer `--help` and end the process, or prepare the process for its work.

    documentation: the script's docstring. Ends with a message if the system, Python or its packages do not fit.
    """
    global _busy_before
    if sys.platform not in ("linux", "darwin") or sys.version_info < (3, 11):
        _refuse(f"{_NEEDS}; found Python {sys.version.split()[0]} on {sys.platform}")
    sys.excepthook = _explain
    _busy_before = _busy_sec()
    keep_freed_memory()
    if documentation != sys.modules["__main__"].__doc__:  # a process of a pool imports its parent's script
        return
    if sys.getfilesystemencoding() != "utf-8":  # a forced locale: names would not be UTF-8
        os.execve(sys.executable, [sys.executable, *sys.orig_argv[1:]], {**os.environ, "PYTHONUTF8": "1"})
    for stream in (sys.stdout, sys.stderr):
        stream.reconfigure(encoding="utf-8", errors="backslashreplace")
    if {"--help", "-h"} & set(sys.argv):
        from utils.config.help import describe

        sys.stdout.write(describe(Path(sys.argv[0]).resolve(), documentation, sys.argv[1:]))
        sys.exit()
    if sys.platform == "darwin":
        sys.stderr.write(_MAC + "\n")


def _refuse(message: str) -> None:
    sys.stderr.write(message + "\n")
    sys.exit(EXIT_USER_ERROR)


def _explain(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
    """Show in one line that Python lacks a package, as it does outside of the environment; others as usual."""
    if kind is ModuleNotFoundError and not Path(__file__).parents[1].joinpath(str(error.name).split(".")[0]).exists():
        _refuse(f"{error} in {sys.executable}; {_INSTALL}")
    sys.__excepthook__(kind, error, trace)


def keep_freed_memory() -> None:
    """Let the C library keep freed memory, instead of giving each block of more than 32 MiB back.

    A tensor that takes the place of a freed one then costs no page faults: on a CPU, a batch's colour changes take a
    sixth of the time, and a step of a ResNet 0.75 to 0.95. The user's own settings of malloc stay.
    """
    if any(name.startswith("MALLOC_") or name == "GLIBC_TUNABLES" for name in os.environ):
        return
    with suppress(AttributeError):  # musl has no mallopt
        mallopt = ctypes.CDLL(None).mallopt
        mallopt(_M_MMAP_MAX, 0)
        mallopt(_M_TRIM_THRESHOLD, _MOST)


def _busy_sec() -> float:
    """Return the seconds that other processes have used of the cores that this one may use."""
    ticks = 0
    with suppress(OSError, AttributeError), open("/proc/stat") as file:  # of Linux
        cores = {f"cpu{core}" for core in os.sched_getaffinity(0)}
        for line in file:
            words = line.split()
            if words[0] in cores:
                ticks += sum(int(words[field]) for field in _BUSY)
    return ticks / os.sysconf("SC_CLK_TCK") - time.process_time()


def cores_of_others() -> float:
    """Return how many of this process's cores others have used on average since the process began."""
    if _busy_before is None:  # a test or a notebook, which did not call `begin`
        return 0.0
    return max(0.0, _busy_sec() - _busy_before) / (time.monotonic() - STARTED)
