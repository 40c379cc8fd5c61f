"""Live plots: draw plots/{accuracy,loss,lr,momentum}_live.png of a run from its metrics.jsonl while it grows.

    python -m utils.record.live_plot RUN_DIR      follow a run from outside, until it is complete or Ctrl-C

A run with `tracking.live_plots=true` starts this as another process (utils/record/live_process.py). It then waits for
rows, and ends after a last drawing when the run closes the pipe that is its standard input.
"""

import argparse
import json
import os
import select
import signal
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import BinaryIO

from utils.errors import EXIT_OK, EXIT_USER_ERROR, UserError
from utils.io.files import ignore_write_errors
from utils.io.safe_text import safe_lines
from utils.record.logging import get_logger, setup_logging
from utils.record.metrics_log import Rows
from utils.record.run_config import is_complete, read_run_config

log = get_logger(__name__)

UNTIL_STDIN_CLOSES = "--until-stdin-closes"
_LOOK_SEC = 1.0
_PAUSE_SEC = 3.0  # at least, between drawings
_PAUSE = 20  # times the duration of a drawing: at most 5 % of the time
_NICENESS = 10
# What a terminal and a scheduler send to all processes of a run. Its drawing ends after its last rows.
_IGNORED = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2)


class GrowingRows(Rows):
    """The rows of a metrics.jsonl that a run appends to, and that a resumed run replaces."""

    def __init__(self, path: Path) -> None:
        super().__init__([])
        self._path = path
        self._file: BinaryIO | None = None  # kept open, so that no other file gets its number
        self._part = b""

    def read(self) -> bool:
        """Take the rows that were added; returns whether there are any. Raises UserError (`run_dir`) for a bad line."""
        try:
            if self._file is None or not os.path.samestat(os.stat(self._path), os.fstat(self._file.fileno())):
                self._reopen()
        except FileNotFoundError:
            pass
        except OSError as error:
            raise UserError(f"run_dir: {self._path} cannot be read ({error.strerror})") from None
        if self._file is None:
            return False
        *lines, self._part = (self._part + self._file.read()).split(b"\n")
        try:
            self.rows += map(json.loads, lines)
        except ValueError as error:
            raise UserError(f"run_dir: {self._path} has a line that is not JSON ({error}); remove that line") from None
        return bool(lines)

    def _reopen(self) -> None:
        file = open(self._path, "rb")  # noqa: SIM115 (closed by close())
        self.close()
        self.rows, self._file, self._part = [], file, b""

    def close(self) -> None:
        """Close the file."""
        if self._file is not None:
            self._file.close()


def follow(folder: Path, rows: GrowingRows, wait: Callable[[float], bool], *, until_complete: bool) -> None:
    """Draw a run's plots as its rows come, until `wait` (of seconds) returns True or, if set, the run is complete."""
    from utils.record.live_panels import draw_live_plots  # imports matplotlib

    has_more, is_over, due = False, False, 0.0
    while True:
        is_over = is_over or (until_complete and is_complete(folder))
        has_more = rows.read() or has_more
        if not (folder / "config.json").exists():
            return  # a removed folder is not made again
        started = time.monotonic()
        if has_more and rows.rows and (is_over or started >= due):
            with ignore_write_errors(folder / "plots"):
                draw_live_plots(rows, folder / "plots", folder.resolve().name)
            ended = time.monotonic()
            has_more, due = False, ended + max(_PAUSE_SEC, _PAUSE * (ended - started))
        if is_over:
            return
        is_over = wait(_LOOK_SEC)


def _draw_for_a_run(folder: Path) -> None:
    """Draw until the run closes its end of the pipe, which its death does too."""
    os.nice(_NICENESS)
    pipe = sys.stdin.fileno()

    def wait(seconds: float) -> bool:
        return bool(select.select([pipe], [], [], seconds)[0])  # nothing is ever written to it

    follow(folder, GrowingRows(folder / "metrics.jsonl"), wait, until_complete=False)


def _draw_from_outside(folder: Path) -> None:
    """Draw until the run is complete or Ctrl-C. Raises UserError (`run_dir`) where there is nothing to draw."""
    if not folder.is_dir():
        raise UserError(f"run_dir: there is no folder {folder}; name the run folder that training logs at its start")
    loop = read_run_config(folder).get("loop")
    if loop is None:
        raise UserError(f"run_dir: {folder} is not the folder of a training run: its config.json has no `loop`")
    rows = GrowingRows(folder / "metrics.jsonl")
    if not rows.read():
        raise UserError(
            f"run_dir: {folder / 'metrics.jsonl'} has no row yet; a run writes its first after "
            f"loop.log_every_steps={loop['log_every_steps']} steps: try again then"
        )
    rows.close()
    plots = folder / "plots"
    if not os.access(plots if plots.exists() else folder, os.W_OK):
        raise UserError(f"run_dir: {plots} may not be written by this user; the plots go there: ask for that right")

    def wait(seconds: float) -> bool:
        time.sleep(seconds)
        return False

    log.info("drawing %s until the run is complete; Ctrl-C ends it", folder / "plots" / "*_live.png")
    rows = GrowingRows(folder / "metrics.jsonl")
    follow(folder, rows, wait, until_complete=True)
    if rows.rows:  # a run that began again may have none
        log.info("drawn up to step %d", rows.rows[-1]["step"])


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; returns its exit status."""
    parser = argparse.ArgumentParser("python -m utils.record.live_plot", description="Draw a run's curves meanwhile.")
    parser.add_argument("run_dir", type=Path, help="the run folder")
    parser.add_argument(UNTIL_STDIN_CLOSES, action="store_true", help="for a run that starts this as its own process")
    options = parser.parse_args(arguments)
    if options.until_stdin_closes:
        for number in _IGNORED:
            signal.signal(number, signal.SIG_IGN)
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
