"""The start of a root script: what it needs, `--help` before the slow imports, and the settings of its process.

from utils.start import begin

begin(__doc__)
"""

import ctypes
import os
import sys
import time
from contextlib import suppress
from pathlib import Path

from utils.errors import EXIT_USER_ERROR

STARTED = time.monotonic()  # of the script
_BUSY = (1, 3, 6, 7)  # fields of a line of /proc/stat: user, system, and both kinds of interrupts; without nice
_M_TRIM_THRESHOLD = -1  # malloc.h
_M_MMAP_MAX = -4
_MOST = 2**31 - 1  # mallopt takes an int


_busy_before: float | None = None


def begin(documentation: str) -> None:
    """Answer `--help` and end the process, or prepare the process for its work.

    documentation: the script's docstring. Ends with a message on a system other than Linux.
    """
    global _busy_before
    if not hasattr(os, "sched_getaffinity"):
        sys.stderr.write("Atelier needs Linux; on Windows use WSL, on macOS a Linux container or virtual machine\n")
        sys.exit(EXIT_USER_ERROR)
    _busy_before = _busy_sec()
    keep_freed_memory()
    if {"--help", "-h"} & set(sys.argv) and documentation == sys.modules["__main__"].__doc__:
        from utils.config.help import describe

        sys.stdout.write(describe(Path(sys.argv[0]).resolve(), documentation, sys.argv[1:]))
        sys.exit()


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
    cores = {f"cpu{core}" for core in os.sched_getaffinity(0)}
    ticks = 0
    with suppress(OSError), open("/proc/stat") as file:
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
