"""Live plots: plots/curves.png of a run, drawn again by another process as its metrics.jsonl grows.

    python -m utils.record.live_plot RUN_DIR      follow a run from outside, until it is complete or Ctrl-C

    live = start_live_plots(folder)     rank 0 of a run with tracking.live_plots=true; None where no process starts
    live.check()                        now and then: one warning if it has died
    live.close()                        it draws the last rows and ends

A run's own process has a pipe as its standard input, whose other end only the run holds. However the run ends, by
SIGKILL too, the pipe closes and the process ends.
"""

import argparse
import os
import select
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import IO

from utils.config.entry_point import ROOT
from utils.errors import EXIT_OK, EXIT_USER_ERROR, UserError
from utils.io.files import ignore_write_errors
from utils.io.safe_text import safe_lines
from utils.record.logging import get_logger, setup_logging
from utils.record.metrics_log import read_rows
from utils.record.run_config import is_complete, read_run_config

log = get_logger(__name__)

_UNTIL_STDIN_CLOSES = "--until-stdin-closes"
_LOOK_SEC = 1.0
_PAUSE_SEC = 3.0  # at least, between drawings
_PAUSE = 20  # times the duration of a drawing: at most 5 % of the time
_LAST_DRAWING_SEC = 20.0  # it takes 0.4 s of a core
_NICENESS = 10
# What a terminal and a scheduler send to all processes of a run. Its drawing ends after its last rows.
_IGNORED = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2)

_pipes: set[IO[bytes]] = set()


def _forget_pipes() -> None:
    """Close the pipes in a forked process: a loader's worker may outlive a killed rank."""
    while _pipes:
        _pipes.pop().close()


os.register_at_fork(after_in_child=_forget_pipes)


class LivePlots:
    """A process that draws the curves of a run folder, in a session of its own."""

    def __init__(self, folder: Path) -> None:
        self._folder, self._warned = folder, False
        self._errors = tempfile.TemporaryFile()  # noqa: SIM115 (closed with the process); a pipe would fill up
        self._process = subprocess.Popen(
            [sys.executable, "-m", "utils.record.live_plot", str(folder.resolve()), _UNTIL_STDIN_CLOSES],
            cwd=ROOT, env={**os.environ, "OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}, bufsize=0,
            stdin=subprocess.PIPE, stdout=subprocess.DEVNULL, stderr=self._errors, start_new_session=True,
        )  # fmt: skip
        assert self._process.stdin is not None
        self._pipe = self._process.stdin
        _pipes.add(self._pipe)

    def check(self) -> None:
        """Warn once if the process has died."""
        if self._process.poll() and not self._warned:
            self._errors.seek(0)
            said = self._errors.read().decode(errors="replace").strip() or "it said nothing"
            self._warn(
                f"the process that draws has ended with status {self._process.returncode} ({said.splitlines()[-1]})"
            )

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
            self._warn(f"the last drawing took longer than {_LAST_DRAWING_SEC:g} s and was ended")
        self.check()
        self._errors.close()

    def _warn(self, what: str) -> None:
        self._warned = True
        log.warning("tracking.live_plots: %s; the run is not affected. To draw: %s", what, command_for(self._folder))


def command_for(folder: Path) -> str:
    """Return the command that draws a run's curves from outside."""
    return f"python -m utils.record.live_plot {folder}"


def start_live_plots(folder: Path) -> LivePlots | None:
    """Start the process; a system that refuses it is one warning."""
    try:
        return LivePlots(folder)
    except OSError as error:
        log.warning("tracking.live_plots: the process that draws cannot be started (%s); the run continues", error)
        return None


def follow(folder: Path, wait: Callable[[float], bool], *, until_complete: bool) -> None:
    """Draw a run's curves as its rows come, until `wait` (of seconds) returns True or, if set, the run is complete."""
    from utils.record.plots import plot_curves  # imports matplotlib

    file, picture = folder / "metrics.jsonl", folder / "plots/curves.png"
    drawn, is_over, due = None, False, 0.0
    while True:
        is_over = is_over or (until_complete and is_complete(folder))
        if not (folder / "config.json").exists():
            return  # a removed folder is not made again
        state, started = _version(file), time.monotonic()
        if state != drawn and (is_over or started >= due):
            with ignore_write_errors(picture):
                plot_curves(read_rows(file), picture, folder.resolve().name)
            ended = time.monotonic()
            drawn, due = state, ended + max(_PAUSE_SEC, _PAUSE * (ended - started))
        if is_over:
            return
        is_over = wait(_LOOK_SEC)


def _version(file: Path) -> tuple[int, int, int] | None:
    """Return what changes with a file's content; None without a file."""
    try:
        status = file.stat()
    except FileNotFoundError:
        return None
    return status.st_ino, status.st_size, status.st_mtime_ns


def _draw_for_a_run(folder: Path) -> None:
    """Draw until the run closes its end of the pipe, which its death does too."""
    for number in _IGNORED:
        signal.signal(number, signal.SIG_IGN)
    os.nice(_NICENESS)
    pipe = sys.stdin.fileno()  # nothing is ever written to it
    follow(folder, lambda seconds: bool(select.select([pipe], [], [], seconds)[0]), until_complete=False)


def _draw_from_outside(folder: Path) -> None:
    """Draw until the run is complete or Ctrl-C. Raises UserError (`run_dir`) where there is nothing to draw."""
    if "loop" not in read_run_config(folder):
        raise UserError(f"run_dir: {folder} is not the folder of a training run: its config.json has no `loop`")
    if not read_rows(folder / "metrics.jsonl").rows:
        raise UserError(f"run_dir: {folder / 'metrics.jsonl'} has no row yet; try again after the first log line")
    plots = folder / "plots"
    if not os.access(plots if plots.exists() else folder, os.W_OK):
        raise UserError(f"run_dir: {plots} may not be written by this user; the plots go there: ask for that right")

    def wait(seconds: float) -> bool:
        time.sleep(seconds)
        return False

    log.info("drawing %s until the run is complete; Ctrl-C ends it", plots / "curves.png")
    follow(folder, wait, until_complete=True)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; returns its exit status."""
    parser = argparse.ArgumentParser("python -m utils.record.live_plot", description="Draw a run's curves meanwhile.")
    parser.add_argument("run_dir", type=Path, help="the run folder")
    parser.add_argument(_UNTIL_STDIN_CLOSES, action="store_true", help="for a run that starts this as its own process")
    options = parser.parse_args(arguments)
    setup_logging()
    try:
        (_draw_for_a_run if options.until_stdin_closes else _draw_from_outside)(options.run_dir)
    except UserError as error:
        sys.stderr.write(safe_lines(f"live_plot: {error}") + "\n")
        return EXIT_USER_ERROR
    except KeyboardInterrupt:
        return EXIT_OK
    return EXIT_OK


if __name__ == "__main__":
    sys.exit(main())
