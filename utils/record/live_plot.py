"""Live plots: plots/curves.png of a run, drawn again by another process as its metrics.jsonl grows.

    live = start_live_plots(folder)     rank 0 of a run with tracking.live_plots=true; None where no process starts
    live.check()                        now and then: one warning if it has died
    live.close()                        it draws the last rows and ends

The process ends with its parent, however the run ends.
"""

import os
import select
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

from utils.config.options import ROOT
from utils.io.files import ignore_write_errors
from utils.record.logging import get_logger, setup_logging
from utils.record.metrics_log import read_rows

log = get_logger(__name__)

_LOOK_SEC = 1.0
_PAUSE_SEC = 3.0  # at least, between drawings
_PAUSE = 20  # times the duration of a drawing: at most 5 % of the time
_LAST_DRAWING_SEC = 20.0  # it takes 0.4 s of a core
_NICENESS = 10
# What a terminal and a scheduler send to all processes of a run. Its drawing ends after its last rows.
_IGNORED = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2)


class LivePlots:
    """A process that draws the curves of a run folder, in a session of its own."""

    def __init__(self, folder: Path) -> None:
        self._warned = False
        self._process = subprocess.Popen(
            [sys.executable, "-m", "utils.record.live_plot", str(folder.resolve()), str(os.getpid())],
            cwd=ROOT, env={**os.environ, "OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}, bufsize=0,
            stdin=subprocess.PIPE, stdout=subprocess.DEVNULL, start_new_session=True,
        )  # fmt: skip

    def check(self) -> None:
        """Warn once if the process has died."""
        if self._process.poll() and not self._warned:
            self._warned = True
            log.warning(
                "tracking.live_plots: the process that draws has ended with status %d; the run is not affected",
                self._process.returncode,
            )

    def close(self, *, waits: bool = True) -> None:
        """End the process after a last drawing. waits: until it is done, for some seconds."""
        assert self._process.stdin is not None
        try:
            self._process.stdin.write(b"\n")  # not only closed: forked workers hold the pipe's end as well
            self._process.stdin.close()
        except OSError:  # it has died: said below
            pass
        if waits:
            try:
                self._process.wait(_LAST_DRAWING_SEC)
            except subprocess.TimeoutExpired:
                self._process.kill()
                self._process.wait()
            self.check()


def start_live_plots(folder: Path) -> LivePlots | None:
    """Start the process; a system that refuses it is one warning."""
    try:
        return LivePlots(folder)
    except OSError as error:
        log.warning("tracking.live_plots: the process that draws cannot be started (%s); the run continues", error)
        return None


def follow(folder: Path, wait: Callable[[float], bool]) -> None:
    """Draw a run's curves as its rows come, until `wait` (of seconds) returns True, and once more then."""
    from utils.record.plots import plot_curves  # imports matplotlib

    file, picture = folder / "metrics.jsonl", folder / "plots/curves.png"
    drawn, is_over, due = None, False, 0.0
    while (folder / "config.json").exists():  # a removed folder is not made again
        status = file.stat() if file.exists() else None
        state, started = status and (status.st_ino, status.st_size, status.st_mtime_ns), time.monotonic()
        if state != drawn and (is_over or started >= due):
            with ignore_write_errors(picture):
                plot_curves(read_rows(file), picture, folder.resolve().name)
            ended = time.monotonic()
            drawn, due = state, ended + max(_PAUSE_SEC, _PAUSE * (ended - started))
        if is_over:
            return
        is_over = wait(_LOOK_SEC)


def main(folder: Path, parent: int) -> None:
    """Draw for a run until it writes to the pipe or has died."""
    setup_logging()
    for number in _IGNORED:
        signal.signal(number, signal.SIG_IGN)
    os.nice(_NICENESS)
    pipe = sys.stdin.fileno()
    follow(folder, lambda seconds: bool(select.select([pipe], [], [], seconds)[0]) or os.getppid() != parent)


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]))
