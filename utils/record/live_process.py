"""The process that draws a run's live plots, as the run sees it.

    live = start_live_plots(folder)     rank 0; None where the system starts no process
    live.check()                        now and then: one warning if it has died
    live.close()                        it draws the last rows and ends

Its standard input is a pipe whose other end only the run holds. However the run ends, by SIGKILL too, the pipe closes
and the process ends.
"""

import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import IO

from utils.config.entry_point import ROOT
from utils.record.live_plot import UNTIL_STDIN_CLOSES
from utils.record.logging import get_logger

log = get_logger(__name__)

_LAST_DRAWING_SEC = 20.0  # it takes 0.4 s of a core

_pipes: set[IO[bytes]] = set()


def _forget_pipes() -> None:
    """Close the pipes in a forked process: a loader's worker may outlive a killed rank."""
    while _pipes:
        _pipes.pop().close()


os.register_at_fork(after_in_child=_forget_pipes)


class LivePlots:
    """A process that draws the live plots of a run folder, in a session of its own."""

    def __init__(self, folder: Path) -> None:
        self._folder, self._warned = folder, False
        self._errors = tempfile.TemporaryFile()  # noqa: SIM115 (closed with the process); a pipe would fill up
        self._process = subprocess.Popen(
            [sys.executable, "-m", "utils.record.live_plot", str(folder.resolve()), UNTIL_STDIN_CLOSES],
            cwd=ROOT, env={**os.environ, "OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}, bufsize=0,
            stdin=subprocess.PIPE, stdout=subprocess.DEVNULL, stderr=self._errors, start_new_session=True,
        )  # fmt: skip
        assert self._process.stdin is not None
        self._pipe = self._process.stdin
        _pipes.add(self._pipe)

    def check(self) -> None:
        """Warn once if the process has died."""
        status = self._process.poll()
        if status and not self._warned:
            self._warned = True
            self._errors.seek(0)
            said = self._errors.read().decode(errors="replace").split("\n")
            last = next((line for line in reversed(said) if line.strip()), "it said nothing")
            self._warn(f"the process that draws has ended with status {status} ({last})")

    def close(self, *, waits: bool = True) -> None:
        """End the process after a last drawing. waits: until it is done, for some seconds."""
        _pipes.discard(self._pipe)
        self._pipe.close()
        if not waits:
            return
        try:
            self._process.wait(_LAST_DRAWING_SEC)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
            self._warned = True
            self._warn(f"the last drawing took longer than {_LAST_DRAWING_SEC:g} s and was ended")
        self.check()
        self._errors.close()

    def _warn(self, what: str) -> None:
        log.warning(
            "tracking.live_plots: %s; the run is not affected. `python -m utils.record.live_plot %s` draws the plots",
            what, self._folder,
        )  # fmt: skip


def start_live_plots(folder: Path) -> LivePlots | None:
    """Start the process; a system that refuses it is one warning."""
    try:
        return LivePlots(folder)
    except OSError as error:
        log.warning("tracking.live_plots: the process that draws cannot be started (%s); the run continues", error)
        return None
