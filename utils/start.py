"""The start of a root script: what it needs, `--help` before the slow imports, and the settings of its process.

from utils.start import begin

begin(__doc__)
"""

from __future__ import annotations  # any Python must read this file, to be told which one is needed

import ctypes
import gc
import os
import sys
import time
from contextlib import suppress
from pathlib import Path
from pkgutil import resolve_name
from typing import Any

from utils.errors import EXIT_INTERRUPTED, EXIT_USER_ERROR, find_lack

STARTED = time.monotonic()  # of the script
_M_TRIM_THRESHOLD = -1  # malloc.h
_M_MMAP_MAX = -4
_MOST = 2**31 - 1  # mallopt takes an int

_NEEDS = (
    "Atelier needs Python 3.11 or later on Linux, or on macOS for small runs; on Windows use WSL 2 (docs/install.md)"
)
# The platforms that Atelier runs on, and what each lacks.
_LACKS = {
    "linux": "",
    "darwin": "macOS: the CPU alone, in one process; GPUs, loader workers, the memory cache and SLURM need Linux\n",
}


def begin(documentation: str) -> None:
    """Answer `--help` and end the process, or prepare the process for its work.

    documentation: the script's docstring. Ends with a message if the system, Python or its packages do not fit.
    """
    if sys.platform not in _LACKS or sys.version_info < (3, 11):
        _refuse(f"{_NEEDS}; found Python {sys.version.split()[0]} on {sys.platform}")
    sys.excepthook = _explain
    keep_freed_memory()
    if documentation != sys.modules["__main__"].__doc__:  # a process of a pool imports its parent's script
        return
    if sys.getfilesystemencoding() != "utf-8":  # a forced locale: names would not be UTF-8
        os.execve(sys.executable, [sys.executable, *sys.orig_argv[1:]], {**os.environ, "PYTHONUTF8": "1"})
    sys.stdout = sys.stdout or open(os.devnull, "w")  # noqa: SIM115 (closed by the caller, `>&-`, it would be None)
    sys.stderr = sys.stderr or open(os.devnull, "w")  # noqa: SIM115
    for stream in (sys.stdout, sys.stderr):
        stream.reconfigure(encoding="utf-8", errors="backslashreplace")
    if {"--help", "-h"} & set(sys.argv):
        from utils.config.help import show_help

        sys.stdout.write(show_help(Path(sys.argv[0]).resolve(), documentation, sys.argv[1:]))
        sys.exit()
    sys.stderr.write(_LACKS[sys.platform])
    import psutil

    psutil.cpu_times_percent(percpu=True)  # `cores_of_others` counts from here on
    gc.disable()  # what imports make stays: collecting among it takes an eighth of their time


def _refuse(message: str, status: int = EXIT_USER_ERROR) -> None:
    sys.stderr.write(message + "\n")
    sys.exit(status)


def _explain(*raised: Any) -> None:
    """Show in one line that Python lacks a package or memory, or was interrupted in the imports; others as usual."""
    if isinstance(raised[1], KeyboardInterrupt):
        _refuse("interrupted", EXIT_INTERRUPTED)
    if lack := find_lack(raised[1]):
        _refuse(lack)
    sys.__excepthook__(*raised)


def open_name(name: str) -> Any:
    """Return the object with a name `module:function`. Garbage is not collected during its imports."""
    if name.partition(":")[0] in sys.modules:
        return resolve_name(name)
    gc.disable()
    found = resolve_name(name)
    gc.freeze()
    gc.enable()
    return found


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


def cores_of_others() -> float:
    """Return how many of this process's cores others have used on average since `begin`; 0 on macOS."""
    import psutil

    shares = psutil.cpu_times_percent(percpu=True)
    cores = getattr(os, "sched_getaffinity", lambda _: ())(0)
    busy = [shares[core].user + shares[core].system for core in cores if core < len(shares)]
    return max(0.0, sum(busy) / 100 - time.process_time() / (time.monotonic() - STARTED))
